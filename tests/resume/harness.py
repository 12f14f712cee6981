"""Runs a case whole, resumes it from any file saved on the way, and says where the two first differ."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import holdfast
from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.checkpoint.load import load

from .cases import Case, module_class, target_callback, train_loader, val_loader
from .tape import Tape, bits, recording_callback, recording_logger, with_recorded_hooks

# When it happened, and the random name that a ModelCheckpoint gives to a run: the only things in a checkpoint
# that two equal runs may disagree on.
INCIDENTAL_KEYS = ("saved_at", "run")

REQUESTS = {
    "on_train_batch_end": "batch",
    "on_validation_end": "validation",
    "on_train_epoch_end": "epoch",
}


class SaveEverywhere(Checkpoint):
    """Asks for a save after every batch, validation and epoch; each saved file is one place to resume from.

    A resumed run has it too, without a directory: it decides the same and saves nothing, so that comparing
    the runs also shows that saving changes nothing.
    """

    def __init__(self, directory: Path | None, tape: Tape) -> None:
        self.directory = directory
        self.tape = tape
        self.count = 0
        self.reasons: list[str] = []
        self.files: dict[int, Path] = {}
        self.kinds: dict[int, str] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def ask(self, trainer: Any, reason: str) -> None:
        if not trainer.sanity_checking:
            self.reasons.append(reason)
            trainer.request_save(self)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.ask(trainer, "batch")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.ask(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ask(trainer, "epoch")

    def plan_save(self, trainer: Any) -> SavePlan | None:
        self.count += 1
        self.tape.record("safe point", self.count, tuple(self.reasons))
        self.kinds[self.count] = self.reasons[-1]
        self.reasons.clear()
        if self.directory is None:
            return None
        self.files[self.count] = self.directory / f"{self.count:03d}.ckpt"
        return SavePlan(names=(str(self.files[self.count]),))


@dataclass
class Outcome:
    """What a run left behind."""

    tape: Tape
    files: dict[int, Path]
    kinds: dict[int, str]
    payload: dict[str, Any]
    weights: dict[str, torch.Tensor]
    draws: tuple[Any, ...]

    def of_kind(self, kind: str) -> list[int]:
        """The numbers of the files that were saved for this reason, in order."""
        return [number for number in self.files if self.kinds[number] == kind]


def run(case: Case, root: Path, ckpt_path: Path | None = None, *, save: bool = True) -> Outcome:
    """Train ``case`` in ``root``, from the start or from ``ckpt_path``."""
    holdfast.seed_everything(1234)
    if ckpt_path is not None:  # what is not restored shall show: other weights, generators that moved on
        torch.rand(7), numpy.random.rand(7), random.random()
    tape = Tape()
    module = with_recorded_hooks(module_class(holdfast, case.extra), tape)(case, tape)
    saver = SaveEverywhere(root / "points" if save else None, tape)
    trainer = holdfast.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        logger=recording_logger(holdfast, tape),
        callbacks=[recording_callback(holdfast, tape), saver, *callbacks_of(case, root)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "log_every_n_steps": 1, **case.trainer},
    )
    trainer.fit(module, train_loader(case), val_loader(case), ckpt_path=ckpt_path)
    draws = (bits(torch.rand(3)), numpy.random.rand(3).tolist(), random.random())
    trainer.save_checkpoint(root / "final.ckpt")
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    payload = load(root / "final.ckpt")
    return Outcome(tape, saver.files, saver.kinds, without_incidentals(payload, root), weights, draws)


def callbacks_of(case: Case, root: Path) -> list[Any]:
    callbacks: list[Any] = []
    if case.target == "callback":
        callbacks.append(target_callback(holdfast))
    monitor = "loss_epoch" if case.validation is None else "val_loss"
    if case.early_stopping:
        stopping = holdfast.callbacks.EarlyStopping(monitor=monitor, patience=2, min_delta=0.01)
        callbacks.append(stopping)
    if case.best_k:
        best = holdfast.callbacks.ModelCheckpoint(
            dirpath=root / "best", monitor=monitor, save_top_k=case.best_k, save_last=True
        )
        callbacks.append(best)
    return callbacks


def without_incidentals(value: Any, root: Path) -> Any:
    """The same payload with the run's directory left out of its paths, and without the time of day."""
    if isinstance(value, dict):
        return {
            without_incidentals(key, root): without_incidentals(inner, root)
            for key, inner in value.items()
            if key not in INCIDENTAL_KEYS
        }
    if isinstance(value, (list, tuple)):
        return type(value)(without_incidentals(inner, root) for inner in value)
    if isinstance(value, (str, Path)):
        return str(value).replace(str(root), "<root>")
    return value


def first_difference(left: Any, right: Any, where: str = "") -> str | None:
    """Names the first place where two payloads are not bit for bit the same; None where they are."""
    if type(left) is not type(right):
        return f"{where}: {type(left).__name__} {left!r} and {type(right).__name__} {right!r}"
    if isinstance(left, dict):
        if list(left) != list(right):
            return f"{where}: keys {list(left)} and {list(right)}"
        pairs: Iterable[tuple[Any, Any, Any]] = ((key, left[key], right[key]) for key in left)
    elif isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return f"{where}: {len(left)} and {len(right)} items: {left!r} and {right!r}"
        pairs = ((index, *both) for index, both in enumerate(zip(left, right, strict=True)))
    elif isinstance(left, numpy.ndarray):
        return first_difference(torch.from_numpy(left), torch.from_numpy(right), where)
    elif isinstance(left, torch.Tensor):
        return None if bits(left) == bits(right) else f"{where}: {tensor_difference(left, right)}"
    elif isinstance(left, float):
        same = left == right or (math.isnan(left) and math.isnan(right))
        return None if same else f"{where}: {left!r} and {right!r}"
    else:
        return None if left == right else f"{where}: {left!r} and {right!r}"
    found = (first_difference(mine, theirs, f"{where}/{key}") for key, mine, theirs in pairs)
    return next(filter(None, found), None)


def tensor_difference(left: torch.Tensor, right: torch.Tensor) -> str:
    """How two tensors that are not the same differ."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return f"{left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
    apart = (left.double() - right.double()).abs()
    return f"{int((apart > 0).sum())} of {apart.numel()} values differ, by {float(apart.max()):.3g} at most"


def named(event: Any, hook: str) -> bool:
    return event[0] in ("callback", "module") and event[1] == hook


def rests(whole: Tape, number: int, resumed: Tape) -> tuple[list[Any], list[Any]]:
    """What is left of the whole run after it saved file ``number``, and what the run resumed from it did.

    The latter begins after on_train_start. A run that was finished when it was saved trains nothing, so it calls
    neither that hook nor on_train_end.
    """
    expected = events_after_save(whole, number)
    starts = [index for index, event in enumerate(resumed) if named(event, "on_train_start")]
    if starts:
        return expected, list(resumed[starts[-1] + 1 :])
    end = next(index for index, event in enumerate(resumed) if named(event, "on_fit_end"))
    return [event for event in expected if not named(event, "on_train_end")], list(resumed[end:])


def events_after_save(tape: Tape, number: int) -> list[Any]:
    """What the uninterrupted run did after it saved file ``number``."""
    point = next(index for index, event in enumerate(tape) if event[:2] == ("safe point", number))
    return list(tape[point + 1 :])


def tape_difference(expected: list[Any], seen: list[Any]) -> str | None:
    """Shows the first event that differs, with the events before it; None when the tapes are equal."""
    for index, (mine, theirs) in enumerate(zip(expected, seen)):
        if mine != theirs:
            before = "".join(f"\n    both   {event}" for event in expected[max(0, index - 4) : index])
            return f"event {index} after the resume:{before}\n    whole  {mine}\n    resume {theirs}"
    if len(expected) != len(seen):
        longer = expected if len(expected) > len(seen) else seen
        more = "whole" if longer is expected else "resumed"
        start = min(len(expected), len(seen))
        return f"the {more} run goes on after {start} equal events: {longer[start : start + 5]}"
    return None


def differences(whole: Outcome, resumed: Outcome, number: int) -> list[str]:
    """Everything in which a run resumed from file ``number`` is not the rest of the whole run."""
    found = {
        "events": tape_difference(*rests(whole.tape, number, resumed.tape)),
        "final weights": first_difference(whole.weights, resumed.weights),
        "final checkpoint": first_difference(whole.payload, resumed.payload),
        "generators after the run": first_difference(whole.draws, resumed.draws),
    }
    return [f"{what}: {difference}" for what, difference in found.items() if difference is not None]


Chooser = Callable[[Outcome], Iterable[int]]


def everywhere(whole: Outcome) -> list[int]:
    """Every file that the run saved."""
    return list(whole.files)


def spread(whole: Outcome) -> list[int]:
    """A few telling places: in the middle of both epochs, after the first validation and the first epoch."""
    batches = whole.of_kind("batch")
    chosen = {batches[1], batches[len(batches) * 2 // 3]}
    return sorted({*chosen, *whole.of_kind("epoch")[:1], *whole.of_kind("validation")[:1]})


def one_inside(whole: Outcome) -> list[int]:
    """One place, in the middle of the last epoch."""
    batches = whole.of_kind("batch")
    return [batches[len(batches) * 3 // 4]]


def assert_resumes_exactly(case: Case, root: Path, choose: Chooser = spread) -> Outcome:
    """Train whole, resume from the files that ``choose`` names; each time the rest has to be the same."""
    whole = run(case, root / "whole")
    numbers = list(choose(whole))
    assert numbers, "the run saved no file to resume from"
    for number in numbers:
        assert_continues(whole, run(case, root / f"from-{number}", whole.files[number], save=False), number)
    return whole


def assert_continues(whole: Outcome, resumed: Outcome, number: int) -> None:
    """The resumed run is the rest of the whole one, bit for bit."""
    found = differences(whole, resumed, number)
    point = f"file {number} of {len(whole.files)} (saved for: {whole.kinds[number]})"
    assert not found, "\n".join([f"resumed from {point}", *found])
