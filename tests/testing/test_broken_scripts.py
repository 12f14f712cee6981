"""A script that does not resume exactly fails, and the message names what parts first and what usually makes it.

All are stopped behind their second batch and go on at the third.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.testing import assert_exact_resume

from . import scripts
from .scripts import loader, script

GOES_ON = (
    "The run was stopped by an exception in on_train_batch_end of epoch {0} (stop 1 of 1), and went on from "
    "lightning_logs/version_0/checkpoints/stopped-by-test.ckpt at epoch {0}.\n"
)
ATTRIBUTE = (
    "a plain attribute of the module or of a callback, which has to become a buffer, or be saved by "
    "on_save_checkpoint, state_dict and the like"
)
STEP = (
    "The usual cause: the same batch and the same random numbers gave another step, so training_step, a hook or "
    f"a callback uses something that is not in the checkpoint: {ATTRIBUTE}; random numbers from elsewhere than "
    "torch, NumPy and Python; or an operation that is not deterministic, which Trainer(deterministic=True) "
    "finds."
)
VALUE = (
    f"The usual cause: it was computed from something that is not in the checkpoint: {ATTRIBUTE}; or log a "
    "TorchMetrics object. A value that measures time cannot be equal: name it in ignore=."
)
NOT_REPEATABLE = (
    "Nothing was stopped yet. Seed the script, and look for what depends on the time, on the process, on the "
    "order of a set, or on what was there before; operations that are not deterministic are found by "
    "Trainer(deterministic=True)."
)


def message(train: Callable[[Path], Any], root: Path, at: int = 2, **arguments: Any) -> str:
    """What the assertion says."""
    with pytest.raises(AssertionError) as raised:
        assert_exact_resume(train, root, at=[at], **arguments)
    return str(raised.value)


def parted(where: str, what: str, also: str = "", at: str = "0, batch 2") -> str:
    """The first lines of a message."""
    return (
        f"The stopped run is not the run that never stopped. They part at {where}:\n{what}\n"
        + (f"There, too: {also}.\n" if also else "")
        + GOES_ON.format(at)
    )


def test_an_order_that_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    """The run has found that out by itself and said it: so it is part of the message."""
    train = script(module=scripts.OnIds, train=lambda: loader(sampler=scripts.Rotating()))
    with pytest.warns(UserWarning, match="Once resumed, this run is not bit for bit") as warned:
        said = message(train, tmp_path, at=6)
    reasons = "".join(str(warned[0].message).partition("\n")[1:])
    assert said == parted(
        "epoch 1, batch 2 (global step 7)",
        "  rows: [10, 11, 12, 13] in the run that never stopped, [9, 10, 11, 12] in the stopped one",
        "2 parts of the batch, 1 parameter",
        at="1, batch 2",
    ) + (
        "The usual cause: the order comes from something that is not in the checkpoint. holdfast restores the "
        "generators, torch's samplers, and what a sampler of your own gives in state_dict and takes in "
        "load_state_dict: give it these two, or make the order depend on nothing but set_epoch(epoch) and "
        "torch's global generator.\n"
        f"The run itself says what cannot be exact in it:{reasons}"
    )


def test_an_order_that_no_two_runs_have_in_common(tmp_path: Path) -> None:
    """As one from the time or from the system's entropy."""
    starts = itertools.count()

    def order() -> list[int]:
        start = next(starts)
        return [(start + index) % scripts.ROWS for index in range(scripts.ROWS)]

    train = script(module=scripts.Plain, train=lambda: loader(sampler=order()))
    assert message(train, tmp_path) == (
        "The script does not do the same when it is run twice. The two runs part at epoch 0, batch 0 "
        "(global step 1):\n"
        "  rows: [0, 1, 2, 3] in the run that never stopped, [1, 2, 3, 4] in the stopped one\n"
        "There, too: 2 parts of the batch.\n"
        f"{NOT_REPEATABLE}"
    )


def test_a_dataset_with_a_generator_of_its_own(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, train=lambda: loader(scripts.OwnGenerator()))
    assert message(train, tmp_path) == parted(
        "epoch 0, batch 2 (global step 3)", "  batch[0]: 12 of 12 values differ, by 8 at most"
    ) + (
        "The usual cause: the dataset or its collate function draws random numbers from where no checkpoint "
        "reaches, or depends on what was loaded before. Draw from the global generator of torch, NumPy or "
        "Python: each batch has a seed of its own there, whichever process loads it."
    )


def test_an_iterable_that_gives_other_rows(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, train=scripts.feed)
    assert message(train, tmp_path, at=6) == parted(
        "epoch 1, batch 2 (global step 7)", "  batch: 2 of 2 values differ, by 4 at most", at="1, batch 2"
    ) + (
        "The usual cause: the loader does not give the same batches again. One with state_dict and "
        "load_state_dict is put back to its state; any other iterable is read again from the epoch's start, and "
        "has to give the same rows, made into the same batches, each time."
    )


def test_a_counter_that_the_step_depends_on(tmp_path: Path) -> None:
    assert (
        message(script(module=scripts.Counts), tmp_path)
        == parted(
            "epoch 0, batch 2 (global step 3)", "  parameter weight: 2 of 2 values differ, by 2 at most"
        )
        + STEP
    )


def test_what_is_logged_comes_before_what_it_did(tmp_path: Path) -> None:
    assert (
        message(script(module=scripts.LoudCounts), tmp_path)
        == parted(
            "epoch 0, batch 2 (global step 3)",
            "  logged value loss: -18.0 in the run that never stopped, -6.0 in the stopped one",
            "1 parameter",
        )
        + STEP
    )


def test_a_generator_that_the_step_draws_from(tmp_path: Path) -> None:
    assert (
        message(script(module=scripts.OwnNoise), tmp_path)
        == parted(
            "epoch 0, batch 2 (global step 3)", "  parameter weight: 2 of 2 values differ, by 10 at most"
        )
        + STEP
    )


def test_a_metric_that_is_not_restored(tmp_path: Path) -> None:
    train = script(module=scripts.Average, train=loader)
    assert (
        message(train, tmp_path)
        == parted(
            "the end of epoch 0 (global step 4)",
            "  logged value mean_id: 30.0 in the run that never stopped, 46.0 in the stopped one",
        )
        + VALUE
    )


def test_a_callback_that_changes_weights(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, callbacks=lambda: [scripts.Halves()])
    assert (
        message(train, tmp_path)
        == parted(
            "epoch 0, batch 2 (global step 3)", "  parameter weight: 2 of 2 values differ, by 1.5 at most"
        )
        + STEP
    )


def test_draws_that_are_made_at_some_starts_only(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, callbacks=lambda: [scripts.Draws()])
    assert message(train, tmp_path) == parted(
        "epoch 0, batch 2 (global step 3)", "  the generator of torch is not in the same state"
    ) + (
        "The usual cause: something drew random numbers in one of the runs only: code that runs at every start "
        "and not in the middle of a run, or a hook that depends on the time or on an attribute that is not "
        "saved."
    )


def test_a_generator_comes_before_what_was_drawn_from_it(tmp_path: Path) -> None:
    train = script(module=scripts.Shaken, callbacks=lambda: [scripts.Draws()])
    assert message(train, tmp_path).startswith(
        parted(
            "epoch 0, batch 2 (global step 3)",
            "  the generator of torch is not in the same state",
            "1 logged value",
        )
    )


def test_a_run_that_ends_elsewhere(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, callbacks=lambda: [scripts.Impatient()])
    assert message(train, tmp_path) == parted(
        "epoch 1, batch 1 (global step 6)",
        "  next comes the end of epoch 1 (global step 5) in the run that never stopped, epoch 1, batch 1 "
        "(global step 6) in the stopped one",
    ) + (
        "The usual cause: what decides when to validate, to stop early or to end an epoch depends on something "
        f"that is not in the checkpoint: the time, or {ATTRIBUTE}."
    )


def test_a_callback_that_does_not_take_its_state_back(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, callbacks=lambda: [scripts.Forgets()])
    assert (
        message(train, tmp_path)
        == parted(
            "epoch 0, batch 2 (global step 3)",
            "  value of a callback Forgets.batches: 3 in the run that never stopped, 1 in the stopped one",
        )
        + "The usual cause: the callback's state_dict and load_state_dict do not bring everything back."
    )


def test_a_value_that_no_two_runs_have_in_common_can_be_named(tmp_path: Path) -> None:
    train = script(module=scripts.Clock)
    assert (
        message(train, tmp_path / "first")
        == parted(
            "epoch 0, batch 2 (global step 3)",
            "  logged value time/ticks: 3.0 in the run that never stopped, 1.0 in the stopped one",
        )
        + VALUE
    )
    assert assert_exact_resume(train, tmp_path / "second", at=[2], ignore=["time/*"]).batches == 8


def test_rows_of_a_log(tmp_path: Path) -> None:
    assert message(script(module=scripts.Straight), tmp_path) == parted(
        "lightning_logs/version_0/metrics.csv",
        "  row 3: {'step': '3', 'ticks': '3'} in the run that never stopped, {'step': '3', 'ticks': '1'} in the "
        "stopped one",
    ) + (
        "The usual cause: a logger is given values or steps that depend on something that is not in the "
        "checkpoint."
    )


def test_several_fits_are_told_apart(tmp_path: Path) -> None:
    def train(root: Path) -> None:
        scripts.fit(root / "first", scripts.Plain(), max_epochs=1)
        scripts.fit(root / "second", scripts.Counts(), max_epochs=1)

    assert message(train, tmp_path, at=6).splitlines()[0] == (
        "The stopped run is not the run that never stopped. They part at fit 2 of 2, epoch 0, batch 2 (global "
        "step 3):"
    )


# -- nothing to go on from ----------------------------------------------------------------------------------


def test_a_script_that_does_not_go_on(tmp_path: Path) -> None:
    assert message(script(ckpt_path=None), tmp_path) == (
        "The run was stopped in on_train_batch_end of epoch 0, batch 2. When it was started again, it did not go "
        "on from a checkpoint, but from the start. Below root there were:\n"
        "  lightning_logs/version_0/checkpoints/stopped-by-test.ckpt, saved at step 2\n"
        'Does it call trainer.fit(..., ckpt_path="auto") on a trainer with default_root_dir=root?'
    )


def test_its_own_checkpoints_come_too_late(tmp_path: Path) -> None:
    assert message(script(), tmp_path, save=False) == (
        "The run was stopped in on_train_batch_end of epoch 0, batch 2. When it was started again, it did not go "
        "on from a checkpoint, but from the start. None was saved by then. Save more often, as "
        "ModelCheckpoint(every_n_train_steps=1) does, stop later (at=), or leave out save=False: then a "
        "checkpoint is saved at every stop."
    )


def test_its_own_checkpoints_are_enough(tmp_path: Path) -> None:
    proof = assert_exact_resume(script(), tmp_path, at=[6], save=False)
    assert proof.resumed_from == ("lightning_logs/version_0/checkpoints/epoch=0-step=4.ckpt",)
    assert proof.compared == 10  # the fifth and the sixth batch twice
