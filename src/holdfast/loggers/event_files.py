"""TensorBoard's event files under a directory: how far they go, and back to where they went.

Event files are only ever appended to, so their sizes at one moment say what belongs to it. Purging by step,
as TensorBoard's own marker for a restart does, cannot: the last values before a checkpoint and the first
ones after it may have the same step, and validation counts steps of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping

from holdfast.utilities.rank_zero import rank_zero_warn

_MARK = "tfevents"
_OTHER_RUN = re.compile(r"version_\d+")  # as `VersionedLogger` calls the directories of runs
_LONGEST_WAIT_S = 2


def sizes(directory: str) -> dict[str, int]:
    """Return the size in bytes of each event file below ``directory``, by its path from there.

    Below a run whose version is "" lie those of other runs, in ``version_N``, which are none of its own.
    """
    found = {}
    for place, below, names in os.walk(directory):
        below[:] = [name for name in below if not _OTHER_RUN.fullmatch(name)]
        for name in names:
            if _MARK in name:
                path = os.path.join(place, name)
                with contextlib.suppress(FileNotFoundError):  # somebody tidies up
                    found[os.path.relpath(path, directory)] = os.path.getsize(path)
    return found


def cut_back(directory: str, kept: Mapping[str, int], marks: Collection[str] | None = None) -> None:
    """Make the event files below ``directory`` those that `sizes` returned as ``kept``.

    What was written since is cut off, files that came since are removed. What is missing is said.

    Args:
        directory: Where the run logs.
        kept: The files and their sizes at the moment to go back to.
        marks: What the names of the run's own files hold: others that came since are another run's, and stay.
            None for a run that marked none.
    """
    found = sizes(directory)
    for name, size in found.items():
        path = os.path.join(directory, name)
        if name not in kept:
            if marks is None or marked([name], marks):
                os.remove(path)
        elif size > kept[name]:
            os.truncate(path, kept[name])
    for name, size in kept.items():
        if found.get(name, 0) < size:
            rank_zero_warn(
                f"{os.path.join(directory, name)} has {found.get(name, 0)} bytes; it had {size} when the "
                "checkpoint was written. The missing ones were lost before the resume."
            )


def marked(names: Iterable[str], marks: Collection[str]) -> list[str]:
    """Return the event files whose names hold one of the marks."""
    return [name for name in names if any(mark in os.path.basename(name) for mark in marks)]


def wait_for_a_later_name(directory: str) -> None:
    """Return when an event file made now is read after those that are there already.

    TensorBoard reads them in the order of their names, which begin with the second in which they were made.
    """
    newest = max(map(_second, sizes(directory)), default=0)
    ahead = newest + 1 - time.time()
    if 0 < ahead <= _LONGEST_WAIT_S:
        time.sleep(ahead)
    elif ahead > 0:
        rank_zero_warn(
            f"The clock is {ahead:.0f} seconds behind the newest event file in {directory}: TensorBoard will "
            "show what is logged from here on before what that file holds."
        )


def _second(path: str) -> int:
    digits = os.path.basename(path).partition(f"{_MARK}.")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else 0
