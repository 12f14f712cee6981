"""What saving cost a run: the sums, the last reports, and how much slower steps were meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.save_line import format_seconds, format_size

if TYPE_CHECKING:
    from holdfast.checkpoint.report import SaveReport
    from holdfast.training.progress import Progress

_KEPT_REPORTS = 100
_ENOUGH_STEPS = 3


class CheckpointStats:
    """What the saves of the current or last fit cost; ``print(trainer.checkpoint_stats)`` shows it.

    Attributes:
        saves: files that were saved; further names of one file do not count.
        size_bytes: their length, added up.
        blocked_s: seconds for which training stood still until a save was under way; for one in the
            foreground, until it was durable.
        queued_s: seconds for which it waited for the save before to end, or, where training ends, the last.
        waited_s: seconds for which steps waited until the snapshot had been taken.
        durable_s: seconds from each save's start until it was on disk, added up.
        deleted: files that were deleted to make way.
        failed: saves that came to nothing.
        discarded: snapshots that were thrown away since tensors changed while they were copied.
        reports: the last hundred saves, oldest first.
    """

    def __init__(self) -> None:
        self.saves = 0
        self.size_bytes = 0
        self.blocked_s = 0.0
        self.queued_s = 0.0
        self.waited_s = 0.0
        self.durable_s = 0.0
        self.deleted = 0
        self.failed = 0
        self.discarded = 0
        self.reports: deque[SaveReport] = deque(maxlen=_KEPT_REPORTS)
        self._write_s = 0.0
        self._clock = _StepClock()

    @property
    def gb_per_s(self) -> float:
        """Bytes over the time of writing them, in units of 10^9 bytes a second; 0 before the first save."""
        return self.size_bytes / self._write_s / 1e9 if self._write_s > 0 else 0.0

    @property
    def slowdown_s(self) -> float | None:
        """Seconds by which steps took longer while a file was written than while none was.

        From the clock at the beginning and end of each save, of validation and of an epoch's batches; waiting
        for a snapshot is not in it. None where there are too few steps of either kind to compare.
        """
        return self._clock.slowdown_s()

    def add(self, report: SaveReport) -> None:
        """Take in a save that is durable."""
        self.saves += 1
        self.size_bytes += report.size_bytes
        self.blocked_s += report.blocked_s - report.queued_s
        self.queued_s += report.queued_s
        self.waited_s += report.waited_s
        self.durable_s += report.durable_s
        self._write_s += report.write_s if report.write_s > 0 else report.durable_s
        self._clock.leave_out(report.waited_s)
        self.reports.append(report)

    def figures(self) -> dict[str, Any]:
        """Return all that it counts, for `take` in another process; the clock of steps stays."""
        return {name: value for name, value in vars(self).items() if name != "_clock"}

    def take(self, figures: dict[str, Any]) -> None:
        """Take over what another process has counted of the same saves."""
        vars(self).update(figures)

    # -- the clock: called where batches, a validation, a save begin or end, never in between ----------------

    def steps_begin(self, progress: Progress, *, writing: bool) -> None:
        """Batches follow; ``writing`` says whether a file is being written meanwhile."""
        self._clock.begin(progress.total_batches, writing)

    def steps_end(self, progress: Progress) -> None:
        """Something else follows than batches."""
        self._clock.end(progress.total_batches)

    @contextmanager
    def aside(self, progress: Progress, in_flight: Sequence[object]) -> Iterator[None]:
        """A context whose time is no step's; what follows is told apart by whether a save is in flight."""
        stepping = self._clock.running
        self.steps_end(progress)
        try:
            yield
        finally:
            if stepping:
                self.steps_begin(progress, writing=bool(in_flight))

    def __str__(self) -> str:
        if not self.saves and not self.failed:
            return "nothing was saved"
        mean = self.durable_s / self.saves if self.saves else 0.0
        slowdown = self.slowdown_s
        lines = [
            f"saves     {self.saves}, {format_size(self.size_bytes)}, {self.gb_per_s:.2g} GB/s, durable "
            f"after {format_seconds(mean)} on average",
            f"training  blocked {format_seconds(self.blocked_s)}, behind other saves "
            f"{format_seconds(self.queued_s)}, before a step {format_seconds(self.waited_s)}"
            + ("" if slowdown is None else f", steps slower by {format_seconds(slowdown)}"),
        ]
        others = {
            f"deleted {self.deleted}": self.deleted,
            f"failed {self.failed}": self.failed,
            f"thrown away {self.discarded}": self.discarded,
        }
        told = [text for text, count in others.items() if count]
        return "\n".join([*lines, f"files     {', '.join(told)}"] if told else lines)


class _StepClock:
    """The time of steps, those during which a file was written apart from the others."""

    def __init__(self) -> None:
        self._seconds = {False: 0.0, True: 0.0}
        self._steps = {False: 0, True: 0}
        self._since: tuple[float, int, bool] | None = None

    @property
    def running(self) -> bool:
        return self._since is not None

    def begin(self, steps: int, writing: bool) -> None:
        self._since = time.monotonic(), steps, writing

    def end(self, steps: int) -> None:
        if self._since is not None:
            began, before, writing = self._since
            self._since = None
            if steps > before:
                self._seconds[writing] += time.monotonic() - began
                self._steps[writing] += steps - before

    def leave_out(self, waited_s: float) -> None:
        self._seconds[True] = max(self._seconds[True] - waited_s, 0.0)

    def slowdown_s(self) -> float | None:
        if self._steps[False] < _ENOUGH_STEPS or not self._steps[True]:
            return None
        usual = self._seconds[False] / self._steps[False]
        return max(self._seconds[True] - self._steps[True] * usual, 0.0)
