"""When a checkpoint is due: pure functions of counters, settings and a clock."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.callbacks.base import Callback
    from holdfast.training.trainer import Trainer


def resolve_intervals(
    every_n_train_steps: int | None, every_n_epochs: int | None, train_time_interval_s: float | None
) -> tuple[int, int]:
    """Settle which of the three intervals is in force and return (every_n_train_steps, every_n_epochs).

    A number of 0 means that this interval triggers nothing. With none of the three given it is every epoch.

    Raises:
        ConfigError: More than one is in force, or one is negative.
    """
    for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
        if value is not None and value < 0:
            raise ConfigError(
                f"ModelCheckpoint({name}={value}) is not an interval: give 1 or more, or 0 for never."
            )
    if train_time_interval_s is not None and train_time_interval_s < 0:
        raise ConfigError("ModelCheckpoint(train_time_interval=...) is negative: give a positive timedelta.")
    if every_n_train_steps is None and every_n_epochs is None and train_time_interval_s is None:
        return 0, 1
    steps, epochs = every_n_train_steps or 0, every_n_epochs or 0
    if (steps >= 1) + (epochs >= 1) + (train_time_interval_s is not None) > 1:
        raise ConfigError(
            "ModelCheckpoint takes one of every_n_train_steps, every_n_epochs and train_time_interval, not "
            "several. Use one ModelCheckpoint for each interval."
        )
    return steps, epochs


def due_at_step(step: int, last_step: int, every_n_train_steps: int) -> bool:
    """Tell whether the step interval is due at global step ``step``, once for each step.

    Under gradient accumulation several batches end at one global step; ``last_step``, the step of the
    previous trigger, keeps the later ones from saving inside the next accumulation window.
    """
    return every_n_train_steps >= 1 and step > 0 and step != last_step and step % every_n_train_steps == 0


def due_at_time(now_s: float, last_s: float, interval_s: float | None) -> bool:
    """Tell whether ``interval_s`` seconds have passed since ``last_s``."""
    return interval_s is not None and now_s - last_s >= interval_s


def posted(trainer: Trainer, callback: Callback) -> bool:
    """Have rank 0 see to it that the callback's ``time_is_due`` is called on every rank at one safe point.

    Only rank 0's clock counts, so on other ranks nothing is done. Returns False with one process: what is due
    is due at once.
    """
    agreement = trainer.strategy.agreement if trainer.world_size > 1 else None
    if agreement is None:
        return False
    if trainer.is_global_zero:
        agreement.post("callback", trainer.callbacks.index(callback))
    return True


def due_at_epoch(epoch: int, every_n_epochs: int) -> bool:
    """Tell whether the epoch interval is due when epoch ``epoch`` (from 0) is through."""
    return every_n_epochs >= 1 and (epoch + 1) % every_n_epochs == 0


def saves_on_train_epoch_end(
    asked: bool | None,
    *,
    validates: bool,
    val_check_interval: int | float | timedelta | None,
    check_val_every_n_epoch: int | None,
) -> bool:
    """Tell whether epochs are judged when training through them ends, or else when validation ends.

    Args:
        asked: What the user said; None leaves it to the schedule.
        validates: Whether validation runs inside this fit at all. Without it there is only one answer.
        val_check_interval: A float is a share of the epoch, an int a number of batches, or it is a time.
        check_val_every_n_epoch: Epochs between validations; None when validation counts batches only.
    """
    if asked is not None:
        return asked
    if not validates:
        return True
    once_at_the_end = isinstance(val_check_interval, float) and val_check_interval == 1.0
    return once_at_the_end and check_val_every_n_epoch == 1
