"""The live progress bar, drawn with rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.timed_progress_bar import TimedProgressBar
from holdfast.callbacks.track import Track

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class RichProgressBar(TimedProgressBar):
    """A live bar: epoch, batches, batches per second, time left and metrics; validation as a second bar.

    It is drawn from the training loop itself, by the clock, without a thread. Lines that are printed or
    logged meanwhile appear above it.

    Args:
        refresh_rate: 0 shows nothing. Any other number is accepted for compatibility: the bar is drawn by
            the clock, not every so many batches.
        leave: Leave a finished line behind for every epoch.
        console_kwargs: Arguments for ``rich.console.Console``.
    """

    def __init__(
        self, refresh_rate: int = 1, leave: bool = False, console_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(interval_s=0.25)
        self._refresh_rate = refresh_rate
        self._leave = leave
        self._console_kwargs = console_kwargs
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if refresh_rate == 0:
            self.disable()

    @property
    def refresh_rate(self) -> int:
        """The number that was given; 0 shows nothing."""
        return self._refresh_rate

    def enable(self) -> None:
        """Show everything again, unless ``refresh_rate`` is 0."""
        self._enabled = self._refresh_rate > 0

    def draw(self, track: Track) -> None:
        """Draw the bar as it is now."""
        self._show(track)

    def renew(self, track: Track) -> None:
        """Draw the values that validation brought."""
        self._show(track)

    def finish(self, track: Track) -> None:
        """Draw the end of an epoch and keep it until the next; take a bar inside of fit away."""
        if track.epoch is None and self.trainer.state.fn == "fit":
            task = self._tasks.pop("eval", None)
            if task is not None and self._progress is not None:
                self._progress.remove_task(task)
                self._progress.refresh()
            return
        self._show(track)
        if self._leave:
            self._close()

    def shut(self) -> None:
        """Give the terminal back, with the bar as it was last."""
        super().shut()
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        print(*args, **kwargs)
        if self._progress is not None:
            self._progress.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # A live display belongs to one process; a copy begins without.
        return {**self.__dict__, "_progress": None, "_tasks": {}, "_train": None, "_eval": None}

    def _show(self, track: Track) -> None:
        if self._progress is None:
            self._progress = _new_progress(self._console_kwargs)
            self._progress.start()
        kind = "eval" if track.epoch is None else "train"
        if kind not in self._tasks:
            self._tasks[kind] = self._progress.add_task(track.name, **_no_fields())
        self._progress.update(
            self._tasks[kind],
            description=track.name,
            completed=track.done,
            # Without a total the bar only pulses.
            total=track.total,
            count=track.count_text,
            pace=track.pace_text,
            left=track.left_text,
            metrics=track.metrics_text,
        )
        self._progress.refresh()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._tasks = {}


def _no_fields() -> dict[str, Any]:
    return {"total": None, "count": "", "pace": "", "left": "", "metrics": ""}


def _new_progress(console_kwargs: dict[str, Any] | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(name: str, style: str = "none") -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis")
        return TextColumn(f"{{task.fields[{name}]}}", style=style, markup=False, table_column=column)

    # Only a terminal is redirected: what goes to a file is to arrive there.
    on_stderr, on_stdout = sys.stderr.isatty(), sys.stdout.isatty()
    settings: dict[str, Any] = {"stderr": on_stderr or not on_stdout, **(console_kwargs or {})}
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=28, complete_style="cyan", finished_style="green", pulse_style="cyan"),
        text("count"),
        text("pace", "cyan"),
        text("left", "yellow"),
        text("metrics", "green"),
        console=Console(**settings),
        auto_refresh=False,
        redirect_stdout=on_stdout,
        redirect_stderr=on_stderr,
    )
