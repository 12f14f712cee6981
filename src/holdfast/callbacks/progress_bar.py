"""How far a run is: what every progress bar offers, and the one that writes plain lines.

A bar looks at the clock when a batch ends, and at nothing else until it is time to draw again.
"""

from __future__ import annotations

import os
import sys
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import STEP_OUTPUT, Callback

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
    def sanity_check_description(self) -> str:
        """What the sanity check is called."""
        return "Sanity check"

    @property
    def train_description(self) -> str:
        """What training is called; the epoch's number goes behind it."""
        return "Epoch"

    @property
    def validation_description(self) -> str:
        """What validation is called."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What testing is called."""
        return "Test"

    @property
    def predict_description(self) -> str:
        """What prediction is called."""
        return "Predict"

    @property
    def total_train_batches(self) -> int | float:
        """Batches in the training epoch; infinity when nobody knows."""
        batches: int | float = self.trainer.num_training_batches
        return batches

    @property
    def total_val_batches(self) -> int | float:
        """Batches in one run of validation, over all its loaders; 0 without validation."""
        runs = self.trainer.state.fn != "fit" or self.trainer.enable_validation
        return sum(_as_list(self.trainer.num_val_batches)) if runs else 0

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches in the validation loader that is being read, in the sanity check as well."""
        trainer = self.trainer
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return _as_list(batches)[self._dataloader_idx or 0]

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches in the test loader that is being read."""
        return _as_list(self.trainer.num_test_batches)[self._dataloader_idx or 0]

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches in the prediction loader that is being read."""
        return _as_list(self.trainer.num_predict_batches)[self._dataloader_idx or 0]

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


class Pace:
    """Batches per second since the first batch ended, not counting pauses.

    The first batch is left out because it pays for what happens once: workers, caches, compilation.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)
        self._paused_at_s: float | None = None

    def note(self, done: int, now_s: float) -> None:
        """Take note that ``done`` batches are through at ``now_s``."""
        self._last = (done, now_s)
        if self._first is None:
            self._first = self._last

    def pause(self, now_s: float) -> None:
        """Stop the clock."""
        self._paused_at_s = now_s

    def resume(self, now_s: float) -> None:
        """Let the clock go on, as if no time had passed since `pause`."""
        if self._paused_at_s is not None and self._first is not None:
            self._first = (self._first[0], self._first[1] + now_s - self._paused_at_s)
        self._paused_at_s = None

    @property
    def rate(self) -> float | None:
        """Batches per second; None until two batches are through."""
        if self._first is None or self._last[0] <= self._first[0] or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])

    def left_s(self, total: int | None) -> float | None:
        """Seconds until ``total`` batches are through; None when there is no telling."""
        rate = self.rate
        return None if rate is None or total is None else max(0, total - self._last[0]) / rate


class TimedProgressBar(ProgressBar):
    """A progress bar that draws at most every ``interval_s`` seconds, whatever a step takes.

    What is on at a time are the training epoch, and one of sanity check, validation, test and predict,
    perhaps inside it. Subclasses draw.
    """

    def __init__(self, interval_s: float) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._next_s = 0.0
        self._train: Track | None = None
        self._eval: Track | None = None
        self._eval_done = 0

    @abstractmethod
    def draw(self, track: Track) -> None:
        """Show where ``track`` is."""

    @abstractmethod
    def finish(self, track: Track) -> None:
        """Show that ``track`` is through."""

    def shut(self) -> None:
        """Leave the terminal as it was; called at the end of every run, however it ends."""
        self._train = self._eval = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's bar."""
        self._next_s = 0.0
        if self.is_enabled:
            self._begin_epoch(trainer)
            assert self._train is not None
            self.draw(self._train)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock, and draw if it is time."""
        now_s = time.monotonic()
        if now_s < self._next_s or not self._enabled:
            return
        self._next_s = now_s + self._interval_s
        # A run that goes on inside an epoch comes here without the epoch's start.
        if self._train is None or self._train.epoch != trainer.current_epoch:
            self._begin_epoch(trainer)
        assert self._train is not None
        self._train.at(batch_idx + 1, now_s, self.get_metrics(trainer, pl_module))
        self.draw(self._train)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the epoch's end."""
        if self._train is not None:
            done = getattr(trainer, "batch_idx", -1) + 1
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

    def _begin_epoch(self, trainer: Trainer) -> None:
        epochs = trainer.max_epochs
        of = "" if epochs is None or epochs < 0 else f"/{epochs}"
        name = f"{self.train_description} {trainer.current_epoch + 1}{of}"
        self._train = Track(name, _finite(self.total_train_batches), trainer.current_epoch)

    def _begin_eval(self, name: str, batches: Any) -> None:
        if not self.is_enabled:
            return
        if self._train is not None:
            self._train.pace.pause(time.monotonic())
        self._eval = Track(name, _finite(sum(_as_list(batches))), None)
        self._eval_done = 0
        self._next_s = time.monotonic() + self._interval_s

    def _eval_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval_done += 1
        now_s = time.monotonic()
        if now_s >= self._next_s and self._eval is not None:
            self._next_s = now_s + self._interval_s
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
            self.draw(self._train)


class Track:
    """One thing that is under way: a training epoch, or a run over other data.

    Args:
        name: What it is called.
        total: How many batches it has; None when nobody knows.
        epoch: The training epoch that it is, from 0; None when it is none.
    """

    def __init__(self, name: str, total: int | None, epoch: int | None) -> None:
        self.name = name
        self.total = total
        self.epoch = epoch
        self.done = 0
        self.began_s = time.monotonic()
        self.pace = Pace()
        self.metrics: Mapping[str, Any] = {}

    def at(self, done: int, now_s: float, metrics: Mapping[str, Any]) -> None:
        """Take note of where it is."""
        self.done = done
        self.metrics = metrics
        self.pace.note(done, now_s)

    @property
    def count_text(self) -> str:
        """``120/360``; without a total ``120``."""
        return f"{self.done}" if self.total is None else f"{self.done}/{self.total}"

    @property
    def pace_text(self) -> str:
        """``87.3 it/s``, or ``2.1 s/it`` when slow; "" while unknown."""
        rate = self.pace.rate
        if rate is None:
            return ""
        return f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it"

    @property
    def left_text(self) -> str:
        """``0:12 left``; "" while unknown."""
        left_s = self.pace.left_s(self.total)
        return "" if left_s is None else f"{format_duration(left_s)} left"

    @property
    def metrics_text(self) -> str:
        """``loss 0.312  val_loss 0.29``, with 4 significant digits."""
        shown = ((name, value) for name, value in self.metrics.items() if name != "v_num")
        return "  ".join(f"{name} {format_value(value)}" for name, value in shown)


class PlainProgressBar(TimedProgressBar):
    """Progress as lines of text, for logs and pipes: at the end of each epoch, and at most every 5 seconds.

    Args:
        interval_s: Seconds between lines inside an epoch.
    """

    def __init__(self, interval_s: float = 5.0) -> None:
        super().__init__(interval_s)
        self._told_epoch = False
        self._last_line: tuple[Track, int] | None = None

    def draw(self, track: Track) -> None:
        """Write a line, if there is anything to tell."""
        if track.done == 0:
            if self._told_epoch:
                return
            self._told_epoch = True
        elif self._last_line == (track, track.done):
            return
        self._write(
            track, track.count_text if track.done else f"{track.total or '?'} batches", track.left_text
        )

    def finish(self, track: Track) -> None:
        """Write the last line of an epoch; what runs inside it leaves none."""
        if track.epoch is not None:
            seconds = time.monotonic() - track.began_s
            self._write(track, track.count_text, f"done in {format_duration(seconds)}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew: the first epoch of a run is announced."""
        super().setup(trainer, pl_module, stage)
        self._told_epoch = False
        self._last_line = None

    def _write(self, track: Track, *parts: str) -> None:
        self._last_line = (track, track.done)
        # The first line would have to wait for a whole interval otherwise.
        self._next_s = max(self._next_s, time.monotonic() + self._interval_s)
        texts = [*parts, track.pace_text, track.metrics_text]
        sys.stderr.write("  ".join([f"{track.name}:", *(text for text in texts if text)]) + "\n")
        sys.stderr.flush()


def default_progress_bar() -> ProgressBar:
    """Return a live bar when a person is watching a terminal, and plain lines otherwise."""
    watched = sys.stderr.isatty() or sys.stdout.isatty()
    if not watched or os.environ.get("TERM", "") in ("", "dumb"):
        return PlainProgressBar()
    from holdfast.callbacks.rich_progress_bar import RichProgressBar

    return RichProgressBar()


def format_duration(seconds: float) -> str:
    """Write seconds as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_value(value: Any) -> str:
    """Write a number with 4 significant digits, anything else as it is."""
    if hasattr(value, "item"):
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_list(batches: Any) -> list[int | float]:
    return list(batches) if isinstance(batches, Iterable) else [batches]


def _finite(total: int | float) -> int | None:
    return None if total == float("inf") else int(total)
