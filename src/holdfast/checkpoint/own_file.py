"""Whether a file is one of ours, and the words for one that is damaged; needs no torch."""

from __future__ import annotations

import os

from holdfast.checkpoint import container, origin
from holdfast.errors import CheckpointCorrupt, CheckpointIncompatible, CheckpointIncomplete


def own_tail(found: origin.Origin) -> container.Tail | None:
    """The tail of a whole file of ours; None for a file that somebody else wrote.

    Raises:
        CheckpointIncomplete: it is ours and was cut short.
        CheckpointIncompatible: a newer holdfast wrote it.
    """
    name, fd = found.name, found.file.fileno()
    try:
        tail = container.read_tail(fd)
    except container.NotWhole as problem:
        if problem.ours or container.has_mark(fd):
            raise CheckpointIncomplete(
                f"{os.path.basename(name)} is not a whole checkpoint: {problem.reason}.{_newest(found)}",
                path=name,
            ) from None
        return None
    version = tail.summary["format"]
    if version > container.FORMAT:
        raise CheckpointIncompatible(
            f"{os.path.basename(name)} has format {version}; this holdfast reads formats up to "
            f"{container.FORMAT}. Update holdfast to read it.",
            path=name,
        )
    return tail


def corrupt(found: origin.Origin, what: object) -> CheckpointCorrupt:
    """The error for a file with bytes in it that are not those that were written.

    Args:
        found: The file.
        what: The middle of a sentence about it.
    """
    name = found.name
    return CheckpointCorrupt(f"{os.path.basename(name)} is corrupt: {what}.{_newest(found)}", path=name)


def no_checkpoint(name: str, head: bytes) -> CheckpointIncomplete:
    """The error for a file that nobody's checkpoint begins like.

    Args:
        name: The file.
        head: Its first bytes.
    """
    what = f"begins with {head!r}" if head else "is empty"
    return CheckpointIncomplete(f"{os.path.basename(name)} is not a checkpoint: it {what}.", path=name)


def _newest(found: origin.Origin) -> str:
    return origin.newest_beside(found.name) if found.local else ""
