"""Accumulate gradients over another number of batches from a given epoch on."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from holdfast.callbacks.base import Callback
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Set ``trainer.accumulate_grad_batches`` from the epoch on that the schedule says.

    Nothing has to be saved: the factor follows from the epoch, so that a run that goes on in the middle of
    one accumulates over the same windows.

    Args:
        scheduling: Epoch (from 0) to factor: ``{0: 8, 4: 4, 8: 1}`` accumulates 8 batches in epochs 0 to 3, 4
            in epochs 4 to 7, and then none. Before its first epoch the factor is 1.

    Raises:
        ConfigError: The schedule is empty, an epoch is no int of at least 0, or a factor no int of at least
            1; when fit starts: optimization is manual, or the trainer has an accumulate_grad_batches too.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        if not isinstance(scheduling, dict) or not scheduling:
            raise ConfigError(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}): expected a dict of epoch to "
                "factor, such as {0: 8, 4: 4}."
            )
        for what, numbers, least in (("an epoch", scheduling, 0), ("a factor", scheduling.values(), 1)):
            wrong = [n for n in numbers if not isinstance(n, int) or n < least]
            if wrong:
                raise ConfigError(
                    f"GradientAccumulationScheduler(scheduling={scheduling!r}): {what} must be an int of at "
                    f"least {least}, found {wrong[0]!r}."
                )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._changed: weakref.ref[Trainer] | None = None

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any factor is more than 1."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """The factor of an epoch."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that nothing contradicts the schedule, and set the factor of the epoch to go on in.

        In the middle of an epoch `on_train_epoch_start` is not called before the next batch.
        """
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "GradientAccumulationScheduler has no effect with manual optimization. Leave it out, and "
                "accumulate in training_step."
            )
        ours = self._changed is not None and self._changed() is trainer
        if trainer.accumulate_grad_batches != 1 and not ours:
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and a "
                "GradientAccumulationScheduler contradict each other. Leave one of them out."
            )
        self._changed = weakref.ref(trainer)
        self._set(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the epoch's factor."""
        self._set(trainer)

    def _set(self, trainer: Trainer) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
