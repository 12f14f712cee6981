"""A run that is killed and resumed ends with the checkpoints of a run that never stopped."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.callbacks import ModelCheckpoint

from .fake_trainer import FakeTrainer, Killed, comparable, files, newest, steps_of

pytestmark = pytest.mark.filterwarnings("ignore:.*NaN never ranks")


def train(
    root: str,
    values: list[float],
    arguments: dict[str, Any],
    *,
    resume: str | None = None,
    kill: int = 0,
    between_names: bool = False,
) -> ModelCheckpoint:
    """Train from the start or from ``resume`` to the end, or until the save at step ``kill`` is durable."""
    callback = ModelCheckpoint(dirpath=os.path.join(root, "ckpt"), monitor="val_loss", **arguments)
    trainer = FakeTrainer(root, callback)
    trainer.start(resume, automatically=True)
    trainer.kill_before_commit_of_step, trainer.kill_between_names = kill, between_names
    while trainer.current_epoch < len(values):
        trainer.epoch(val_loss=values[trainer.current_epoch])
    return callback


scores = st.one_of(st.integers(0, 4).map(float), st.just(math.nan), st.just(math.inf))


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(scores, min_size=2, max_size=6),
    k=st.sampled_from([-1, 1, 2, 3]),
    save_last=st.booleans(),
    mode=st.sampled_from(["min", "max"]),
    filename=st.sampled_from([None, "best", "{epoch}-{val_loss:.1f}"]),
    kills=st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=3),
)
@example(
    values=[3.0, 2.0, 1.0], k=1, save_last=True, mode="min", filename=None, kills=[(2, False)]
)  # killed between the commit and the deletion
@example(
    values=[3.0, 2.0, 1.0], k=2, save_last=False, mode="min", filename="best", kills=[(2, False), (3, True)]
)
def test_killed_after_a_file_is_durable_any_number_of_times(
    values: list[float],
    k: int,
    save_last: bool,
    mode: str,
    filename: str | None,
    kills: list[tuple[int, bool]],
) -> None:
    arguments = {"save_top_k": k, "save_last": save_last, "mode": mode, "filename": filename}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        straight = train(one, values, arguments)
        directory = os.path.join(other, "ckpt")
        for epoch, between_names in kills:
            try:
                resume = newest(directory) if files(directory) else None
                train(other, values, arguments, resume=resume, kill=6 * epoch, between_names=between_names)
            except Killed:
                continue
        # The last life goes to the end, if none before it has.
        broken = train(other, values, arguments, resume=newest(directory) if files(directory) else None)
        assert steps_of(directory) == steps_of(os.path.join(one, "ckpt"))
        assert comparable(broken.state_dict(), other) == comparable(straight.state_dict(), one)


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(scores, min_size=3, max_size=6),
    k=st.sampled_from([1, 2, 3]),
    save_last=st.booleans(),
    filename=st.sampled_from([None, "best", "{epoch}-{val_loss:.1f}"]),
    back=st.integers(0, 5),
)
def test_sent_back_to_an_earlier_checkpoint_in_the_same_directory(
    values: list[float], k: int, save_last: bool, filename: str | None, back: int
) -> None:
    arguments = {"save_top_k": k, "save_last": save_last, "filename": filename}
    with tempfile.TemporaryDirectory() as root:
        straight = train(root, values, arguments)
        directory = os.path.join(root, "ckpt")
        resume = os.path.join(directory, files(directory)[back % len(files(directory))])
        again = train(root, values, arguments, resume=resume)
        found = steps_of(directory)
        # What was evicted before the kill is gone, so the best of the past may be fewer; none may be wrong.
        for path, score in again.best_k_models.items():
            step = found[os.path.basename(path)]
            assert repr(values[step // 6 - 1]) == repr(score.item())
        assert set(found) == {os.path.basename(path) for path in again._view().paths()}
        if straight.best_model_path:
            assert repr(again.best_model_score.item()) == repr(straight.best_model_score.item())  # type: ignore[union-attr]


def start(root: Path, callback: ModelCheckpoint, resume: str, *, automatically: bool = False) -> FakeTrainer:
    trainer = FakeTrainer(str(root), callback)
    trainer.start(resume, automatically=automatically)
    return trainer


def first_life(root: Path, values: list[float], **arguments: Any) -> ModelCheckpoint:
    arguments = {"dirpath": root / "a", "monitor": "val_loss", "save_top_k": 2, **arguments}
    callback = ModelCheckpoint(**arguments)
    trainer = FakeTrainer(str(root), callback)
    trainer.start()
    for value in values:
        trainer.epoch(val_loss=value)
    return callback


def test_a_moved_directory_keeps_its_best(tmp_path: Path) -> None:
    first_life(tmp_path, [1.0, 3.0, 2.0], save_last=True)
    shutil.move(tmp_path / "a", tmp_path / "b")
    callback = ModelCheckpoint(dirpath=tmp_path / "b", monitor="val_loss", save_top_k=2, save_last=True)
    trainer = start(tmp_path, callback, str(tmp_path / "b" / "last.ckpt"), automatically=True)
    assert callback.best_model_path == str(tmp_path / "b" / "epoch=0-step=6.ckpt")
    assert callback.last_model_path == str(tmp_path / "b" / "last.ckpt")
    trainer.epoch(val_loss=1.5)
    assert steps_of(tmp_path / "b") == {
        "epoch=0-step=6.ckpt": 6,
        "epoch=3-step=24.ckpt": 24,
        "last.ckpt": 24,
    }


def test_in_a_copied_directory_the_files_of_the_original_take_no_place_among_the_best(tmp_path: Path) -> None:
    first_life(tmp_path, [1.0, 3.0, 2.0], save_last=True)
    (tmp_path / "a" / "epoch=2-step=18.ckpt").unlink()  # so that the best are made again from the files
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    callback = ModelCheckpoint(dirpath=tmp_path / "b", monitor="val_loss", save_top_k=2, save_last=True)
    trainer = start(tmp_path, callback, str(tmp_path / "b" / "last.ckpt"), automatically=True)
    trainer.epoch(val_loss=1.5)
    assert steps_of(tmp_path / "b") == {
        "epoch=0-step=6.ckpt": 6,
        "epoch=3-step=24.ckpt": 24,
        "last.ckpt": 24,
    }
    assert steps_of(tmp_path / "a") == {"epoch=0-step=6.ckpt": 6, "last.ckpt": 18}


def test_a_changed_interval_keeps_the_best(tmp_path: Path) -> None:
    first_life(tmp_path, [1.0, 3.0, 2.0])
    callback = ModelCheckpoint(
        dirpath=tmp_path / "a", monitor="val_loss", save_top_k=2, every_n_train_steps=6
    )
    trainer = start(tmp_path, callback, newest(tmp_path / "a"), automatically=True)
    assert callback.best_model_score == torch.tensor(1.0)
    trainer.batches(6)
    trainer.validate(val_loss=1.5)
    trainer.safe_point()
    assert steps_of(tmp_path / "a") == {"epoch=0-step=6.ckpt": 6, "epoch=3-step=24.ckpt": 24}


def test_without_its_state_the_best_are_made_again_from_the_files(tmp_path: Path) -> None:
    before = first_life(tmp_path, [1.0, 3.0, 2.0], save_last=True)
    callback = ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss", save_top_k=2, save_last=True)
    trainer = FakeTrainer(str(tmp_path), callback)
    for one in trainer.checkpoint_callbacks:
        one.setup(trainer, None, "fit")  # type: ignore[arg-type]
    trainer.resumed_from, trainer.global_step, trainer.current_epoch = before.last_model_path, 18, 3
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert callback.best_k_models == before.best_k_models
    assert callback.best_model_path == before.best_model_path
    trainer.resumed_automatically = True
    trainer.epoch(val_loss=0.5)
    assert steps_of(tmp_path / "a") == {
        "epoch=0-step=6.ckpt": 6,
        "epoch=3-step=24.ckpt": 24,
        "last.ckpt": 24,
    }


def test_a_missing_file_is_replaced_by_the_next_best_there_is(tmp_path: Path) -> None:
    first_life(tmp_path, [1.0, 3.0, 2.0], save_top_k=3)
    (tmp_path / "a" / "epoch=0-step=6.ckpt").unlink()
    callback = ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss", save_top_k=3)
    start(tmp_path, callback, newest(tmp_path / "a"))
    assert callback.best_model_path == str(tmp_path / "a" / "epoch=2-step=18.ckpt")
    assert [os.path.basename(path) for path in callback.best_k_models] == [
        "epoch=1-step=12.ckpt",
        "epoch=2-step=18.ckpt",
    ]


def test_the_file_that_the_user_resumed_from_is_never_deleted(tmp_path: Path) -> None:
    first_life(tmp_path, [3.0], save_top_k=1)
    origin = newest(tmp_path / "a")
    callback = ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss", save_top_k=1)
    trainer = start(tmp_path, callback, origin)
    trainer.epoch(val_loss=2.0)
    trainer.epoch(val_loss=1.0)
    assert files(tmp_path / "a") == ["epoch=0-step=6.ckpt", "epoch=2-step=18.ckpt"]


def test_the_file_that_the_user_resumed_from_is_never_overwritten_by_another(tmp_path: Path) -> None:
    first_life(tmp_path, [3.0], save_top_k=1, filename="best")
    origin = newest(tmp_path / "a")
    callback = ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss", save_top_k=1, filename="best")
    start(tmp_path, callback, origin).epoch(val_loss=2.0)
    assert steps_of(tmp_path / "a") == {"best.ckpt": 6, "best-v1.ckpt": 12}


def test_resumed_into_another_directory_nothing_of_the_old_one_is_deleted(tmp_path: Path) -> None:
    first_life(tmp_path, [3.0, 2.0])
    callback = ModelCheckpoint(dirpath=tmp_path / "b", monitor="val_loss", save_top_k=1)
    trainer = start(tmp_path, callback, newest(tmp_path / "a"), automatically=True)
    assert callback.best_model_path == str(tmp_path / "a" / "epoch=1-step=12.ckpt")
    trainer.epoch(val_loss=1.0)
    trainer.epoch(val_loss=0.5)
    assert files(tmp_path / "a") == ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt"]
    assert files(tmp_path / "b") == ["epoch=3-step=24.ckpt"]


def test_the_abandoned_future_stays_until_the_run_has_caught_up(tmp_path: Path) -> None:
    first_life(tmp_path, [3.0, 2.0, 1.0], save_top_k=-1, filename="{epoch}-{val_loss}")
    future = tmp_path / "a" / "epoch=2-val_loss=1.0.ckpt"
    callback = ModelCheckpoint(
        dirpath=tmp_path / "a", monitor="val_loss", save_top_k=1, filename="{epoch}-{val_loss}"
    )
    trainer = start(tmp_path, callback, str(tmp_path / "a" / "epoch=0-val_loss=3.0.ckpt"))
    trainer.epoch(val_loss=1.5)
    assert future.exists()
    assert os.path.basename(callback.best_model_path) == "epoch=1-val_loss=1.5.ckpt"
    trainer.epoch(val_loss=1.25)
    assert files(tmp_path / "a") == ["epoch=0-val_loss=3.0.ckpt", "epoch=2-val_loss=1.25.ckpt"]


def test_last_does_not_drift_over_restarts(tmp_path: Path) -> None:
    first_life(tmp_path, [3.0], save_last=True)
    for _ in range(3):
        callback = ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss", save_top_k=2, save_last=True)
        start(tmp_path, callback, newest(tmp_path / "a"), automatically=True).epoch(val_loss=9.0)
    assert "last.ckpt" in files(tmp_path / "a")
    assert not [name for name in files(tmp_path / "a") if name.startswith("last-v")]


def test_a_directory_in_the_place_of_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    callback = first_life(tmp_path, [3.0], save_top_k=1)
    path = Path(callback.best_model_path)
    path.unlink()
    path.mkdir()
    trainer = FakeTrainer(str(tmp_path), callback)
    trainer.start()
    trainer.global_step, trainer.current_epoch = 6, 1
    trainer.epoch(val_loss=1.0)
    assert path.is_dir()


def test_a_deferred_save_survives_a_kill(tmp_path: Path) -> None:
    def new() -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=tmp_path / "a", monitor="val_loss", every_n_train_steps=4, save_last=True, save_top_k=2
        )

    trainer = FakeTrainer(str(tmp_path), new())
    trainer.start()
    trainer.batches(4)
    callback = new()
    trainer = start(tmp_path, callback, newest(tmp_path / "a"), automatically=True)
    trainer.current_epoch = 0
    trainer.batches(2)
    trainer.validate(val_loss=1.0)
    trainer.safe_point()
    assert steps_of(tmp_path / "a") == {"epoch=0-step=6.ckpt": 6, "last.ckpt": 6}
