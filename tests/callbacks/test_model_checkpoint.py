"""What ModelCheckpoint saves, what it shows of it, and what it deletes."""

from __future__ import annotations

import errno
import logging
import math
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint import commit
from holdfast.errors import ConfigError, StorageError

from .fake_trainer import FakeTrainer, files, steps_of


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("holdfast")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def run(tmp_path: Path, values: list[float], **arguments: Any) -> ModelCheckpoint:
    callback = ModelCheckpoint(dirpath=tmp_path, **arguments)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    for value in values:
        trainer.epoch(val_loss=value)
    return callback


def test_the_newest_is_kept_by_default(tmp_path: Path) -> None:
    callback = run(tmp_path, [1.0, 2.0, 3.0])
    assert files(tmp_path) == ["epoch=2-step=18.ckpt"]
    assert callback.best_model_path == str(tmp_path / "epoch=2-step=18.ckpt")
    assert callback.best_k_models == {}
    assert callback.best_model_score is None


@pytest.mark.parametrize(
    ("k", "mode", "kept"),
    [
        (1, "min", ["epoch=2-step=18.ckpt"]),
        (2, "min", ["epoch=1-step=12.ckpt", "epoch=2-step=18.ckpt"]),
        (2, "max", ["epoch=0-step=6.ckpt", "epoch=3-step=24.ckpt"]),
        (0, "min", []),
        (-1, "min", [f"epoch={n}-step={6 * n + 6}.ckpt" for n in range(4)]),
    ],
)
def test_top_k(tmp_path: Path, k: int, mode: str, kept: list[str]) -> None:
    run(tmp_path, [3.0, 1.0, 0.5, 2.0], monitor="val_loss", save_top_k=k, mode=mode)
    assert files(tmp_path) == kept


def test_what_is_published(tmp_path: Path) -> None:
    callback = run(tmp_path, [0.5, 0.25, 1.0], monitor="val_loss", save_top_k=2, save_last=True)
    best, second = str(tmp_path / "epoch=1-step=12.ckpt"), str(tmp_path / "epoch=0-step=6.ckpt")
    assert callback.best_model_path == best
    assert callback.best_model_score == torch.tensor(0.25)
    assert callback.best_k_models == {second: torch.tensor(0.5), best: torch.tensor(0.25)}
    assert callback.kth_best_model_path == second
    assert callback.kth_value == torch.tensor(0.5)
    assert callback.current_score == torch.tensor(0.25)
    assert callback.last_model_path == str(tmp_path / "last.ckpt")


def test_last_is_the_newest_save_and_not_the_newest_of_the_best(tmp_path: Path) -> None:
    run(tmp_path, [1.0, 2.0, 3.0], monitor="val_loss", save_last=True)
    assert steps_of(tmp_path) == {"epoch=0-step=6.ckpt": 6, "last.ckpt": 18}


@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_is_a_second_name_of_the_newest(tmp_path: Path, save_last: Any) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, save_last=save_last)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    used = []
    for value in (1.0, 2.0):
        trainer.epoch(val_loss=value)
        used.append(steps_of(tmp_path))
    assert used == [
        {"epoch=0-step=6.ckpt": 6, "last.ckpt": 6},
        {"epoch=1-step=12.ckpt": 12, "last.ckpt": 12},
    ]


def test_a_template_for_last_moves_on_with_it(tmp_path: Path) -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "newest-{epoch}"

    callback = Named(dirpath=tmp_path, save_last=True, save_top_k=0)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.epoch(val_loss=1.0)
    trainer.epoch(val_loss=1.0)
    assert files(tmp_path) == ["newest-epoch=1.ckpt"]


def test_nan_never_ranks_above_a_number_and_is_said_once(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max", save_top_k=1)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in (math.nan, math.nan, 1.0, math.nan):
            trainer.epoch(val_loss=value)
    assert files(tmp_path) == ["epoch=2-step=18.ckpt"]
    assert callback.best_model_score == torch.tensor(1.0)
    assert [str(one.message) for one in caught] == [
        "val_loss is NaN at step 6: a checkpoint with NaN never ranks above one with a number."
    ]


def test_a_metrics_name_with_a_slash_makes_no_subdirectory(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{val/x:.1f}", monitor="val/x")
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.epoch(**{"val/x": 0.1})
    assert files(tmp_path) == ["epoch=0-val_x=0.1.ckpt"]


def test_a_constant_name_gets_versions_and_the_replaced_one_is_reused(tmp_path: Path) -> None:
    run(tmp_path, [3.0, 2.0, 1.0], monitor="val_loss", save_top_k=2, filename="best")
    assert steps_of(tmp_path) == {"best-v1.ckpt": 12, "best.ckpt": 18}


def test_without_versions_the_name_is_overwritten(tmp_path: Path) -> None:
    callback = run(
        tmp_path, [3.0, 2.0], monitor="val_loss", save_top_k=2, filename="best", enable_version_counter=False
    )
    assert steps_of(tmp_path) == {"best.ckpt": 12}
    assert callback.best_k_models == {str(tmp_path / "best.ckpt"): torch.tensor(2.0)}


def test_another_runs_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path, [1.0], save_last=True)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    run(tmp_path, [1.0, 1.0], save_last=True)
    assert files(tmp_path) == [
        "epoch=0-step=6.ckpt",
        "epoch=1-step=12.ckpt",
        "last-v1.ckpt",
        "last.ckpt",
    ]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_two_callbacks_with_the_same_names_share_a_directory(tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    newest = ModelCheckpoint(dirpath=tmp_path)
    trainer = FakeTrainer(str(tmp_path), best, newest)
    trainer.start()
    trainer.epoch(val_loss=1.0)
    trainer.epoch(val_loss=2.0)
    assert steps_of(tmp_path) == {"epoch=0-step=6.ckpt": 6, "epoch=1-step=12.ckpt": 12}
    assert best.best_model_path == str(tmp_path / "epoch=0-step=6.ckpt")
    assert newest.best_model_path == str(tmp_path / "epoch=1-step=12.ckpt")


def test_each_interval_saves_when_it_is_due(tmp_path: Path) -> None:
    steps = ModelCheckpoint(dirpath=tmp_path / "steps", every_n_train_steps=4, save_top_k=-1)
    epochs = ModelCheckpoint(dirpath=tmp_path / "epochs", every_n_epochs=2, save_top_k=-1)
    times = ModelCheckpoint(
        dirpath=tmp_path / "times", train_time_interval=timedelta(seconds=0), save_top_k=-1
    )
    trainer = FakeTrainer(str(tmp_path), steps, epochs, times)
    trainer.start()
    trainer.epoch(val_loss=1.0)
    trainer.epoch(val_loss=1.0)
    assert sorted(steps_of(tmp_path / "steps").values()) == [4, 8, 12]
    assert sorted(steps_of(tmp_path / "epochs").values()) == [12]
    assert sorted(steps_of(tmp_path / "times").values()) == list(range(1, 13))


def test_only_step_and_time_intervals_ask_for_the_batch_hook(tmp_path: Path) -> None:
    assert not ModelCheckpoint().uses_hook("on_train_batch_end")
    assert ModelCheckpoint(every_n_train_steps=1).uses_hook("on_train_batch_end")
    assert ModelCheckpoint(train_time_interval=timedelta(hours=1)).uses_hook("on_train_batch_end")
    assert ModelCheckpoint().uses_hook("on_train_epoch_end")
    assert not ModelCheckpoint().uses_hook("on_test_end")


def test_a_step_interval_with_a_validation_metric_ranks_fresh_values_only(tmp_path: Path) -> None:
    callback = ModelCheckpoint(
        dirpath=tmp_path, monitor="val_loss", every_n_train_steps=4, save_top_k=-1, save_last=True
    )
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.batches(4)
    assert steps_of(tmp_path) == {"last.ckpt": 4}
    trainer.batches(2)
    trainer.validate(val_loss=1.0)
    trainer.safe_point()
    assert steps_of(tmp_path) == {"epoch=0-step=6.ckpt": 6, "last.ckpt": 6}
    trainer.end_epoch()
    trainer.batches(6)
    assert steps_of(tmp_path) == {"epoch=0-step=6.ckpt": 6, "last.ckpt": 12}
    assert list(callback.best_k_models.values()) == [torch.tensor(1.0)]


def test_a_monitor_that_was_never_logged_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_los")
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    with pytest.raises(ConfigError) as caught:
        trainer.epoch(val_loss=1.0)
    assert str(caught.value) == (
        "ModelCheckpoint(monitor='val_los') has nothing to go by: no such value was logged. Did you mean "
        "'val_loss'? Logged so far: epoch, step, val_loss."
    )
    assert files(tmp_path) == []


def test_a_name_that_was_never_logged_is_an_error_once_that_is_known(tmp_path: Path) -> None:
    callback = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}-{val_acc:.2f}", every_n_train_steps=3, save_top_k=-1
    )
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.batches(3)
    assert files(tmp_path) == ["step=3-val_acc=nan.ckpt"]
    trainer.validate(val_loss=1.0)
    with pytest.raises(ConfigError) as caught:
        trainer.end_epoch()
    assert str(caught.value) == (
        "ModelCheckpoint(filename='{step}-{val_acc:.2f}') asks for 'val_acc': no such value was logged. "
        "Logged so far: epoch, step, val_loss."
    )


def test_validation_that_is_still_to_come_is_waited_for(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_on_train_epoch_end=True)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.check_val_every_n_epoch = 2
    trainer.start()
    trainer.batches(6)
    trainer.end_epoch()
    assert files(tmp_path) == []
    trainer.epoch(val_loss=1.0)
    assert files(tmp_path) == ["epoch=1-step=12.ckpt"]


def test_nothing_is_saved_twice_at_one_step_or_without_need(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.epoch(val_loss=1.0)
    trainer.end_epoch()
    trainer.fast_dev_run = 1
    trainer.epoch(val_loss=1.0)
    trainer.fast_dev_run = 0
    trainer.sanity_checking = True
    trainer.validate(val_loss=1.0)
    trainer.safe_point()
    assert files(tmp_path) == ["epoch=0-step=6.ckpt"]


def test_a_save_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.epoch(val_loss=1.0)
    before = callback.state_dict()

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(trainer.engine, "save", refuse)
    with pytest.raises(StorageError):
        trainer.epoch(val_loss=0.5)
    monkeypatch.undo()
    assert callback.state_dict() == before
    assert files(tmp_path) == ["epoch=0-step=6.ckpt"]
    # The value still counts as new: the next chance takes it.
    trainer.global_step += 1
    trainer.end_epoch()
    assert callback.best_model_score == torch.tensor(0.5)


def test_attributes_and_files_change_only_after_the_commit_and_the_file_holds_what_follows(
    tmp_path: Path,
) -> None:
    seen: list[Any] = []

    class Watching(ModelCheckpoint):
        def plan_save(self, trainer: Any) -> Any:
            plan = super().plan_save(trainer)
            there = [name for name in files(tmp_path) if not commit.is_temporary(name)]
            seen.append((self.best_model_path, self.state_dict()["best_model_path"], there))
            return plan

    callback = Watching(dirpath=tmp_path)
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.epoch(val_loss=1.0)
    trainer.epoch(val_loss=1.0)
    first, second = str(tmp_path / "epoch=0-step=6.ckpt"), str(tmp_path / "epoch=1-step=12.ckpt")
    assert seen == [("", first, []), (first, second, ["epoch=0-step=6.ckpt"])]
    assert files(tmp_path) == ["epoch=1-step=12.ckpt"]


def test_loggers_hear_of_it_before_anything_is_deleted(tmp_path: Path) -> None:
    heard: list[tuple[str, list[str]]] = []

    class Listening:
        save_dir, name, version = str(tmp_path), "runs", 3

        def after_save_checkpoint(self, callback: ModelCheckpoint) -> None:
            heard.append((os.path.basename(callback.best_model_path), files(callback.dirpath or "")))

    callback = ModelCheckpoint()
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.loggers = [Listening()]
    trainer.start()
    trainer.epoch(val_loss=1.0)
    trainer.epoch(val_loss=1.0)
    assert callback.dirpath == str(tmp_path / "runs" / "version_3" / "checkpoints")
    assert heard == [
        ("epoch=0-step=6.ckpt", ["epoch=0-step=6.ckpt"]),
        ("epoch=1-step=12.ckpt", ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt"]),
    ]


def test_without_a_logger_it_saves_in_the_root_directory(tmp_path: Path) -> None:
    callback = ModelCheckpoint()
    FakeTrainer(str(tmp_path), callback).start()
    assert callback.dirpath == str(tmp_path / "checkpoints")


def test_what_a_save_says(tmp_path: Path, said: list[str]) -> None:
    run(tmp_path, [0.31, 0.29, 0.3, 0.4], monitor="val_loss", save_top_k=2, save_last=True)
    sizes = [line.split("  ")[2] for line in said[1:]]
    assert all(" kB in " in size for size in sizes)
    texts = [
        line.replace(size, "SIZE").replace("(also last.ckpt)", "(+last)")
        for line, size in zip(said[1:], sizes, strict=True)
    ]
    assert said[0] == f"checkpoints go to {tmp_path}"
    assert texts == [
        "saved epoch=0-step=6.ckpt (+last)  step 6  SIZE  val_loss 0.31 (best; 1 of 2 kept)",
        "saved epoch=1-step=12.ckpt (+last)  step 12  SIZE  val_loss 0.31 -> 0.29 (best; 2 of 2 kept)",
        (
            "saved epoch=2-step=18.ckpt (+last)  step 18  SIZE  val_loss 0.3 (best 0.29; 2 of 2 kept)  "
            "deleted epoch=0-step=6.ckpt"
        ),
        "saved last.ckpt  step 24  SIZE  val_loss 0.4 (best 0.29; not among the 2 kept)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"save_top_k": -2},
            "ModelCheckpoint(save_top_k=-2) means nothing: -1 keeps all, 0 none, k the best k.",
        ),
        (
            {"save_top_k": 3},
            (
                "ModelCheckpoint(save_top_k=3) has nothing to rank by: give monitor=, the name of a logged "
                "value, or save_top_k=-1 to keep all, 0 none, 1 the newest."
            ),
        ),
        ({"mode": "auto"}, "ModelCheckpoint(mode='auto') must be 'min' or 'max'."),
        ({"on_error": "pass"}, "ModelCheckpoint(on_error='pass') must be 'raise', 'warn' or 'retry'."),
        ({"save_last": "x"}, "ModelCheckpoint(save_last='x') must be True, False, None or 'link'."),
        (
            {"dirpath": "s3://bucket/x"},
            (
                "ModelCheckpoint(dirpath='s3://bucket/x') is not a local directory: give one, and copy what "
                "is in it."
            ),
        ),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelCheckpoint(**arguments)
    assert str(caught.value) == message


def test_state_key_and_state_are_lightnings() -> None:
    interval = timedelta(seconds=3)
    for arguments in (
        {},
        {"monitor": "a", "mode": "max"},
        {"every_n_train_steps": 5},
        {"train_time_interval": interval},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            callbacks = pytest.importorskip("lightning.pytorch.callbacks")
        ours, theirs = ModelCheckpoint(**arguments), callbacks.ModelCheckpoint(**arguments)
        assert ours.state_key == theirs.state_key
        assert set(theirs.state_dict()) <= set(ours.state_dict())


def test_format_checkpoint_name_and_to_yaml(tmp_path: Path) -> None:
    callback = run(tmp_path, [0.5], monitor="val_loss")
    name = callback.format_checkpoint_name({"epoch": 1, "step": 2}, ver=1, prefix="p")
    assert name == str(tmp_path / "p-epoch=1-step=2-v1.ckpt")
    callback.to_yaml()
    written = yaml.safe_load((tmp_path / "best_k_models.yaml").read_text())
    assert written == {str(tmp_path / "epoch=0-step=6.ckpt"): 0.5}


def test_to_yaml_on_a_full_disk_leaves_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    callback = run(tmp_path, [0.5], monitor="val_loss")
    callback.to_yaml()
    path = tmp_path / "best_k_models.yaml"
    before = path.read_bytes()
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match="^Could not write .* is untouched"),
    ):
        patch.setattr(os, "write", full)
        callback.to_yaml()
    assert path.read_bytes() == before and len(list(tmp_path.glob(".*"))) == 0


def test_check_monitor_top_k(tmp_path: Path) -> None:
    callback = run(tmp_path, [0.5], monitor="val_loss")
    trainer: Any = FakeTrainer(str(tmp_path), callback)
    assert callback.check_monitor_top_k(trainer, torch.tensor(0.4))
    assert not callback.check_monitor_top_k(trainer, torch.tensor(0.5))
    assert not callback.check_monitor_top_k(trainer, None)
