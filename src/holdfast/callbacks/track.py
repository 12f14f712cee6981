"""Where one thing that is under way is, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


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
        """``0:12 left``; "" while unknown, and at the end."""
        left_s = self.pace.left_s(self.total)
        return "" if left_s is None or self.done == self.total else f"{format_duration(left_s)} left"

    @property
    def metrics_text(self) -> str:
        """``loss 0.312  val_loss 0.29``, with 4 significant digits."""
        return self.metrics_as("  ", ".4g")

    def metrics_as(self, delimiter: str, number_format: str) -> str:
        """The metrics in one line, with what to put between them and how to write a float."""
        shown = ((name, value) for name, value in self.metrics.items() if name != "v_num")
        return delimiter.join(f"{name} {format_value(value, number_format)}" for name, value in shown)


def format_duration(seconds: float) -> str:
    """Write seconds as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_value(value: Any, number_format: str = ".4g") -> str:
    """Write a float with 4 significant digits, or as ``number_format`` says, and anything else as it is."""
    if hasattr(value, "item"):
        value = value.item()
    return format(value, number_format) if isinstance(value, float) else str(value)
