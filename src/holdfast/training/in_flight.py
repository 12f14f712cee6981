"""Saves that go on while training does: whom they are for, and how their end is told at a safe point."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.checkpoint import reserved
from holdfast.checkpoint.checkpoint_io import AsyncCheckpointIO
from holdfast.checkpoint.engine import PendingSave, SnapshotChanged
from holdfast.checkpoint.report import SaveReport, tell_omissions
from holdfast.training import agreed
from holdfast.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

ON_ERROR = ("warn", "retry", "raise")
"""What to do about a save that fails, from the mildest to the strictest."""
RETRIES = 3


class _Settle(Checkpoint):
    """What a save that has ended puts among the requests: it saves nothing, but has its end told."""


SETTLE = _Settle()


@dataclass
class InFlight:
    """A save that is written, or about to be, and whom to tell once it is durable.

    Attributes:
        group: the callbacks that share it, each with its plan.
        batches: how many batches are trained in it; None where a run cannot go on from it exactly.
        on_error: what to do if it fails.
        pending: the engine's save in the background, or None: there is none, or rank 0 has it.
        report: what it cost, once that is known.
        tick: the safe point that it was begun at.
        ended: for who saves it in the background: called when it is durable or has failed, by any thread.
    """

    group: list[tuple[Checkpoint, SavePlan]]
    batches: int | None
    on_error: str
    pending: PendingSave | None = None
    report: SaveReport | None = None
    tick: int = 0
    ended: Callable[[], None] = lambda: None


def settle(trainer: Trainer, *, wait: bool = True) -> None:
    """Tell callbacks whose saves have ended in the background: committed, or rolled back.

    Args:
        trainer: Whose saves.
        wait: Also wait for the one that has not ended yet. Several processes only ever settle together, so
            without it they do nothing.

    Ranks: all, at the same point. With ``wait``, what rank 0's saves have come to is told there.

    Raises:
        Exception: the one that ended a save, unless its callbacks want that said only; what they had stays.
    """
    in_flight = trainer.saves_in_flight
    together = agreed.together(trainer)
    if together and not wait:
        return
    if trainer.strategy.alone and not trainer.is_global_zero:
        for save in in_flight:  # what becomes of it only rank 0 will know
            roll_back(trainer, save.group)
        in_flight.clear()
        return
    if isinstance(trainer.strategy.own_checkpoint_io, AsyncCheckpointIO):
        if wait:
            _settle_plugin(trainer, trainer.strategy.own_checkpoint_io)
        return
    while in_flight and (wait or _ended(in_flight[0])):
        with trainer.checkpoint_stats.aside(trainer.progress, in_flight):
            _settle_one(trainer, in_flight[0])


def _ended(save: InFlight) -> bool:
    return save.pending is None or save.pending.ended


def _settle_one(trainer: Trainer, save: InFlight) -> None:
    in_flight, stats = trainer.saves_in_flight, trainer.checkpoint_stats
    # Whoever interrupts the waiting has heard of no end yet, so the save stays in flight.
    save.report, waited_s, problem = _outcome(trainer, save)
    in_flight.remove(save)
    if isinstance(problem, SnapshotChanged):
        stats.discarded += 1
        roll_back(trainer, save.group)
        for callback, plan in save.group:
            callback.discarded(trainer, plan)
    elif problem is not None:
        roll_back(trainer, save.group)
        failed(trainer, save, problem)
    else:
        assert save.report is not None
        stats.queued_s += waited_s
        stats.add(save.report)
        tell_omissions(save.report.omissions)
        tell_committed(trainer, save)


def _outcome(trainer: Trainer, save: InFlight) -> tuple[SaveReport | None, float, Exception | None]:
    """Wait for a save; return what it did, how long it was waited for in seconds, and what it failed with."""
    pending, began = save.pending, time.monotonic()
    report, problem = None, None
    if pending is not None:
        try:
            report = pending.wait()
        except Exception as error:
            problem = error
    waited_s = time.monotonic() - began
    if agreed.together(trainer):
        of_all = trainer.strategy.sharded
        (report, waited_s), problem = agreed.outcome(trainer, (report, waited_s), problem, of_all=of_all)
    return report, waited_s, problem


def _settle_plugin(trainer: Trainer, checkpoint_io: AsyncCheckpointIO) -> None:
    saves = list(trainer.saves_in_flight)
    trainer.saves_in_flight.clear()
    problem: Exception | None = None
    try:
        if trainer.is_global_zero:
            try:
                checkpoint_io.wait()
            except Exception as error:
                problem = error
        if saves and agreed.together(trainer):
            _, problem = agreed.outcome(trainer, None, problem)
        if problem is not None:
            raise problem
    except BaseException:
        for save in saves:
            roll_back(trainer, save.group)
        raise
    for save in saves:
        tell_committed(trainer, save)


def failed(trainer: Trainer, save: InFlight, error: Exception) -> None:
    """Raise the error that ended a save, or say so where training is to go on all the same."""
    trainer.checkpoint_stats.failed += 1
    if save.on_error != "warn":
        raise error
    name = os.path.basename(save.group[0][1].names[0])
    rank_zero_warn(
        f"{name} was not saved, and training goes on without it (on_error='warn'). "
        f"{type(error).__name__}: {error}"
    )


def roll_back(trainer: Trainer, group: list[tuple[Checkpoint, SavePlan]]) -> None:
    """Have every callback forget its plan."""
    for callback, plan in group:
        callback.rolled_back(trainer, plan)
        reserved.give_up(plan.names)


def tell_committed(trainer: Trainer, save: InFlight) -> None:
    """Tell every callback of its durable save, then raise the first error: one's failure is not another's."""
    report = save.report
    assert report is not None
    errors: list[BaseException] = []
    for callback, plan in save.group:
        try:
            callback.committed(trainer, plan, report)
        except BaseException as error:
            errors.append(error)
        reserved.give_up(plan.names)
    if errors:
        raise errors[0]
    if save.batches is not None:
        trainer.preemption.files.give_way(trainer, report, save.batches)


def leave_batches(trainer: Trainer) -> None:
    """Let no snapshot read live tensors any more, since hooks follow that may change them; stop the clock.

    Between two batches that is left to the step. What hooks of an epoch or of validation do comes seldom: the
    engine might not find it out by comparing, and the waiting is as seldom.

    Ranks: all. Blocks: until the last one has left its batches.
    """
    agreed.end_of_batches(trainer)
    trainer.checkpoint_stats.steps_end(trainer.progress)
    if trainer.engine.copying:
        trainer.engine.wait_for_copy(learn=False)


@contextmanager
def beside_batches(trainer: Trainer) -> Iterator[None]:
    """A context for what comes between two batches, such as validation: as `leave_batches`, then back."""
    with trainer.checkpoint_stats.aside(trainer.progress, trainer.saves_in_flight):
        if trainer.engine.copying:
            trainer.engine.wait_for_copy(learn=False)
        yield
