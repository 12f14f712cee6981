"""The file that a signal makes a run save is the one that any other save at that point would be.

Each case is trained whole; then a signal stops it in a hook. The file that it leaves is compared, all of it, with
the one that the whole run saved at the same safe point, and the run that goes on from it with the rest of the whole.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.checkpoint.load import load
from holdfast.training.preemption import Preempted
from holdfast.training.run import WATCHERS

from .cases import Case
from .harness import Outcome, assert_continues, first_difference, run, without_incidentals

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")

RANDOM = {"dropout": True, "batch_norm": True, "augment": ("torch", "numpy", "random")}

CASES = {
    "everything random": Case(**RANDOM, optimizer="adam", own_generator=True, validation="drawing"),
    "accumulation over 3": Case(validation="plain", trainer={"accumulate_grad_batches": 3}),
    "16-mixed, clipped and accumulated": Case(
        validation="plain",
        trainer={"precision": "16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 3},
    ),
    "manual optimization": Case(manual=True, validation="plain", **RANDOM),
    "data without a length": Case(iterable=True, validation="plain", augment=("torch",)),
    "validation within the epoch": Case(
        validation="drawing", trainer={"val_check_interval": 3}, scheduler="plateau"
    ),
    "early stopping and the best": Case(validation="shuffled", early_stopping=True, best_k=2),
    "a limit within the epoch": Case(validation="plain", trainer={"max_steps": 11}),
}

# A hook, and which call of it in a run of 2 epochs of 8 batches (the sanity check's not counted).
MOMENTS = [
    ("on_train_batch_start", 1),
    ("on_before_backward", 2),
    ("on_train_batch_start", 8),
    ("on_validation_batch_start", 2),
    ("on_validation_end", 1),
    ("on_train_epoch_end", 1),
    ("on_train_epoch_start", 2),
    ("on_train_batch_end", 11),
]


def sender(hook: str, count: int) -> Any:
    """A callback that sends SIGTERM in one call of a hook."""
    calls: list[int] = []

    def called(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGTERM)

    return type("Sender", (holdfast.Callback,), {hook: called})()


def stop(case: Case, root: Path, hook: str, count: int) -> Path:
    """Train ``case`` until the signal has stopped it; returns the file that it left."""
    token = WATCHERS.set((sender(hook, count),))
    try:
        with pytest.raises(Preempted):
            run(case, root, save=False)
    finally:
        WATCHERS.reset(token)
    (path,) = root.rglob("stopped.ckpt")
    return path


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path]]:
    """The runs that nobody stops, each trained when it is needed first."""
    return {}


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]} {moment[1]}")
@pytest.mark.parametrize("name", CASES)
def test_goes_on_exactly(
    tmp_path: Path,
    name: str,
    moment: tuple[str, int],
    wholes: dict[str, tuple[Outcome, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    case = CASES[name]
    if name not in wholes:
        root = tmp_path_factory.mktemp("whole")
        wholes[name] = run(case, root), root
    whole, root = wholes[name]
    path = stop(case, tmp_path / "stopped", *moment)
    left, number = load(path), load(path)["callbacks"]["SaveEverywhere"]["count"]
    expected = without_incidentals(load(whole.files[number]), root)
    assert first_difference(expected, without_incidentals(left, tmp_path / "stopped")) is None
    assert_continues(whole, run(case, tmp_path / "stopped", path, save=False), number)
