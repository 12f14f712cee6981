"""What a trainer does together with its other processes at one safe point, and how it tells where it is."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.callbacks.base import Checkpoint
from holdfast.errors import ConfigError, HoldfastError
from holdfast.strategies.launch import launcher, line_to_rank_zero
from holdfast.training.progress import END, Progress, TrainerStatus
from holdfast.training.validation_schedule import Stopwatch

if TYPE_CHECKING:
    from holdfast.training.in_flight import InFlight
    from holdfast.training.trainer import Trainer

T = TypeVar("T")

STOP, SETTLED, CALLBACK, VALIDATE = "stop", "settled", "callback", "validate"

_ON_EVERY_RANK = "Call it on every rank: all take part in it, and rank 0 writes the file."
_ASK_ON_EVERY_RANK = (
    "Whatever asks for a save (a callback, `trainer.request_save`) has to do so on every rank, or none."
)
_STOP_ON_EVERY_RANK = (
    "In the middle of an epoch `trainer.should_stop`, and -1 from on_train_batch_start, have to come on "
    "every rank at the same batch."
)
_STEP = ("on_train_batch_start", "forward", "run_backward")
"""What of a batch comes after what, as far as that can be told apart."""


class _Agreed(Checkpoint):
    """What a hold puts among the requests: it saves nothing, but has the loop come to its safe points."""


AGREED = _Agreed()


def together(trainer: Trainer) -> bool:
    """Whether what is saved now is saved by several processes together."""
    return trainer.strategy.agreement is not None and not trainer.strategy.alone


# -- a fit ---------------------------------------------------------------------------------------------------


def begin(trainer: Trainer) -> None:
    """A fit begins, at the same position on every rank. Ranks: all."""
    agreement = trainer.strategy.agreement
    if agreement is not None:
        agreement.begin(
            lambda: tick(trainer.progress),
            lambda: trainer.save_requests.append(AGREED),
            lambda: position(trainer),
        )


@contextmanager
def ending(trainer: Trainer, *, in_order: type[BaseException]) -> Iterator[None]:
    """A context in which a fit runs; what was still to be done when it ends is not done any more.

    Args:
        trainer: Whose fit.
        in_order: What ends it on all ranks, and is no error.
    """
    ended_in_order = False
    try:
        yield
        ended_in_order = True
    except in_order:
        ended_in_order = True
        raise
    finally:
        agreement = trainer.strategy.agreement
        if agreement is not None:
            agreement.end(in_order=ended_in_order)


def post(trainer: Trainer, name: str, value: Any = None) -> None:
    """Have all ranks do something at the same safe point; any thread and any signal's handler may call it."""
    agreement = trainer.strategy.agreement
    assert agreement is not None
    agreement.post(name, value)


def tick(progress: Progress) -> int:
    """Count the safe points of a run: one after each batch, and one after each epoch.

    Another thread may ask. In this order a loop that goes on meanwhile makes it too large, never too small.
    """
    ended = progress.stage == END
    epoch = progress.epoch
    return progress.total_batches + epoch + ended


def carry_out(trainer: Trainer) -> bool:
    """Do what was agreed to be due at this safe point; return whether that is to tell of a save's end.

    Ranks: all that have been asked to hold; nothing is exchanged here.
    """
    agreement = trainer.strategy.agreement
    assert agreement is not None
    return _do(trainer, [(one.name, one.value) for one in agreement.due(tick(trainer.progress))])


def finish(trainer: Trainer) -> bool:
    """Meet at the end of the fit, and do what was posted and not due yet; return as `carry_out` does.

    Ranks: all. Blocks: until the last one comes.
    """
    agreement = trainer.strategy.agreement
    assert agreement is not None
    return _do(trainer, [(one.name, one.value) for one in agreement.finish()])


def _do(trainer: Trainer, actions: list[tuple[str, Any]]) -> bool:
    settles = False
    for name, value in actions:
        if name == STOP:
            trainer.preemption.stop(trainer, value)
        elif name == CALLBACK:
            callback: Any = trainer.callbacks[value]
            callback.time_is_due(trainer)
        elif name == VALIDATE:
            if trainer.fit_loop is not None and isinstance(trainer.fit_loop.stopwatch, SharedStopwatch):
                trainer.fit_loop.stopwatch.agreed = True
        else:
            settles = settles or any(key_of(save) == value for save in trainer.saves_in_flight)
    return settles


def look_again(trainer: Trainer) -> None:
    """Have the loop come to its next safe point too, while something is agreed or about to be."""
    agreement = trainer.strategy.agreement
    if agreement is not None and agreement.pending:
        trainer.save_requests.append(AGREED)


def key_of(save: InFlight) -> list[Any]:
    """What tells a save from another one, on every rank the same."""
    return [save.tick, save.group[0][1].names[0]]


def same_requests(trainer: Trainer, requests: list[Checkpoint]) -> list[Checkpoint]:
    """Meet for the saves of this safe point; where ranks have asked for others, rank 0's requests count.

    Ranks: all. Blocks: until the last one comes.

    Raises:
        RankFailed: a rank goes on without saving, or is gone.
    """
    agreement = trainer.strategy.agreement
    assert agreement is not None
    agreement.meet(f"the save at step {trainer.global_step}", _ASK_ON_EVERY_RANK)
    known = [*trainer.callbacks, trainer.preemption]
    numbers = [known.index(one) if one in known else -1 for one in requests]
    theirs = trainer.strategy.broadcast(numbers)
    return requests if theirs == numbers else [known[one] for one in theirs if one != -1]  # type: ignore[misc]


def end_of_batches(trainer: Trainer) -> None:
    """Meet where an epoch's batches are over.

    Between two batches nothing is exchanged, so what ends an epoch early has to come on every rank at the
    same batch. A rank that leaves the epoch alone would wait here for the others, and they for it.

    Ranks: all. Blocks: until the last one comes.

    Raises:
        RankFailed: a rank has gone on with the epoch, or is gone.
    """
    if together(trainer):
        agreement = trainer.strategy.agreement
        assert agreement is not None
        agreement.meet(f"the end of epoch {trainer.progress.epoch}", _STOP_ON_EVERY_RANK)


def stops(trainer: Trainer) -> None:
    """Make ``trainer.should_stop`` the same on every rank: one that says so is enough. Ranks: all.

    Called where a validation and where an epoch ends.
    """
    if together(trainer):
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(bool(trainer.should_stop), all=False)


class SharedStopwatch(Stopwatch):
    """A stopwatch of which rank 0's decides, for all ranks at the same safe point."""

    def __init__(self, interval: timedelta, elapsed_s: float, trainer: Trainer) -> None:
        super().__init__(interval, elapsed_s)
        self._trainer = trainer
        self._posted = self.agreed = False

    def due(self) -> bool:
        """Whether it was agreed that the interval is over; on rank 0, see to that."""
        if not self._posted and self._trainer.is_global_zero and super().due():
            self._posted = True
            post(self._trainer, VALIDATE)
        return self.agreed

    def restart(self) -> None:
        """Begin the next interval."""
        super().restart()
        self._posted = self.agreed = False


def stopwatch(trainer: Trainer, interval: timedelta) -> Stopwatch:
    """The clock of ``val_check_interval``, which goes on from where the run's stood."""
    elapsed_s = trainer.progress.since_validation_s
    if together(trainer):
        return SharedStopwatch(interval, elapsed_s, trainer)
    return Stopwatch(interval, elapsed_s)


def share_stats(trainer: Trainer) -> None:
    """Have `Trainer.checkpoint_stats` say on every rank what it says on rank 0. Ranks: all."""
    if together(trainer):
        stats = trainer.checkpoint_stats
        stats.take(trainer.strategy.broadcast(stats.figures()))


# -- the user's save_checkpoint ------------------------------------------------------------------------------


def meet_for_save(trainer: Trainer, path: str) -> str | None:
    """Meet for a `Trainer.save_checkpoint`; return rank 0's path, or None where this rank has nothing to do.

    Where the others cannot come (they wait for rank 0's next request, or the job has failed), rank 0 saves by
    itself: `Strategy.alone` is True then.

    Ranks: all that run the script. Blocks: until the last one comes.

    Raises:
        RankFailed: a rank has gone on without calling it, or is gone.
    """
    strategy = trainer.strategy
    agreement = strategy.agreement
    if agreement is None or strategy.alone:
        return path
    running = trainer.state.status is TrainerStatus.RUNNING
    waits = not running and (bool(launcher.children) or line_to_rank_zero() is not None)
    if waits or strategy.cut_off:
        strategy.alone = True
        return path if trainer.is_global_zero else None
    agreement.meet("trainer.save_checkpoint", _ON_EVERY_RANK)
    return strategy.broadcast(path)


def refuse_alone(trainer: Trainer, path: str) -> None:
    """Refuse to save parts of a model without the processes that hold the others.

    Raises:
        ConfigError: they are elsewhere.
    """
    if trainer.strategy.shards_model and trainer.strategy.alone and trainer.world_size > 1:
        raise ConfigError(
            f"trainer.save_checkpoint({path!r}): each process holds a part of this model, and the others are "
            "elsewhere: behind a request of another trainer, or gone. Save before that, or go on from a "
            "checkpoint that ModelCheckpoint has saved."
        )


# -- outcomes ------------------------------------------------------------------------------------------------


def outcome(
    trainer: Trainer, result: T, problem: Exception | None, *, of_all: bool = False
) -> tuple[T, Exception | None]:
    """Return rank 0's result and the problem that it met, if any, on every rank.

    Args:
        trainer: Whose ranks.
        result: This rank's.
        problem: What it met, or None.
        of_all: Every rank may have met a problem; the first one's counts.

    Ranks: all. Blocks: until they have exchanged it.
    """
    strategy = trainer.strategy
    sent = None if problem is None else _sendable(problem)
    if of_all:
        problems = strategy.gather(sent)
        sent = next((one for one in problems or () if one is not None), None)
    result, theirs = strategy.broadcast((result, sent))
    # Where it was met it has its traceback.
    return result, problem if theirs is not None and trainer.is_global_zero and problem else theirs


def _sendable(problem: Exception) -> Exception:
    try:
        back = pickle.loads(pickle.dumps(problem))
        if type(back) is type(problem) and str(back) == str(problem):
            return problem
    except Exception:  # an exception of somebody's that cannot be pickled, or not be read
        pass
    return HoldfastError(f"{type(problem).__name__}: {problem}")


# -- where this process is -----------------------------------------------------------------------------------


def position(trainer: Trainer) -> dict[str, Any]:
    """Where the run is: numbers that only grow, and words. Any thread may ask."""
    progress, batch = trainer.progress, trainer.batch_idx
    inside = batch == progress.batch
    begun = progress.total_batches + inside
    return {
        "order": [begun, progress.epoch],
        "phase": _phase(trainer) if inside else None,
        "place": f"{'in' if inside else 'after'} batch {batch} of epoch {progress.epoch}",
    }


def _phase(trainer: Trainer) -> int | None:
    loop = trainer.fit_loop
    if loop is None or trainer.model is None or not trainer.model.automatic_optimization:
        return None
    if trainer.metrics.train.fx == "on_train_epoch_start":
        return 0
    main = threading.main_thread().ident
    frame: FrameType | None = sys._current_frames().get(main or 0)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _STEP and os.path.basename(code.co_filename) == "optimization.py":
            return 1 + _STEP.index(code.co_name)
        frame = frame.f_back
    return 1 if trainer.metrics.train.fx == _STEP[0] else None
