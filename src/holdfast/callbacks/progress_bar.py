"""What every progress bar offers, and which one a run gets by default."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Callback

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer

BarMetrics = dict[str, int | str | float | dict[str, float]]


class ProgressBar(Callback):
    """Base of all progress bars: what there is to show, and switching it off and on.

    Override `get_metrics` to change what stands behind the bar.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._dataloader_idx: int | None = None
        self._enabled = True

    @property
    def trainer(self) -> Trainer:
        """The trainer whose run is shown.

        Raises:
            TypeError: No run has begun.
        """
        if self._trainer is None:
            raise TypeError(f"{type(self).__name__} is not attached to a trainer yet: its run has not begun.")
        return self._trainer

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled

    @property
    def is_disabled(self) -> bool:
        """Whether nothing is shown."""
        return not self.is_enabled

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False

    def enable(self) -> None:
        """Show everything again."""
        self._enabled = True

    @property
    def lines_drawn(self) -> int:
        """How many lines of a terminal the bar takes up now, with the cursor on the last; 0 if none."""
        return 0

    @property
    def sanity_check_description(self) -> str:
        """What the sanity check is called."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """What training is called."""
        return "Training"

    @property
    def validation_description(self) -> str:
        """What validation is called."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What testing is called."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """What prediction is called."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """Batches that a training epoch beginning now has until its end, or until ``max_steps`` ends it.

        Infinity when nobody knows.
        """
        return self._batches_of_epoch(0)

    def _batches_of_epoch(self, done: int) -> int | float:
        """Batches that this training epoch has in all, ``done`` of which are through."""
        trainer = self.trainer
        batches: int | float = trainer.num_training_batches
        if trainer.max_steps == -1:
            return batches
        accumulate = trainer.accumulate_grad_batches
        steps_left = max(0, trainer.max_steps - trainer.global_step)
        return min(batches, (done // accumulate + steps_left) * accumulate)

    @property
    def total_val_batches(self) -> int | float:
        """Batches in one run of validation, over all its loaders; 0 without validation."""
        runs = self.trainer.state.fn != "fit" or self.trainer.enable_validation
        return sum(self.trainer.num_val_batches) if runs else 0

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches in the validation loader that is being read, in the sanity check as well."""
        trainer = self.trainer
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return batches[self._dataloader_idx or 0]

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches in the test loader that is being read."""
        return self.trainer.num_test_batches[self._dataloader_idx or 0]

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches in the prediction loader that is being read."""
        return self.trainer.num_predict_batches[self._dataloader_idx or 0]

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Tell whether another loader is being read than at the last call, and remember this one."""
        changed = dataloader_idx != self._dataloader_idx
        self._dataloader_idx = dataloader_idx
        return changed

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget which loader was being read."""
        self._dataloader_idx = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take hold of the trainer; ranks other than 0 show nothing."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> BarMetrics:
        """Return what stands behind the bar: the logger's version as ``v_num``, and what was logged for it.

        ``v_num`` is there for code that expects it; holdfast's own bars leave it out.
        """
        metrics: BarMetrics = {}
        if trainer.loggers:
            version = trainer.loggers[0].version
            if version is not None:
                # As in a file name, a long version is told apart by its end.
                metrics["v_num"] = version[-4:] if isinstance(version, str) else version
        metrics.update(trainer.progress_bar_metrics)
        return metrics

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the bar."""
        print(*args, **kwargs)


def default_progress_bar() -> ProgressBar:
    """Return a live bar when a person is watching a terminal, and plain lines otherwise."""
    watched = sys.stderr.isatty() or sys.stdout.isatty()
    if not watched or os.environ.get("TERM", "") in ("", "dumb"):
        from holdfast.callbacks.plain_progress_bar import PlainProgressBar

        return PlainProgressBar()
    from holdfast.callbacks.rich_progress_bar import RichProgressBar

    return RichProgressBar()


def known(total: int | float) -> int | None:
    """Return a number of batches, and None for infinity: nobody knows."""
    return None if total == float("inf") else int(total)
