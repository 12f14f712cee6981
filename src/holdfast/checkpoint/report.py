"""What a save did and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.utilities.rank_zero import warn_once


@dataclass(frozen=True)
class SaveReport:
    """What one save did.

    Attributes:
        path: the final name.
        names: the further names that hold the same content now.
        links: for each of them, how: "reflink", "hard link", "symlink", "copy" or "same".
        size_bytes: length of the file.
        blocked_s: seconds for which the caller waited in the call, `queued_s` included.
        durable_s: seconds from the call until the file and its directory were on disk.
        omissions: (path, reason) of each value that could not be stored.
        background: whether the file was written after the call had returned.
        queued_s: seconds for which the call waited for the save before it.
        waited_s: seconds for which training waited for the rest of the copy before it changed the tensors.
        write_s: seconds of writing, until the file was on disk.
        attempts: how often the file was written; more than 1 after failures that a retry got over.
    """

    path: str
    names: tuple[str, ...]
    size_bytes: int
    blocked_s: float
    durable_s: float
    omissions: list[tuple[str, str]] = field(default_factory=list)
    links: tuple[str, ...] = ()
    background: bool = False
    queued_s: float = 0.0
    waited_s: float = 0.0
    write_s: float = 0.0
    attempts: int = 1

    @property
    def gb_per_s(self) -> float:
        """Size over the time of writing, in units of 10^9 bytes a second; 0 where that time is unknown."""
        return self.size_bytes / self.write_s / 1e9 if self.write_s > 0 else 0.0


def tell_omissions(omissions: list[tuple[str, str]]) -> None:
    """Warn once of each value that is not in a checkpoint, with the reason."""
    for where, reason in omissions:
        warn_once(("omitted", where), f"{where} is not in the checkpoint: {reason}")
