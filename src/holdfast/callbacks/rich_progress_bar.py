"""The live progress bar, drawn with rich."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.timed_progress_bar import TimedProgressBar
from holdfast.callbacks.track import Track

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task, TaskID
    from rich.style import Style

    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


@dataclass
class RichProgressBarTheme:
    """How each part of `RichProgressBar` looks: rich's styles, as text (``"bold red"``) or ready made.

    Args:
        description: What is running.
        progress_bar: The part of the bar that is done.
        progress_bar_finished: The whole bar at the end.
        progress_bar_pulse: The bar when nobody knows how long it is.
        batch_progress: ``12/360``.
        time: The time left.
        processing_speed: Batches per second.
        metrics: The metrics.
        metrics_text_delimiter: What stands between two of them.
        metrics_format: How a float is written, as in ``format(value, ".4g")``.
    """

    description: str | Style = "bold"
    progress_bar: str | Style = "cyan"
    progress_bar_finished: str | Style = "green"
    progress_bar_pulse: str | Style = "cyan"
    batch_progress: str | Style = ""
    time: str | Style = "yellow"
    processing_speed: str | Style = "cyan"
    metrics: str | Style = "green"
    metrics_text_delimiter: str = "  "
    metrics_format: str = ".4g"


class RichProgressBar(TimedProgressBar):
    """A live bar: epoch, batches, batches per second, time left and metrics; validation as a second bar.

    It is drawn from the training loop itself, by the clock, without a thread. Lines that are printed or
    logged meanwhile appear above it. Override `configure_columns` to show other columns.

    Args:
        refresh_rate: 0 shows nothing. Any other number is accepted for compatibility: the bar is drawn by
            the clock, not every so many batches.
        leave: Leave a finished line behind for every epoch.
        theme: Colours, and how metrics are written.
        console_kwargs: Arguments for ``rich.console.Console``.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(interval_s=0.25)
        self._refresh_rate = refresh_rate
        self._leave = leave
        self.theme = RichProgressBarTheme() if theme is None else theme
        self._console_kwargs = console_kwargs
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if refresh_rate <= 0:
            self.disable()

    @property
    def refresh_rate(self) -> int:
        """The number that was given; 0 shows nothing."""
        return self._refresh_rate

    def enable(self) -> None:
        """Show everything again, unless ``refresh_rate`` is 0."""
        self._enabled = self._refresh_rate > 0

    # -- rich's side of it -----------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress | None:
        """Rich's display with a task for each bar; None while nothing runs."""
        self._catch_up()
        return self._progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self._progress = progress

    @property
    def train_progress_bar_id(self) -> TaskID | None:
        """The number of the training epoch's task; None while there is none."""
        return self._tasks.get("train")

    @property
    def val_sanity_progress_bar_id(self) -> TaskID | None:
        """The number of the sanity check's task."""
        return self._tasks.get("sanity")

    @property
    def val_progress_bar_id(self) -> TaskID | None:
        """The number of validation's task."""
        return self._tasks.get("validate")

    @property
    def test_progress_bar_id(self) -> TaskID | None:
        """The number of the test's task."""
        return self._tasks.get("test")

    @property
    def predict_progress_bar_id(self) -> TaskID | None:
        """The number of prediction's task."""
        return self._tasks.get("predict")

    @property
    def train_progress_bar(self) -> Task:
        """The training epoch's task: ``completed`` is the batches done, ``total`` those that it has."""
        return self._task("train")

    @property
    def val_sanity_check_bar(self) -> Task:
        """The sanity check's task."""
        return self._task("sanity")

    @property
    def val_progress_bar(self) -> Task:
        """Validation's task, over all its loaders."""
        return self._task("validate")

    @property
    def test_progress_bar(self) -> Task:
        """The test's task, over all its loaders."""
        return self._task("test")

    @property
    def predict_progress_bar(self) -> Task:
        """Prediction's task, over all its loaders."""
        return self._task("predict")

    @property
    def lines_drawn(self) -> int:
        """A line for each bar that is visible, while the display is live."""
        progress = self._progress
        if progress is None or not progress.live.is_started or not progress.console.is_terminal:
            return 0
        return sum(task.visible for task in progress.tasks)

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn | str]:
        """Return the columns of the display, left to right.

        Besides what rich itself knows of a task, ``task.fields`` has ``count``, ``pace``, ``left`` and
        ``metrics``, as text.
        """
        from rich.progress import BarColumn, TextColumn
        from rich.table import Column
        from rich.text import Text

        class OneLine(TextColumn):
            def render(self, task: Task) -> Text:
                text = super().render(task)
                text.no_wrap, text.overflow = True, "ellipsis"
                return text

        def text(what: str, style: str | Style, *, shrinks: bool = False) -> TextColumn:
            # Where there is too little room rich takes it from the columns that could wrap.
            column = Column(no_wrap=not shrinks)
            return OneLine(f"{{task.{what}}}", style=style, markup=False, table_column=column)

        theme = self.theme
        return [
            text("description", theme.description),
            BarColumn(
                bar_width=28,
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            text("fields[count]", theme.batch_progress),
            text("fields[pace]", theme.processing_speed),
            text("fields[left]", theme.time),
            text("fields[metrics]", theme.metrics, shrinks=True),
        ]

    def refresh(self) -> None:
        """Draw now, if anything is on the screen."""
        self._catch_up()
        if self._progress is not None and self._progress.live.is_started:
            self._progress.refresh()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        print(*args, **kwargs)
        self.refresh()

    # -- what is drawn when ----------------------------------------------------------------------------------

    def begin(self, track: Track) -> None:
        """Make the task, invisible until it is drawn, or set it back to its start."""
        if self._progress is None:
            self._progress = self._new_progress()
        kind = self._kind(track)
        if kind in self._tasks:
            self._progress.reset(self._tasks[kind], total=track.total)
        else:
            self._tasks[kind] = self._progress.add_task(track.name, total=track.total, visible=False)
        self._set(track)
        if track is not self._train and self._train is not None and "train" in self._tasks:
            self._set(self._train)  # it stands where training stands, not where it was drawn last

    def draw(self, track: Track) -> None:
        """Draw the bar as it is now."""
        self._show(track)

    def renew(self, track: Track) -> None:
        """Draw the values that validation brought."""
        self._show(track)

    def finish(self, track: Track) -> None:
        """Draw the end of an epoch and keep it until the next; take a bar inside of fit away."""
        if track.epoch is None and self.trainer.state.fn == "fit":
            self._set(track, visible=False)
            self.refresh()
            return
        self._show(track)
        if self._leave:
            self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back; a run that was told to leave left its bar where it stands."""
        if isinstance(exception, SystemExit) and self._train is not None:
            done = max(self._train.done, self._train_done)
            self._train.at(done, time.monotonic(), self.get_metrics(trainer, pl_module))
            self._set(self._train)
        super().on_exception(trainer, pl_module, exception)

    def shut(self) -> None:
        """Give the terminal back, with the bar as it was last."""
        super().shut()
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # A live display belongs to one process; a copy begins without.
        return {**self.__dict__, "_progress": None, "_tasks": {}, "_train": None, "_eval": None}

    def _show(self, track: Track) -> None:
        if self._progress is None:  # closed since, as `leave` does
            self.begin(track)
        self._set(track, visible=True)
        assert self._progress is not None
        self._progress.start()
        self._progress.refresh()

    def _set(self, track: Track, visible: bool | None = None) -> None:
        if self._progress is not None:
            roomy = self._progress.console.width >= 60
            self._progress.update(
                self._tasks[self._kind(track)],
                description=track.name,
                completed=track.done,
                visible=visible,
                count=track.count_text,
                pace=track.pace_text if roomy else "",
                left=track.left_text if roomy else "",
                metrics=track.metrics_as(self.theme.metrics_text_delimiter, self.theme.metrics_format),
            )

    def _kind(self, track: Track) -> str:
        if track.epoch is not None:
            return "train"
        if self.trainer.sanity_checking:
            return "sanity"
        fn = str(self.trainer.state.fn)
        return "validate" if fn == "fit" else fn

    def _task(self, kind: str) -> Task:
        progress = self.progress
        for task in [] if progress is None else progress.tasks:
            if task.id == self._tasks.get(kind):
                return task
        raise TypeError(
            f"{type(self).__name__} has no bar for {kind!r} yet: nothing that it would show has begun."
        )

    def _catch_up(self) -> None:
        """Bring the tasks, which are only touched when drawn, to where the run is."""
        for track, done in ((self._train, self._train_done), (self._eval, self._eval_done)):
            if self._progress is not None and track is not None and self._kind(track) in self._tasks:
                self._progress.update(self._tasks[self._kind(track)], completed=done)

    def _close(self) -> None:
        if self._progress is not None and self._progress.live.is_started:
            self._progress.stop()
        self._progress = None
        self._tasks = {}

    def _new_progress(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress

        # Only a terminal is redirected: what goes to a file is to arrive there.
        on_stderr, on_stdout = sys.stderr.isatty(), sys.stdout.isatty()
        settings: dict[str, Any] = {"stderr": on_stderr or not on_stdout, **(self._console_kwargs or {})}
        return Progress(
            *self.configure_columns(self.trainer),
            console=Console(**settings),
            auto_refresh=False,
            redirect_stdout=on_stdout,
            redirect_stderr=on_stderr,
        )
