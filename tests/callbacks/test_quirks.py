"""What hurts people in Lightning's ModelCheckpoint, done right: a test for each, on real runs and files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.checkpoint.load import load
from tests.training.toys import Toy, checkpoints, rows, trainer

# The values to come are a hyperparameter, and a run that goes on further has more of them.
MORE_VALUES = pytest.mark.filterwarnings("ignore:.* was saved by a run with other settings")


class Scored(Toy):
    """Logs ``val_loss``, and with ``also`` under that name too: the value of the epoch, wherever it is asked."""

    def __init__(self, values: list[float], also: str = "val/loss") -> None:
        super().__init__()
        self.values, self.also = values, also

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.values[self.current_epoch])
        self.log(self.also, self.values[self.current_epoch])


def fit(values: list[float], *callbacks: Callback, ckpt_path: Any = None, **arguments: Any) -> pl.Trainer:
    """Train one epoch of 3 steps for each value."""
    run = trainer(callbacks=list(callbacks), **{"max_epochs": len(values), **arguments})
    run.fit(Scored(values), rows(), rows(4), ckpt_path=ckpt_path)
    return run


def steps(directory: Path) -> dict[str, int]:
    """The global step that each checkpoint in a directory holds."""
    return {name: load(directory / name)["global_step"] for name in checkpoints(directory)}


def test_last_is_the_newest_save(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    fit([1.0, 2.0, 3.0], callback)
    assert steps(tmp_path) == {"epoch=0-step=3.ckpt": 3, "last.ckpt": 9}
    assert callback.last_model_path == str(tmp_path / "last.ckpt")
    assert callback.best_model_path == str(tmp_path / "epoch=0-step=3.ckpt")


@MORE_VALUES
def test_top_k_is_rebuilt_from_the_files_when_the_directory_was_moved(tmp_path: Path) -> None:
    fit([1.0, 3.0, 2.0], ModelCheckpoint(tmp_path / "a", monitor="val_loss", save_top_k=2))
    shutil.move(tmp_path / "a", tmp_path / "b")
    callback = ModelCheckpoint(tmp_path / "b", monitor="val_loss", save_top_k=2)
    fit([1.0, 3.0, 2.0, 1.5], callback, ckpt_path="last")
    assert steps(tmp_path / "b") == {"epoch=0-step=3.ckpt": 3, "epoch=3-step=12.ckpt": 12}
    assert callback.best_model_path == str(tmp_path / "b" / "epoch=0-step=3.ckpt")
    assert callback.best_model_score == torch.tensor(1.0)


@MORE_VALUES
def test_top_k_is_rebuilt_from_the_files_when_the_interval_changed(tmp_path: Path) -> None:
    fit([1.0, 3.0, 2.0], ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2))
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, every_n_train_steps=3)
    fit([1.0, 3.0, 2.0, 1.5], callback, ckpt_path="last")
    assert steps(tmp_path) == {"epoch=0-step=3.ckpt": 3, "epoch=3-step=12.ckpt": 12}
    assert callback.best_model_score == torch.tensor(1.0)


@MORE_VALUES
def test_top_k_is_rebuilt_from_the_files_when_callback_state_is_gone(tmp_path: Path) -> None:
    class Forgetful(Callback):
        """Leaves the states of all callbacks out of the files."""

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["callbacks"] = {}

    fit([1.0, 3.0, 2.0], Forgetful(), ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2))
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    fit([1.0, 3.0, 2.0, 1.5], callback, ckpt_path="last")
    assert steps(tmp_path) == {"epoch=0-step=3.ckpt": 3, "epoch=3-step=12.ckpt": 12}
    assert callback.best_model_score == torch.tensor(1.0)


def test_a_monitored_value_is_fresh_or_not_used(tmp_path: Path) -> None:
    # Steps 2 and 5 lie between validations, after which (at steps 3 and 6) there is a value to rank.
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_train_steps=2, save_top_k=-1)
    fit([1.0, 2.0], callback)
    assert steps(tmp_path) == {"epoch=0-step=3.ckpt": 3, "epoch=1-step=6.ckpt": 6}
    assert {Path(path).name: score.item() for path, score in callback.best_k_models.items()} == {
        "epoch=0-step=3.ckpt": 1.0,
        "epoch=1-step=6.ckpt": 2.0,
    }


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_never_ranks(tmp_path: Path, mode: str) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", mode=mode)
    with pytest.warns(UserWarning, match="NaN") as warned:
        fit([math.nan, 1.0, math.nan], callback)
    assert [str(one.message) for one in warned] == [
        "val_loss is NaN at step 3: a checkpoint with NaN never ranks above one with a number."
    ]
    assert steps(tmp_path) == {"epoch=1-step=6.ckpt": 6}
    assert callback.best_model_score == torch.tensor(1.0)


NEAREST = "Did you mean 'val_loss' or 'val/loss'? Logged so far: epoch, step, val/loss, val_loss."


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        (
            {"monitor": "val_los"},
            "ModelCheckpoint(monitor='val_los') has nothing to go by: no such value was logged. " + NEAREST,
        ),
        (
            {"filename": "{epoch}-{val_los:.2f}"},
            "ModelCheckpoint(filename='{epoch}-{val_los:.2f}') asks for 'val_los': no such value was logged. "
            + NEAREST,
        ),
    ],
)
@pytest.mark.parametrize(
    ("limits", "stopped_at"),
    [
        ({}, 3),
        ({"val_check_interval": 1, "max_steps": 2}, 2),  # a limit that cuts the first epoch short
        ({"check_val_every_n_epoch": 2}, 6),  # until then validation might log it
    ],
)
def test_an_unknown_key_is_an_error_at_the_first_chance_that_names_the_nearest_logged_names(
    tmp_path: Path, asks: dict[str, Any], message: str, limits: dict[str, Any], stopped_at: int
) -> None:
    callback = ModelCheckpoint(tmp_path, every_n_epochs=3, **asks)
    run = trainer(callbacks=callback, **{"max_epochs": 3, **limits})
    with pytest.raises(pl.ConfigError) as refused:
        run.fit(Scored([1.0] * 3), rows(), rows(4))
    assert str(refused.value) == message
    assert run.global_step == stopped_at
    assert checkpoints(tmp_path) == []


def test_an_unknown_key_is_said_when_training_ends_before_validation_could_log_it(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss")
    with pytest.warns(UserWarning, match="nothing to go by") as warned:
        trainer(callbacks=callback, max_steps=2).fit(Scored([1.0]), rows(), rows(4))
    assert [str(one.message) for one in warned] == [
        "ModelCheckpoint(monitor='val_loss') has nothing to go by: no such value was logged, and training "
        "ended before validation ran. Logged so far: epoch, step."
    ]


def test_an_unknown_key_in_the_name_of_last_is_an_error_too(tmp_path: Path) -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{val_los}-last"

    with pytest.raises(pl.ConfigError) as refused:
        fit([1.0], Named(tmp_path, save_last=True))
    assert str(refused.value) == (
        "Named.CHECKPOINT_NAME_LAST = '{val_los}-last' asks for 'val_los': no such value was logged. "
        + NEAREST
    )


def test_a_format_that_fits_no_number_is_an_error_before_anything_runs() -> None:
    with pytest.raises(pl.ConfigError) as refused:
        ModelCheckpoint(filename="{epoch}-{val_loss:.2q}")
    assert str(refused.value) == (
        "The file name '{epoch}-{val_loss:.2q}' wants 'val_loss' as '.2q', which fits no number."
    )


def test_a_slash_in_a_metrics_name_makes_no_subdirectory(tmp_path: Path) -> None:
    fit([0.5], ModelCheckpoint(tmp_path, monitor="val/loss", filename="{epoch}-{val/loss:.2f}"))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-val_loss=0.50.ckpt"]


@MORE_VALUES
def test_the_file_that_was_resumed_from_and_others_are_never_deleted(tmp_path: Path) -> None:
    fit([3.0], ModelCheckpoint(tmp_path / "a", monitor="val_loss"))
    origin = tmp_path / "a" / "epoch=0-step=3.ckpt"
    fit([3.0, 2.0, 1.0], ModelCheckpoint(tmp_path / "a", monitor="val_loss"), ckpt_path=origin)
    assert checkpoints(tmp_path / "a") == ["epoch=0-step=3.ckpt", "epoch=2-step=9.ckpt"]
    fit([3.0, 2.0, 1.0, 0.5], ModelCheckpoint(tmp_path / "b", monitor="val_loss"), ckpt_path="auto")
    assert checkpoints(tmp_path / "a") == ["epoch=0-step=3.ckpt", "epoch=2-step=9.ckpt"]


def test_all_files_stay_when_one_callback_serves_two_trainings(tmp_path: Path) -> None:
    """With save_top_k=-1; the first training's are there to stay under their names."""
    callback = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit([1.0, 1.0], callback)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fit([1.0, 1.0], callback)
    assert steps(tmp_path) == {
        "epoch=0-step=3.ckpt": 3,
        "epoch=0-step=3-v1.ckpt": 3,
        "epoch=1-step=6.ckpt": 6,
        "epoch=1-step=6-v1.ckpt": 6,
    }
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_first_save_at_the_step_of_the_training_before_is_not_left_out(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "a", monitor="val_loss", save_top_k=-1)
    fit([1.0], callback)
    fit([2.0], callback)
    assert [score.item() for score in callback.best_k_models.values()] == [1.0, 2.0]


@MORE_VALUES
def test_a_run_in_which_nothing_came_due_leaves_last_and_goes_on_from_it_exactly(tmp_path: Path) -> None:
    def train(epochs: int, name: str) -> Scored:
        torch.manual_seed(1)
        callback = ModelCheckpoint(tmp_path / name, every_n_epochs=9, save_last=True)
        module = Scored([1.0] * epochs)
        run = trainer(callbacks=callback, max_epochs=epochs)
        run.fit(module, rows(shuffle=True), rows(4), ckpt_path="auto")
        return module

    straight = train(4, "straight")
    train(2, "broken")
    assert steps(tmp_path / "broken") == {"last.ckpt": 6}
    resumed = train(4, "broken")
    assert resumed.seen == straight.seen[24:]
    assert torch.equal(resumed.layer.weight, straight.layer.weight)


@MORE_VALUES
def test_last_is_saved_at_each_end_of_a_run_that_was_made_longer(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)
    fit([1.0], callback)
    assert steps(tmp_path) == {"last.ckpt": 3}
    again = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)
    fit([1.0, 1.0], again, ckpt_path="last")
    assert steps(tmp_path) == {"last.ckpt": 6}


def test_a_monitor_of_validation_that_is_switched_off_is_a_warning(tmp_path: Path) -> None:
    class Logging(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    run = trainer(limit_val_batches=0, callbacks=[ModelCheckpoint(tmp_path, monitor="val_loss")])
    with pytest.warns(UserWarning, match="val_loss"):
        run.fit(Logging(), rows(), rows())
    assert run.global_step == 3
