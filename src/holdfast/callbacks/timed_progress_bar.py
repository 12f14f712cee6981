"""When a progress bar draws: by the clock.

When a batch ends the bar looks at the clock, and at nothing else until it is time to draw again.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.progress_bar import ProgressBar, known
from holdfast.callbacks.track import Track
from holdfast.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class TimedProgressBar(ProgressBar):
    """A progress bar that draws at most every ``interval_s`` seconds, whatever a step takes.

    What is on at a time are the training epoch, and one of sanity check, validation, test and predict,
    perhaps inside it. Subclasses draw.
    """

    def __init__(self, interval_s: float) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._look_s = 0.0  # when a batch's end is to be looked at
        self._draw_s = 0.0  # when it is time to draw again
        self._train: Track | None = None
        self._train_done = 0
        self._eval: Track | None = None
        self._eval_done = 0

    def begin(self, track: Track) -> None:
        """Take note that ``track`` begins; nothing has to be shown before it is drawn."""

    @abstractmethod
    def draw(self, track: Track) -> None:
        """Show where ``track`` is."""

    @abstractmethod
    def finish(self, track: Track) -> None:
        """Show that ``track`` is through."""

    def renew(self, track: Track) -> None:
        """Show that new values are there, if that is worth showing between two times to draw."""

    def shut(self) -> None:
        """Leave the terminal as it was; called at the end of every run, however it ends."""
        self._train = self._eval = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's bar."""
        if self.is_enabled:
            self._begin_epoch(trainer, 0)
            assert self._train is not None
            self.draw(self._train)
            self._draw_s = time.monotonic() + self._interval_s
            # The first batch has to be seen: the pace is counted from it.
            self._look_s = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock, and draw if it is time."""
        self._train_done = batch_idx + 1
        now_s = time.monotonic()
        if now_s < self._look_s or not self._enabled:
            return
        # A run that goes on inside an epoch comes here without the epoch's start.
        if self._train is None or self._train.epoch != trainer.current_epoch:
            self._begin_epoch(trainer, batch_idx + 1)
        assert self._train is not None
        self._train.at(batch_idx + 1, now_s, self.get_metrics(trainer, pl_module))
        if now_s >= self._draw_s:
            self._draw_s = now_s + self._interval_s
            self.draw(self._train)
        self._look_s = self._draw_s

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the epoch's end."""
        if self._train is not None:
            done = trainer.batch_idx + 1
            done = max(self._train.done, done if self._train.total is None else min(done, self._train.total))
            self._train.at(done, time.monotonic(), self.get_metrics(trainer, pl_module))
            self.finish(self._train)
            self._train = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal as it was."""
        self.shut()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a second bar; the training epoch's clock stands still."""
        sanity = trainer.sanity_checking
        self._begin_eval(
            self.sanity_check_description if sanity else self.validation_description,
            trainer.num_sanity_val_batches if sanity else trainer.num_val_batches,
        )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the clock, and draw if it is time."""
        self._eval_batch(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the second bar away, and show the new values behind the first."""
        self._end_eval(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar."""
        self._begin_eval(self.test_description, trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the clock, and draw if it is time."""
        self._eval_batch(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the end."""
        self._end_eval(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar."""
        self._begin_eval(self.predict_description, trainer.num_predict_batches)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the clock, and draw if it is time."""
        self._eval_batch(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the end."""
        self._end_eval(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self.shut()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self.shut()

    def _begin_epoch(self, trainer: Trainer, done: int) -> None:
        self._train_done = done
        epochs = trainer.max_epochs
        of = "" if epochs is None or epochs < 0 else f"/{epochs}"
        name = f"Epoch {trainer.current_epoch + 1}{of}"
        self._train = Track(name, known(self._batches_of_epoch(done)), trainer.current_epoch)
        self.begin(self._train)

    def _begin_eval(self, name: str, batches: list[int | float]) -> None:
        if not self.is_enabled:
            return
        if self._train is not None:
            # The bar stands still where training stands, not where it was drawn last.
            now_s = time.monotonic()
            done = max(self._train.done, self.trainer.batch_idx + 1)
            self._train.at(done, now_s, self._train.metrics)
            self._train.pace.pause(now_s)
        self._eval = Track(name, known(sum(batches)), None)
        self._eval_done = 0
        self._draw_s = time.monotonic() + self._interval_s
        self.begin(self._eval)

    def _eval_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval_done += 1
        now_s = time.monotonic()
        if now_s >= self._draw_s and self._eval is not None:
            self._draw_s = now_s + self._interval_s
            self._eval.at(self._eval_done, now_s, {})
            self.draw(self._eval)

    def _end_eval(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._eval is not None:
            self._eval.at(self._eval_done, time.monotonic(), {})
            self.finish(self._eval)
            self._eval = None
        if self._train is not None:
            self._train.pace.resume(time.monotonic())
            self._train.metrics = self.get_metrics(trainer, pl_module)
            self.renew(self._train)
