"""Progress as lines of text."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from holdfast.callbacks.timed_progress_bar import TimedProgressBar
from holdfast.callbacks.track import Track, format_duration

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


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
        ahead = f"{track.total or '?'} {'batch' if track.total == 1 else 'batches'}"
        self._write(track, track.count_text if track.done else ahead, track.left_text)

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
        texts = [text for text in (*parts, track.pace_text, track.metrics_text) if text]
        sys.stderr.write(f"{track.name}: {'  '.join(texts)}\n")
        sys.stderr.flush()
