"""Where a stopped run parts from the one that never stopped."""

from __future__ import annotations

import csv
import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path

from holdfast.testing import wording
from holdfast.testing.events import BATCH_END, Event, Key, Parting, Tables, Tale


class Comparison:
    """Holds the lives of the stopped run against the run that never stopped.

    Args:
        whole: The run that never stopped.
        ignore: Names, or patterns of them, of logged values that may differ.
    """

    def __init__(self, whole: Tale, ignore: Iterable[str] = ()) -> None:
        self.whole = whole.events
        self.fits = len(whole.starts)
        self.ignore = tuple(ignore)
        self.at = {event.key: index for index, event in enumerate(self.whole)}
        self.reached = -1
        """The last of the events that a life has come to."""
        self.compared = 0
        """Training batches that were compared."""

    def compare(self, tale: Tale) -> Parting | None:
        """The first difference in one life of the stopped run; None where there is none."""
        last: int | None = None
        for event in tale.events:
            expected = self._expected(event.key, last)
            index = self.at.get(event.key)
            if index is None or index != expected:
                return self._another_course(expected, event.where(self.fits))
            differing = self._differing(self.whole[index], event)
            if differing:
                return wording.parting(self.whole[index], event, differing, event.where(self.fits))
            self.compared += event.key.kind == BATCH_END
            self.reached, last = max(self.reached, index), index
        if tale.stopped is not None or (
            self.reached + 1 == len(self.whole) and len(tale.starts) == self.fits
        ):
            return None
        return self._another_course(self.reached + 1, "its end")

    def _expected(self, key: Key, last: int | None) -> int:
        """Where the event has to be: behind the one before it; at a start, behind all that was reached."""
        if last is not None and self.whole[last].key.fit == key.fit:
            return last + 1
        index = self.at.get(key)
        begins = next((i for i, event in enumerate(self.whole) if event.key.fit == key.fit), 0)
        # What was done behind the checkpoint is done again.
        return index if index is not None and index <= max(self.reached + 1, begins) else self.reached + 1

    def _another_course(self, expected: int, found: str) -> Parting:
        own = self.whole[expected].where(self.fits) if expected < len(self.whole) else "its end"
        what = f"next comes {own} in the run that never stopped, {found} in the stopped one"
        return Parting(own if found == "its end" else found, (what,), wording.ANOTHER_COURSE)

    def _differing(self, whole: Event, stopped: Event) -> dict[str, list[str]]:
        """Category -> the names of what differs, for those where something does."""
        found: dict[str, list[str]] = {}
        for category in {**whole.values, **stopped.values}:
            mine, theirs = whole.values.get(category, {}), stopped.values.get(category, {})
            names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            if category == "logged value":
                names = [name for name in names if not _matches(name, self.ignore)]
            if names:
                found[category] = names
        return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def differing_tables(whole: Tale, stopped: Tale, ignore: Sequence[str] = ()) -> Parting | None:
    """The first row in which the CSV files that both runs have logged to differ."""
    tables = [message for message in whole.messages if isinstance(message, Tables)]
    for path in dict.fromkeys(path for table in tables for path in table.paths):
        mine, theirs = (_rows(Path(tale.life.root) / path, ignore) for tale in (whole, stopped))
        if mine is None or theirs is None or mine == theirs:
            continue
        differing = (index for index, (one, other) in enumerate(zip(mine, theirs)) if one != other)
        number = next(differing, min(len(mine), len(theirs)))
        one, other = (rows[number] if number < len(rows) else "no such row" for rows in (mine, theirs))
        what = f"row {number + 1}: {one} in the run that never stopped, {other} in the stopped one"
        return Parting(path, (what,), wording.ANOTHER_ROW)
    return None


def _rows(path: Path, ignore: Sequence[str]) -> list[dict[str, str]] | None:
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: value for name, value in row.items() if value and not _matches(name, ignore)}
            for row in csv.DictReader(file)
        ]
