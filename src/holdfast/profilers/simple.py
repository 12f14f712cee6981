"""How long each action took, by the clock."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

from holdfast.profilers.base import Profiler


class SimpleProfiler(Profiler):
    """Adds up the time of each action and shows a table at the end, longest first.

    Actions lie inside each other, so the shares do not add up to 100 %.

    Args:
        dirpath: Directory of the report's file; None for the first logger's directory.
        filename: Name of the report's file, without its ending; None writes the report to the log instead.
        extended: Show the number of calls and the share of the time as well.
    """

    def __init__(
        self, dirpath: str | Path | None = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.current_actions: dict[str, float] = {}
        """When each action that is running was started, in seconds of `time.monotonic`."""
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        """The seconds that each call of an action took."""
        self.extended = extended
        self.start_time = time.monotonic()

    def start(self, action_name: str) -> None:
        """An action starts.

        Raises:
            ValueError: it is running already.
        """
        if action_name in self.current_actions:
            raise ValueError(f"The profiler was told to start {action_name!r}, which is running already.")
        self.current_actions[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        """It stops.

        Raises:
            ValueError: it is not running.
        """
        ended = time.monotonic()
        if action_name not in self.current_actions:
            raise ValueError(f"The profiler was told to stop {action_name!r}, which is not running.")
        self.recorded_durations[action_name].append(ended - self.current_actions.pop(action_name))

    def summary(self) -> str:
        """The table."""
        total_s = time.monotonic() - self.start_time
        ordered = sorted(self.recorded_durations.items(), key=lambda item: sum(item[1]), reverse=True)
        calls = sum(len(durations) for durations in self.recorded_durations.values())
        header = ["Action", "Mean (s)", "Calls", "Total (s)", "Share"]
        rows = [["Total", "-", str(calls), f"{total_s:.5g}", "100 %"]]
        for action, durations in ordered:
            spent = sum(durations)
            rows.append(
                [
                    action,
                    f"{spent / len(durations):.5g}",
                    str(len(durations)),
                    f"{spent:.5g}",
                    f"{spent / total_s:.2%}".replace("%", " %"),
                ]
            )
        if not self.extended:
            header, rows = [header[0], header[1], header[3]], [[r[0], r[1], r[3]] for r in rows]
        return f"{self._heading()}Profiler Report\n" + table(header, rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return " | ".join(padded).rstrip()

    return "\n".join([line(header), "-+-".join("-" * width for width in widths), *map(line, rows)])
