"""What saving has cost so far, summed up over saves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from holdfast.checkpoint.report import SaveReport


@dataclass(frozen=True)
class SavingStats:
    """What saving has cost so far.

    Attributes:
        saves: checkpoints that became durable.
        failed: saves that ended in an error, or were given up.
        size_bytes: what was written in all.
        blocked_s: seconds for which saving kept the loop waiting, but for `waited_s`.
        waited_s: seconds for which a step of an optimizer waited for a copy to end.
        write_s: seconds of writing, in the background or not.
        deleted: files that made way.
        last: the report of the newest durable save, or None.
    """

    saves: int = 0
    failed: int = 0
    size_bytes: int = 0
    blocked_s: float = 0.0
    waited_s: float = 0.0
    write_s: float = 0.0
    deleted: int = 0
    last: SaveReport | None = None

    def __str__(self) -> str:
        """Three lines for a person."""
        speed = self.size_bytes / self.write_s / 1e9 if self.write_s > 0 else 0.0
        return (
            f"saves     {self.saves}, {self.failed} failed, {self.size_bytes:,} bytes, {speed:.3g} GB/s\n"
            f"the loop  blocked {self.blocked_s:.3f} s, before a step {self.waited_s:.3f} s\n"
            f"files     deleted {self.deleted}"
        )

    def with_durable(self, report: SaveReport, deleted: int) -> SavingStats:
        """The same after a save that is durable."""
        return replace(
            self,
            saves=self.saves + 1,
            size_bytes=self.size_bytes + report.size_bytes,
            waited_s=self.waited_s + report.waited_s,
            write_s=self.write_s + report.write_s,
            deleted=self.deleted + deleted,
            last=report,
        )
