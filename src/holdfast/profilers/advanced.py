"""Which functions each action spent its time in, by Python's own profiler."""

from __future__ import annotations

import cProfile
import io
import pstats
from dataclasses import dataclass
from pathlib import Path

from holdfast.profilers.base import Profiler


@dataclass
class _Running:
    name: str
    profile: cProfile.Profile
    so_far: pstats.Stats | None = None


class AdvancedProfiler(Profiler):
    """Profiles each action with `cProfile`; what ran in an action inside another counts for both.

    Args:
        dirpath: Directory of the report's file; None for the first logger's directory.
        filename: Name of the report's file, without its ending; None writes the report to the log instead.
        line_count_restriction: How much of each action's list to show: a share (float) or a number of lines.
        dump_stats: Also write each action's profile to a file that `pstats` and its viewers read.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.profiled_actions: dict[str, pstats.Stats] = {}
        """The statistics of each action over all of its calls."""
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self._running: list[_Running] = []

    def start(self, action_name: str) -> None:
        """An action starts. One profile can run at a time, so the action around it is interrupted."""
        if self._running:
            _interrupt(self._running[-1])
        started = _Running(action_name, cProfile.Profile())
        self._running.append(started)
        started.profile.enable()

    def stop(self, action_name: str) -> None:
        """It stops.

        Raises:
            ValueError: it is not the one that was started last.
        """
        if not self._running or self._running[-1].name != action_name:
            raise ValueError(f"The profiler was told to stop {action_name!r}, which is not running.")
        ended = self._running.pop()
        _interrupt(ended)
        if ended.so_far is not None:
            known = self.profiled_actions.get(action_name)
            self.profiled_actions[action_name] = ended.so_far if known is None else known.add(ended.so_far)
        if self._running:
            outer = self._running[-1]
            if ended.so_far is not None:
                outer.so_far = _sum(outer.so_far, ended.so_far)
            outer.profile = cProfile.Profile()
            outer.profile.enable()

    def summary(self) -> str:
        """For each action the list of functions, the longest first."""
        texts = []
        for action_name, stats in self.profiled_actions.items():
            stream = io.StringIO()
            # A copy: what is dumped, and added to by a later run, keeps its directories.
            shown = pstats.Stats(stream=stream).add(stats).strip_dirs().sort_stats("cumulative")
            shown.print_stats(self.line_count_restriction)
            texts.append(f"Profile of {action_name}\n{stream.getvalue().strip()}")
        return f"{self._heading()}Profiler Report\n" + "\n\n".join(texts)

    def describe(self) -> None:
        """A run ended well: the report goes to the file or to the log, profiles to their files."""
        super().describe()
        if self.dump_stats:
            for action_name, stats in self.profiled_actions.items():
                name = "".join(each if each.isalnum() or each in "._" else "_" for each in action_name)
                stats.dump_stats(self._file(f"-{name}.prof"))

    def teardown(self, stage: str | None) -> None:
        """A run is over: nothing is profiled any more."""
        while self._running:
            self._running.pop().profile.disable()


def _interrupt(running: _Running) -> None:
    """Stop its profile and add what it holds to what there was."""
    running.profile.disable()
    running.profile.create_stats()
    if running.profile.stats:
        running.so_far = _sum(running.so_far, pstats.Stats(running.profile))


def _sum(one: pstats.Stats | None, other: pstats.Stats) -> pstats.Stats:
    return pstats.Stats().add(other) if one is None else one.add(other)
