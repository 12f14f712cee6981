"""Ends that a resumed run has come to: the limit that ended it, and learning rates that have run out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
)

from holdfast.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from holdfast.callbacks.timer import Timer
from holdfast.training.progress import BATCH, END, VALIDATED

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_ABOUT_0 = 1e-5
"""Of the highest rate that a group is known to have had; OneCycleLR ends at 4e-6 of it by default."""

_ANOTHER_COURSE = (
    "A scheduler's course is in the checkpoint, so other arguments for it change nothing. To start the "
    "optimizer and its scheduler afresh, empty checkpoint['optimizer_states'] and "
    "checkpoint['lr_schedulers'] in on_load_checkpoint."
)


def why_finished(trainer: Trainer) -> str:
    """What ended the run that there is nothing left to train of, and how to train on."""
    progress = trainer.progress
    epochs = progress.epoch + (progress.stage == END)
    done = f"({_count(epochs, 'epoch')}, {_count(progress.global_step, 'step')} are done)"
    if trainer.max_steps != -1 and progress.global_step >= trainer.max_steps:
        return f"already finished: max_steps={trainer.max_steps} reached {done}. Raise it to train on."
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return f"already finished: max_epochs={trainer.max_epochs} reached {done}. Raise it to train on."
    for timer in trainer.callbacks:
        limit_s = timer.duration_s if isinstance(timer, Timer) else None
        if isinstance(timer, Timer) and limit_s is not None and timer.time_elapsed() >= limit_s:
            limit = timedelta(seconds=int(limit_s))
            return f"already finished: the time for training, {limit}, is up {done}. Raise it to train on."
    for callback in trainer.callbacks:
        stopped = getattr(callback, "stopping_reason", EarlyStoppingReason.NOT_STOPPED)
        if isinstance(callback, EarlyStopping) and stopped is not EarlyStoppingReason.NOT_STOPPED:
            return (
                f"already finished: {type(callback).__name__} stopped the run {done}: "
                f"{callback.stopping_reason_message} Raise max_epochs or max_steps to train on."
            )
    return (
        f"already finished: the run was told to stop, by trainer.should_stop {done}. Raise max_epochs or "
        "max_steps to train on."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def rates_at_their_end(trainer: Trainer) -> Iterator[str]:
    """A sentence for each optimizer that a resumed run would train with a rate that has run down to about 0.

    A rate counts only if a scheduler has brought it there from a higher one, and only where nothing else is
    to be expected: the scheduler stays at 0 from here on, or the run had a lower limit when it was saved, so
    that the scheduler was made for that. A warm-up from 0, or a cycle that touches 0, is neither.
    """
    from holdfast.training.state import limits_of

    if not _trains_on(trainer):
        return
    goes_further = trainer.progress.limits != limits_of(trainer)
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        name = type(scheduler).__name__
        steps = _steps(scheduler)
        if isinstance(scheduler, OneCycleLR) and steps >= scheduler.total_steps and goes_further:
            yield (
                f"{name} has done all of its total_steps={scheduler.total_steps}, and its next step is an "
                f"error. {_ANOTHER_COURSE}"
            )
        elif steps > 0 and (goes_further or _stays(scheduler)) and _is_about_0(scheduler):
            optimizer = scheduler.optimizer
            rates = ", ".join(
                f"group {i}: {float(g['lr']):.3g}" for i, g in enumerate(optimizer.param_groups)
            )
            rises = " It rises again from here." if isinstance(scheduler, CosineAnnealingLR) else ""
            yield (
                f"{name} has brought the learning rate of {type(optimizer).__name__} down to about 0 "
                f"({rates}), and training goes on with that.{rises} {_ANOTHER_COURSE}"
            )


def _trains_on(trainer: Trainer) -> bool:
    """Whether there is a batch left to train on, as far as can be told."""
    loop, progress = trainer.fit_loop, trainer.progress
    if loop is None or loop.finished:
        return False
    epoch_is_done = progress.stage in (BATCH, VALIDATED) and progress.batch >= loop.batches
    is_last = trainer.max_epochs not in (None, -1) and progress.epoch + 1 >= trainer.max_epochs
    return not (epoch_is_done and is_last)


def _steps(scheduler: Any) -> int:
    """Steps that a scheduler has done; 0 where it cannot tell."""
    inner = getattr(scheduler, "_schedulers", ())
    return int(getattr(scheduler, "last_epoch", 0) or max(map(_steps, inner), default=0))


def _stays(scheduler: Any) -> bool:
    """Whether the rate stays what it is from here on."""
    known = isinstance(scheduler, (ConstantLR, LinearLR, PolynomialLR))
    return known and _steps(scheduler) >= scheduler.total_iters


def _is_about_0(scheduler: Any) -> bool:
    """Whether each group's rate has run down; one that was given 0 from the start has not."""
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    highest = [max(float(group.get(name, 0.0)) for name in ("initial_lr", "max_lr")) for group in groups]
    rates = [float(group["lr"]) for group in groups]
    return any(highest) and all(rate <= _ABOUT_0 * top for rate, top in zip(rates, highest, strict=True))
