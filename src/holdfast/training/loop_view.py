"""What code written for Lightning reaches for on the fit loop: limits to change, counters to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.training.log_hooks import in_batch
from holdfast.training.progress import BATCH, END, START, RunningStage

if TYPE_CHECKING:
    from typing_extensions import Self

    from holdfast.training.evaluation import EvaluationLoop
    from holdfast.training.fit_data import FitData
    from holdfast.training.trainer import Trainer


@dataclass(frozen=True)
class Counts:
    """How many batches or epochs have come how far."""

    ready: int
    """Begun, or about to: their first hook is called."""
    started: int
    """Past their first hook."""
    processed: int
    """Past all but their last hook."""
    completed: int
    """Past all of it."""


@dataclass(frozen=True)
class ProgressView:
    """The counts of batches or epochs at the moment of asking."""

    current: Counts
    """For batches, those of the epoch."""
    total: Counts
    is_last_batch: bool = False


class LoopView:
    """Names of Lightning's two training loops over the state that the trainer and its progress keep."""

    trainer: Trainer
    data: FitData
    _resumed: dict[str, Any] | None

    if TYPE_CHECKING:

        @property
        def finished(self) -> bool: ...
        def _epoch_has_to_end(self) -> bool: ...

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
    def epoch_progress(self) -> ProgressView:
        """Counts of epochs."""
        progress, fx = self.trainer.progress, self.trainer.metrics.train.fx
        done = progress.epoch + (progress.stage == END)
        ready = started = processed = done
        if fx == "on_train_epoch_start":
            ready += 1
        elif fx == "on_train_epoch_end":
            ready, started, processed = done + 1, done + 1, done + 1
        elif in_batch(fx) or progress.stage not in (START, END):
            ready, started = done + 1, done + 1
        counts = Counts(ready, started, processed, done)
        return ProgressView(counts, counts)

    @property
    def batch_progress(self) -> ProgressView:
        """Counts of training batches."""
        trainer, progress, index = self.trainer, self.trainer.progress, self.trainer.batch_idx
        fx, done = trainer.metrics.train.fx, progress.batch
        # With the hook of the batch before, the next one is still on its way to the device.
        if in_batch(fx) and fx != "on_train_batch_end" and done == index:
            begun = index + (fx != "on_train_batch_start")
            counts = (index + 1, begun, done, done)
        else:
            between = progress.stage == START and fx != "on_train_epoch_start" and self._resumed is None
            if between and progress.total_batches:
                done = index + 1  # after the last batch of an epoch, or of the run
            ending = fx == "on_train_batch_end" and progress.stage == BATCH
            ending = ending and trainer.state.stage is RunningStage.TRAINING
            counts = (done, done, done, done - ending)
        before = progress.total_batches - done
        total = Counts(*(before + count for count in counts))
        return ProgressView(Counts(*counts), total, trainer.is_last_batch)

    @property
    def done(self) -> bool:
        """Whether a limit is reached; in the last epoch's end already."""
        limit = self.max_epochs
        ended = limit not in (None, -1) and self.epoch_progress.current.processed >= (limit or 0)
        return ended or self.finished

    @property
    def nothing_left(self) -> bool:
        """Whether the checkpoint that the run goes on from is that of a finished run."""
        return self._resumed is not None and self.finished and not self._epoch_has_to_end()

    @property
    def restarting(self) -> bool:
        """Whether the run is about to go on in the middle of a checkpoint's epoch."""
        return self._resumed is not None and self.trainer.progress.stage not in (START, END)

    @property
    def epoch_loop(self) -> Self:
        """The same loop: epochs and batches are one here."""
        return self

    @property
    def val_loop(self) -> EvaluationLoop | None:
        """The validation loop; None until it was needed."""
        return self.data.validation
