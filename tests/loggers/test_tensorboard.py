"""Event files as TensorBoard reads them: what is in them, and how a resumed run continues them."""

from __future__ import annotations

import copy
import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.loggers import TensorBoardLogger
from holdfast.utilities.rank_zero import rank_zero_only
from tests.loggers.events import accumulated, series, table


def test_where_things_go(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert (logger.name, logger.version, logger.sub_dir) == ("lightning_logs", 0, None)
    assert logger.save_dir == str(tmp_path)
    assert logger.root_dir == str(tmp_path / "lightning_logs")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert os.listdir(tmp_path) == []
    assert logger.experiment.log_dir == logger.log_dir
    assert TensorBoardLogger(tmp_path).version == 1


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_name_and_in_a_sub_directory(tmp_path: Path, name: str | None) -> None:
    logger = TensorBoardLogger(tmp_path, name=name, version="mine", sub_dir=Path("train"))
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert (logger.name, logger.sub_dir) == ("", "train")
    assert logger.log_dir == str(tmp_path / "mine" / "train")
    assert sorted(name.partition(".")[0] for name in os.listdir(logger.log_dir)) == ["events", "hparams"]


def test_home_and_environment_are_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PART", "train")
    logger = TensorBoardLogger("~/logs", version=3, sub_dir="$PART")
    assert logger.log_dir == str(tmp_path / "logs" / "lightning_logs" / "version_3" / "train")


def test_an_address_is_no_directory() -> None:
    with pytest.raises(ConfigError) as raised:
        TensorBoardLogger("s3://bucket/logs")
    assert str(raised.value) == (
        "TensorBoardLogger(save_dir='s3://bucket/logs') is not a local directory: give one, and copy what is in it."
    )


def test_numbers_of_every_kind(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="p")
    logger.log_metrics({"a": 1, "b": torch.tensor([0.5]), "c": numpy.float64(2.5), "d": True}, step=3)
    logger.log_metrics({"a": 2.0, "nested/name": math.inf}, step=4)
    logger.log_metrics({"a": 3.0})
    logger.finalize("success")
    assert series(logger.log_dir) == {
        "p-a": [(3, 1.0), (4, 2.0), (0, 3.0)],
        "p-b": [(3, 0.5)],
        "p-c": [(3, 2.5)],
        "p-d": [(3, 1.0)],
        "p-nested/name": [(4, math.inf)],
    }


def test_a_dict_of_numbers_is_one_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": {"train": 1.0, "val": torch.tensor(2.0)}}, step=1)
    logger.finalize("success")
    assert series(logger.log_dir) == {"loss_train:loss": [(1, 1.0)], "loss_val:loss": [(1, 2.0)]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "text",
            "TensorBoardLogger.log_metrics: 'bad' is 'text'. A metric is a number, a tensor with one element, "
            "or a dict of them; text, images and histograms go through logger.experiment.",
        ),
        (
            {"x": None},
            "TensorBoardLogger.log_metrics: 'bad/x' is None. A metric is a number, a tensor with one element, "
            "or a dict of them; text, images and histograms go through logger.experiment.",
        ),
        (
            torch.ones(2, 3),
            "TensorBoardLogger.log_metrics: 'bad' is a Tensor of shape (2, 3). A metric is one number: reduce it, "
            "or log its elements under names of their own.",
        ),
    ],
)
def test_what_is_not_a_number_is_said(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TensorBoardLogger(tmp_path).log_metrics({"bad": value}, step=0)
    assert str(raised.value) == message


def test_arguments_of_the_writer(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine", flush_secs=5)
    logger.log_metrics({"a": 1.0}, step=0)
    assert logger.experiment.flush_secs == 5
    assert [name.endswith(".mine") for name in os.listdir(logger.log_dir)] == [True]


@pytest.mark.parametrize("argument", ["flush_sec", "log_dir"])
def test_an_argument_that_the_writer_does_not_take_is_said_at_once(argument: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TensorBoardLogger("logs", **{argument: 5})  # type: ignore[arg-type]
    assert str(raised.value) == (
        f"TensorBoardLogger({argument}=...): it is not an argument of this logger, nor one of "
        "torch.utils.tensorboard.SummaryWriter that can be given here: comment, purge_step, max_queue, "
        "flush_secs, filename_suffix."
    )


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError) as raised:
        TensorBoardLogger("logs")
    assert str(raised.value) == (
        "TensorBoardLogger needs the package tensorboard: pip install tensorboard. Or use CSVLogger."
    )


def test_images_text_and_histograms_go_through_the_writer(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.experiment.add_text("note", "hello", 1)
    logger.experiment.add_histogram("weights", torch.arange(10.0), 1)
    logger.save()
    found = accumulated(logger.log_dir).Tags()
    assert (found["tensors"], found["histograms"]) == (["note/text_summary"], ["weights"])


def test_a_writer_that_was_closed_is_opened_again(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.experiment.close()
    logger.save()
    logger.log_metrics({"a": 2.0}, step=1)
    logger.finalize("success")
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    assert series(logger.log_dir) == {"a": [(0, 1.0), (1, 2.0)], "hp_metric": [(0, -1.0)]}


def test_a_copy_writes_to_a_file_of_its_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    copied = copy.deepcopy(logger)
    copied.log_metrics({"a": 2.0}, step=1)
    for one in (logger, copied):
        one.finalize("success")
    assert series(logger.log_dir) == {"a": [(0, 1.0), (1, 2.0)]}


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"a": 1})
    logger.log_graph(Net())
    logger.experiment.add_text("note", "hello")
    logger.save()
    logger.finalize("success")
    assert os.listdir(tmp_path) == []


class TestHyperparameters:
    def test_the_table_lists_them_with_a_metric(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_hyperparams(
            Namespace(lr=0.1, net={"width": 3, "sizes": [1, 2]}, path=Path("x"), none=None)
        )
        logger.log_hyperparams({"more": True})
        logger.finalize("success")
        assert series(logger.log_dir) == {"hp_metric": [(0, -1.0), (0, -1.0)]}
        assert table(logger.log_dir) == {
            "lr": 0.1,
            "net/width": 3.0,
            "net/sizes": "[1, 2]",
            "path": "x",
            "none": "None",
        }
        assert logger.hparams["more"] is True and logger.hparams["path"] == Path("x")

    @pytest.mark.parametrize(
        ("metrics", "step", "curves"),
        [
            ({"acc": 0.5, "loss": torch.tensor(2.0)}, 7, {"acc": [(7, 0.5)], "loss": [(7, 2.0)]}),
            (0.25, None, {"hp_metric": [(0, 0.25)]}),
            ({}, None, {}),
        ],
    )
    def test_with_metrics_of_ones_own(
        self, tmp_path: Path, metrics: Any, step: int | None, curves: dict[str, Any]
    ) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_hyperparams({"lr": 0.1}, metrics, step=step)
        logger.finalize("success")
        assert series(logger.log_dir) == curves
        assert table(logger.log_dir) == {"lr": 0.1}

    def test_without_the_default_metric(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
        logger.log_hyperparams({"lr": 0.1})
        logger.finalize("success")
        assert series(logger.log_dir) == {}
        assert table(logger.log_dir) == {"lr": 0.1}


class Net(nn.Module):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.norm(x)) + torch.rand(3)


class TestGraph:
    @pytest.mark.parametrize("example", [torch.ones(2, 3), (torch.ones(2, 3),)])
    def test_is_logged_and_the_model_is_as_before(self, tmp_path: Path, example: Any) -> None:
        logger, net = TensorBoardLogger(tmp_path, log_graph=True), Net(example)
        before = torch.get_rng_state()
        logger.log_graph(net)
        logger.save()
        assert accumulated(logger.log_dir).Tags()["graph"] is True
        assert (net.training, net.norm.training, net.frozen.training) == (True, True, False)
        assert net.norm.num_batches_tracked == 0
        assert torch.equal(torch.get_rng_state(), before)

    def test_is_not_logged_unless_asked_for(self, tmp_path: Path) -> None:
        TensorBoardLogger(tmp_path).log_graph(Net(torch.ones(2, 3)))
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("example", "found"), [(None, "is not there"), ({"x": torch.ones(2, 3)}, "is a dict")]
    )
    def test_without_an_input_to_trace_it_says_so(self, tmp_path: Path, example: Any, found: str) -> None:
        logger = TensorBoardLogger(tmp_path, log_graph=True)
        with pytest.warns(UserWarning, match="logs no graph") as caught:
            logger.log_graph(Net(example))
        assert [str(one.message) for one in caught] == [
            f"TensorBoardLogger(log_graph=True) logs no graph: Net.example_input_array {found}. "
            "Set it to a tensor, or to a tuple of the arguments of forward."
        ]
        logger.log_graph(Net(example), torch.ones(2, 3))
        logger.save()
        assert accumulated(logger.log_dir).Tags()["graph"] is True


def log(logger: TensorBoardLogger, start: int, stop: int) -> None:
    if start == 0 or logger._resumed:
        logger.log_hyperparams({"lr": 0.1}, {"score": 0.5})
    for step in range(start, stop):
        logger.log_metrics({"loss": 1 / (step + 1)}, step=step)
        if step % 3 == 2:
            # The same step as the next point of the loss, and an axis of its own.
            logger.log_metrics({"val": float(step), "both": {"a": step, "b": -step}}, step=step + 1)
            logger.log_metrics({"val_batch": 1.0}, step=step // 3)


class TestResume:
    @pytest.mark.parametrize(("saved", "killed"), [(0, 5), (6, 6), (6, 11), (7, 9)])
    def test_it_shows_the_points_of_a_run_that_never_stopped(
        self, tmp_path: Path, saved: int, killed: int
    ) -> None:
        straight = TensorBoardLogger(tmp_path / "straight")
        log(straight, 0, 12)
        straight.finalize("success")

        first = TensorBoardLogger(tmp_path / "killed")
        log(first, 0, saved)
        state = copy.deepcopy(first.state_dict())
        log(first, saved, killed)
        first.save()
        for path in Path(first.log_dir).glob("*tfevents*"):
            if path.stat().st_size > state["files"].get(path.name, 0):
                os.truncate(path, path.stat().st_size - 1)  # the last event was cut short

        second = TensorBoardLogger(tmp_path / "killed")
        second.resume_in(0)
        second.load_state_dict(state)
        log(second, saved, 12)
        second.finalize("success")
        assert series(second.log_dir) == series(straight.log_dir)

    def test_what_user_code_logged_before_the_state_was_there_is_not_there_twice(
        self, tmp_path: Path
    ) -> None:
        first = TensorBoardLogger(tmp_path, version=0)
        first.experiment.add_scalar("from_setup", 1.0, 0)
        state = first.state_dict()
        first.finalize("failed")
        second = TensorBoardLogger(tmp_path, version=0)
        second.experiment.add_scalar("from_setup", 1.0, 0)
        second.load_state_dict(state)
        second.log_metrics({"a": 1.0}, step=1)
        second.finalize("success")
        assert series(second.log_dir) == {"from_setup": [(0, 1.0)], "a": [(1, 1.0)]}

    def test_the_graph_is_there_once(self, tmp_path: Path) -> None:
        first = TensorBoardLogger(tmp_path, version=0, log_graph=True)
        first.log_graph(Net(torch.ones(2, 3)))
        state = first.state_dict()
        second = TensorBoardLogger(tmp_path, version=0, log_graph=True)
        second.load_state_dict(state)
        second.log_graph(Net(torch.ones(2, 3)))
        assert event_file_count(second) == 1

    def test_a_metric_logged_again_later_with_the_same_value_is_a_new_point(self, tmp_path: Path) -> None:
        first = TensorBoardLogger(tmp_path, version=0)
        first.log_hyperparams({"lr": 0.1}, 0.5)
        state = first.state_dict()
        second = TensorBoardLogger(tmp_path, version=0)
        second.load_state_dict(state)
        second.log_hyperparams({"lr": 0.1}, 0.5)
        second.log_metrics({"a": 1.0}, step=1)
        second.log_hyperparams({"lr": 0.1}, 0.5)
        second.finalize("success")
        assert series(second.log_dir) == {"hp_metric": [(0, 0.5), (0, 0.5)], "a": [(1, 1.0)]}

    def test_another_version_is_left_alone(self, tmp_path: Path) -> None:
        first = TensorBoardLogger(tmp_path)
        first.log_metrics({"a": 1.0}, step=0)
        state = first.state_dict()
        first.log_metrics({"a": 2.0}, step=1)
        first.finalize("failed")
        second = TensorBoardLogger(tmp_path)
        second.load_state_dict(state)
        second.log_metrics({"a": 3.0}, step=1)
        second.finalize("success")
        assert series(first.log_dir) == {"a": [(0, 1.0), (1, 2.0)]}
        assert series(second.log_dir) == {"a": [(1, 3.0)]}

    def test_runs_below_a_run_without_a_version_are_left_alone(self, tmp_path: Path) -> None:
        first = TensorBoardLogger(tmp_path, version="")
        first.log_metrics({"a": 1.0}, step=0)
        state = first.state_dict()
        first.experiment.add_scalars("both", {"x": 1.0}, 1)
        first.finalize("failed")
        other = TensorBoardLogger(tmp_path)
        other.log_metrics({"b": 2.0}, step=0)
        other.finalize("success")
        assert Path(other.log_dir).parent == Path(first.log_dir)
        second = TensorBoardLogger(tmp_path, version="")
        second.load_state_dict(state)
        second.log_metrics({"a": 3.0}, step=1)
        second.finalize("success")
        assert series(second.log_dir) == {"a": [(0, 1.0), (1, 3.0)], "version_0:b": [(0, 2.0)]}

    def test_a_version_that_was_moved_is_gone_on_in(self, tmp_path: Path) -> None:
        first = TensorBoardLogger(tmp_path)
        first.log_metrics({"a": 1.0}, step=0)
        state = first.state_dict()
        first.log_metrics({"a": 2.0}, step=1)
        first.finalize("failed")
        os.rename(first.log_dir, tmp_path / "lightning_logs" / "version_7")
        second = TensorBoardLogger(tmp_path)
        second.resume_in(7)
        second.load_state_dict(state)
        second.log_metrics({"a": 3.0}, step=1)
        second.finalize("success")
        assert series(second.log_dir) == {"a": [(0, 1.0), (1, 3.0)]}

    def test_points_that_were_lost_are_said(self, tmp_path: Path) -> None:
        first = TensorBoardLogger(tmp_path, version=0)
        first.log_metrics({"a": 1.0}, step=0)
        state = first.state_dict()
        first.finalize("failed")
        ((name, size),) = state["files"].items()
        path = Path(first.log_dir, name)
        os.truncate(path, 10)
        second = TensorBoardLogger(tmp_path, version=0)
        second.load_state_dict(state)
        with pytest.warns(UserWarning, match="bytes") as caught:
            second.log_metrics({"a": 2.0}, step=1)
        assert [str(one.message) for one in caught] == [
            f"{path} has 10 bytes; it had {size} when the checkpoint was written. "
            "The missing ones were lost before the resume."
        ]

    def test_a_clock_that_went_back_is_said(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, version=0)
        os.makedirs(logger.log_dir)
        Path(logger.log_dir, "events.out.tfevents.9999999999.host.1.0").touch()
        with pytest.warns(UserWarning, match=r"^The clock is \d+ seconds behind the newest event file in "):
            logger.log_metrics({"a": 1.0}, step=0)


def event_file_count(logger: TensorBoardLogger) -> int:
    return len(list(Path(logger.log_dir).rglob("*tfevents*")))
