"""metrics.csv and hparams.yaml: what is in them, after a crash and after a resume too."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError, StorageError
from holdfast.loggers import CSVLogger
from holdfast.utilities.rank_zero import rank_zero_only


def text(logger: CSVLogger) -> str:
    return Path(logger.experiment.metrics_file_path).read_text()


def rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_where_things_go(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    assert (logger.name, logger.version) == ("lightning_logs", 0)
    assert logger.save_dir == str(tmp_path)
    assert logger.root_dir == str(tmp_path / "lightning_logs")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert os.listdir(tmp_path) == []
    assert logger.experiment.metrics_file_path == os.path.join(logger.log_dir, "metrics.csv")
    assert os.listdir(logger.log_dir) == []
    assert CSVLogger(tmp_path).version == 1


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_name_and_with_a_version_of_ones_own(tmp_path: Path, name: str | None) -> None:
    logger = CSVLogger(tmp_path, name=name, version="mine")
    assert logger.name == ""
    assert logger.log_dir == str(tmp_path / "mine")


def test_the_next_free_version_is_taken_when_first_needed(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="a")
    (tmp_path / "a" / "version_7").mkdir(parents=True)
    (tmp_path / "a" / "version_x").mkdir()
    (tmp_path / "a" / "version_9").touch()
    assert logger.version == 8


def test_values_and_columns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"b": torch.tensor(1.5), "a": 2, "epoch": 0}, step=3)
    logger.log_metrics({"B": numpy.float64(0.1), "c": math.nan, "x": "text, quoted"}, step=4)
    logger.save()
    assert text(logger) == 'B,a,b,c,epoch,step,x\n,2,1.5,,0,3,\n0.1,,,nan,,4,"text, quoted"\n'
    assert logger.experiment.metrics == []


def test_a_new_column_keeps_the_rows(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"a": 2.0}, step=1)
    logger.save()
    logger.log_metrics({"b": 3.0}, step=2)
    logger.finalize("success")
    assert text(logger) == "a,b,step\n1.0,,0\n2.0,,1\n,3.0,2\n"
    assert os.listdir(logger.log_dir) == ["metrics.csv"]


def test_prefix(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="p")
    logger.log_metrics({"a": 1, "epoch": 2}, step=1)
    logger.save()
    assert text(logger) == "p-a,p-epoch,step\n1,2,1\n"


def test_rows_stay_unwritten_for_as_many_steps_as_asked(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    for step in range(9):
        logger.log_metrics({"a": step}, step=step)
    assert not os.path.exists(logger.experiment.metrics_file_path)
    logger.log_metrics({"a": 9}, step=9)
    assert len(rows(logger.experiment.metrics_file_path)) == 10
    logger.log_metrics({"a": 19}, step=19)
    assert len(rows(logger.experiment.metrics_file_path)) == 11


def test_an_earlier_runs_file_in_the_version_is_kept(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        logger = CSVLogger(tmp_path, version=0)
        logger.log_metrics({"a": value}, step=0)
        logger.save()
    directory = Path(logger.log_dir)
    found = {path.name: path.read_text() for path in directory.iterdir()}
    assert found == {
        "metrics-v1.csv": "a,step\n1.0,0\n",
        "metrics-v2.csv": "a,step\n2.0,0\n",
        "metrics.csv": "a,step\n3.0,0\n",
    }


def log_run(logger: CSVLogger, start: int, stop: int) -> Iterator[int]:
    for step in range(start, stop):
        logger.log_metrics({"loss": 1 / (step + 1)}, step=step)
        if step % 4 == 3:
            logger.log_metrics({f"val_{step // 8}": step * 0.1, "epoch": step // 4}, step=step)
        yield step


@settings(max_examples=40, deadline=None)
@given(
    saved=st.integers(0, 20),
    more=st.integers(0, 12),
    flush=st.sampled_from([1, 3, 100]),
    cut=st.integers(0, 9),
)
def test_killed_and_resumed_it_is_the_file_of_a_run_that_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, saved: int, more: int, flush: int, cut: int
) -> None:
    straight = CSVLogger(tmp_path_factory.mktemp("a"), flush_logs_every_n_steps=flush)
    list(log_run(straight, 0, 24))
    straight.save()

    root = tmp_path_factory.mktemp("b")
    first = CSVLogger(root, flush_logs_every_n_steps=flush)
    list(log_run(first, 0, saved))
    state = first.state_dict()
    list(log_run(first, saved, min(saved + more, 24)))
    path = first.experiment.metrics_file_path
    if more and cut and os.path.exists(path) and first.experiment.rows_written > state["rows"]:
        os.truncate(path, os.path.getsize(path) - 1)  # the last line was cut short

    second = CSVLogger(root, flush_logs_every_n_steps=flush)
    second.resume_in(0)
    second.load_state_dict(state)
    list(log_run(second, saved, 24))
    second.save()
    assert text(second) == text(straight)


def test_resuming_in_another_version_leaves_the_old_one_alone(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    state = first.state_dict()
    second = CSVLogger(tmp_path)
    second.load_state_dict(state)
    second.log_metrics({"a": 2.0}, step=1)
    second.save()
    assert (first.version, second.version) == (0, 1)
    assert text(first) == "a,step\n1.0,0\n"
    assert text(second) == "a,step\n2.0,1\n"


def test_a_version_that_was_moved_is_gone_on_in(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    state = first.state_dict()
    first.log_metrics({"a": 2.0}, step=1)
    first.save()
    os.rename(first.log_dir, tmp_path / "lightning_logs" / "version_7")
    second = CSVLogger(tmp_path)
    second.resume_in(7)
    second.load_state_dict(state)
    second.log_metrics({"a": 3.0}, step=1)
    second.save()
    assert text(second) == "a,step\n1.0,0\n3.0,1\n"


def test_a_metric_that_is_several_numbers_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        CSVLogger(tmp_path).log_metrics({"bad": torch.ones(2)}, step=0)
    assert str(raised.value) == (
        "CSVLogger.log_metrics: 'bad' is a Tensor of shape (2,). A metric is one number: reduce it, "
        "or log its elements under names of their own."
    )


def test_resume_in_a_version_without_a_state_appends(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    first.save()
    second = CSVLogger(tmp_path)
    second.resume_in(0)
    second.log_metrics({"a": 2.0}, step=1)
    second.save()
    assert text(second) == "a,step\n1.0,0\n2.0,1\n"


def test_rows_that_were_lost_are_said(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    first.log_metrics({"a": 2.0}, step=1)
    state = first.state_dict()
    path = first.experiment.metrics_file_path
    Path(path).write_text("a,step\n1.0,0\n")
    second = CSVLogger(tmp_path, version=0)
    second.load_state_dict(state)
    second.log_metrics({"a": 3.0}, step=2)
    with pytest.warns(UserWarning, match="rows") as caught:
        second.save()
    assert str(caught[0].message) == (
        f"{path} has 1 rows; the checkpoint was written after 2. "
        "The missing ones were lost before the resume."
    )
    assert text(second) == "a,step\n1.0,0\n3.0,2\n"


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    state = first.state_dict()
    os.remove(first.experiment.metrics_file_path)
    second = CSVLogger(tmp_path, version=0)
    second.load_state_dict(state)
    second.log_metrics({"a": 2.0}, step=1)
    with pytest.warns(UserWarning) as warned:  # noqa: PT030 - the whole message is below
        second.save()
    path = second.experiment.metrics_file_path
    assert [str(one.message) for one in warned] == [
        f"{path} is gone: its 1 rows from before the resume are missing."
    ]
    assert text(second) == "a,step\n2.0,1\n"


def test_hyperparameters_are_plain_yaml(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams(
        Namespace(lr=0.1, path=Path("x"), nothing=None, nested={"a": [1, (2, 3)]}, kind=torch.float32)
    )
    logger.log_hyperparams({"more": True})
    written = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert written == {
        "lr": 0.1,
        "path": "x",
        "nothing": None,
        "nested": {"a": [1, [2, 3]]},
        "kind": "torch.float32",
        "more": True,
    }
    assert logger.experiment.hparams["path"] == Path("x")


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"a": 1})
    logger.save()
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def lightning_csv_logger() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning.pytorch.loggers").CSVLogger


def test_same_file_as_lightning(tmp_path: Path, lightning_csv_logger: Any) -> None:
    found = []
    for number, kind in enumerate((CSVLogger, lightning_csv_logger)):
        logger = kind(tmp_path / str(number), flush_logs_every_n_steps=3)
        for step in range(8):
            logger.log_metrics({"train_loss": torch.tensor(0.1) * step, "epoch": 0}, step=step)
            if step % 3 == 2:
                logger.log_metrics({f"val/{step}": float(step)}, step=step)
        logger.save()
        logger.finalize("success")
        directory = os.path.relpath(logger.log_dir, tmp_path / str(number))
        with open(logger.experiment.metrics_file_path) as file:
            found.append((directory, file.read()))
    assert found[0] == found[1]


def test_rows_survive_a_resume_in_which_nothing_was_logged(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    state = first.state_dict()
    second = CSVLogger(tmp_path, version=0)
    second.load_state_dict(state)
    again = second.state_dict()
    assert again == state
    assert (again["rows"], again["version"], again["name"]) == (1, 0, "lightning_logs")
    third = CSVLogger(tmp_path, version=0)
    third.load_state_dict(again)
    third.log_metrics({"a": 2.0}, step=1)
    third.save()
    assert text(third) == "a,step\n1.0,0\n2.0,1\n"


GOES_ON = """
import sys
from holdfast.loggers.csv import CSVLogger

root, column, rows = sys.argv[1:]
logger = CSVLogger(root, version=0)
logger.load_state_dict({"name": "lightning_logs", "version": 0, "rows": int(rows)})
logger.log_metrics({column: 3.0}, step=2)
logger.save()
"""


@pytest.mark.parametrize("point", ["temp-created", "written", "synced", "renamed"])
@pytest.mark.parametrize(("column", "cuts"), [("a", True), ("b", False)], ids=["cut back", "a new column"])
def test_a_kill_while_the_file_is_written_anew_loses_no_row_that_the_checkpoint_counts_on(
    point: str, column: str, cuts: bool, tmp_path: Path
) -> None:
    first = CSVLogger(tmp_path)
    for step in range(2):
        first.log_metrics({"a": float(step)}, step=step)
    assert first.state_dict()["rows"] == 2
    if cuts:
        first.log_metrics({"a": 2.0, "late": 1.0}, step=2)
        first.save()  # and then a kill, before the next checkpoint

    def go_on(**environment: str) -> int:
        command = [sys.executable, "-c", GOES_ON, str(tmp_path), column, "2"]
        return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode

    assert go_on(HOLDFAST_CRASH_AT=point) == -signal.SIGKILL
    assert [row["a"] for row in rows(first.experiment.metrics_file_path)][:2] == ["0.0", "1.0"]
    assert go_on() == 0
    last = {"a": "a,step\n0.0,0\n1.0,1\n3.0,2\n", "b": "a,b,step\n0.0,,0\n1.0,,1\n,3.0,2\n"}
    assert text(first) == last[column]
    assert os.listdir(first.log_dir) == ["metrics.csv"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_append_leaves_whole_rows_and_keeps_the_others(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"a": 0.125}, step=1)
    write = os.write

    def half(descriptor: int, data: Any) -> int:
        write(descriptor, bytes(data)[:3])
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises((StorageError, KeyboardInterrupt), match="No space left on device|^$"):
            logger.save()
    assert text(logger) == "a,step\n1.0,0\n"
    logger.save()
    assert text(logger) == "a,step\n1.0,0\n0.125,1\n"


def test_a_file_that_was_removed_is_begun_again(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(2):
        logger.log_metrics({"a": float(step)}, step=step)
        logger.save()
        os.remove(logger.experiment.metrics_file_path)
    logger.log_metrics({"a": 2.0}, step=2)
    logger.save()
    assert text(logger) == "a,step\n2.0,2\n"


def test_a_row_with_too_many_cells_is_read_all_the_same(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    state = logger.state_dict()
    path = Path(logger.experiment.metrics_file_path)
    path.write_text("a,step\n1.0,0,7\n")
    again = CSVLogger(tmp_path, version=0)
    again.load_state_dict(state)
    again.log_metrics({"a": 2.0}, step=1)
    again.save()
    assert path.read_text() == "a,step\n1.0,0\n2.0,1\n"


def test_hyperparameters_of_numpy_are_numbers_and_one_that_holds_itself_ends(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    endless: list[Any] = []
    endless.append(endless)
    logger.log_hyperparams({"lr": numpy.float64(0.1), "n": numpy.int64(3), "endless": endless})
    kept = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert (kept["lr"], kept["n"]) == (0.1, 3)
    assert repr(kept["endless"]).count("[") == 19


def test_a_metric_called_step_is_the_axis(tmp_path: Path) -> None:
    from tests.training.toys import Toy, rows, trainer

    class ByEpoch(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0, on_step=False, on_epoch=True)
            self.log("step", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="n")
    trainer(logger=logger, max_epochs=3).fit(ByEpoch(), rows())
    table = (tmp_path / "n/version_0/metrics.csv").read_text().splitlines()
    assert [line.split(",")[table[0].split(",").index("step")] for line in table[1:]] == ["0", "1", "2"]
