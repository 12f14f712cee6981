"""What code written for Lightning reaches for on the fit loop: limits to change, counters to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from holdfast.training.evaluation import EvaluationLoop
    from holdfast.training.fit_data import FitData
    from holdfast.training.trainer import Trainer


class LoopView:
    """Names of Lightning's two training loops over the state that the trainer and its progress keep."""

    trainer: Trainer
    data: FitData

    @property
    def max_epochs(self) -> int | None:
        """The trainer's; set it to train on for longer, or for less."""
        return self.trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, value: int | None) -> None:
        self.trainer.max_epochs = value

    @property
    def min_epochs(self) -> int | None:
        """The trainer's; may be set."""
        min_epochs: int | None = self.trainer.min_epochs
        return min_epochs

    @min_epochs.setter
    def min_epochs(self, value: int | None) -> None:
        self.trainer.min_epochs = value

    @property
    def max_steps(self) -> int:
        """The trainer's; may be set."""
        return self.trainer.max_steps

    @max_steps.setter
    def max_steps(self, value: int) -> None:
        self.trainer.max_steps = value

    @property
    def min_steps(self) -> int | None:
        """The trainer's; may be set."""
        min_steps: int | None = self.trainer.min_steps
        return min_steps

    @min_steps.setter
    def min_steps(self, value: int | None) -> None:
        self.trainer.min_steps = value

    @property
    def max_batches(self) -> int | float:
        """Training batches in an epoch."""
        return self.data.batches

    @property
    def batch_idx(self) -> int:
        """The batch of the epoch that is running, or ran last."""
        return self.trainer.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """The batch that ran last, counted over all epochs; -1 before the first."""
        return self.trainer.progress.total_batches - 1

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.trainer.progress.global_step

    @property
    def _batches_that_stepped(self) -> int:
        return self.trainer.progress.batches_that_stepped

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, value: int) -> None:
        self.trainer.progress.batches_that_stepped = value

    @property
    def epoch_loop(self) -> Self:
        """The same loop: epochs and batches are one here."""
        return self

    @property
    def val_loop(self) -> EvaluationLoop | None:
        """The validation loop; None until it was needed."""
        return self.data.validation
