"""Which tensors may be copied while training already goes on: what was seen of them decides."""

from __future__ import annotations

from collections.abc import Collection

from holdfast.checkpoint.device_copy import DeviceComparison
from holdfast.errors import HoldfastError
from holdfast.utilities.rank_zero import rank_zero_warn

PASSES = 2
_MOST_NAMES = 200_000  # a payload whose names change from save to save must not pile them up


class SnapshotChanged(HoldfastError):
    """Tensors were changed while they were copied: that snapshot is not one moment, and was thrown away.

    Attributes:
        names: the tensors, as they are called in the payload. The engine copies them at once from now on.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(
            f"{', '.join(names)} changed while being copied, so that checkpoint was given up. Save again; "
            "from now on what changed is copied before training goes on."
        )
        self.names = tuple(names)


class Trust:
    """What is known of tensors, by their names in the payload.

    One is trusted when `PASSES` snapshots, copied at once, still equalled it byte for byte when training came
    to wait for a copy: then nothing but an optimizer's step changes it. It is never trusted again once it was
    caught changing at another time; and if that cost a save, all others have to earn their trust anew.

    Attributes:
        later: comparisons whose outcome is still on a device.
    """

    def __init__(self) -> None:
        self.later: list[DeviceComparison] = []
        self._passes: dict[str, int] = {}
        self._never: set[str] = set()
        self._untold: list[tuple[list[str], bool]] = []

    def allows(self, name: str) -> bool:
        """Whether it may be copied late."""
        return self._passes.get(name, 0) >= PASSES

    def may_earn(self, name: str) -> bool:
        """Whether it is worth comparing."""
        return name not in self._never

    def passed(self, names: Collection[str]) -> None:
        """Count that these were seen unchanged."""
        if len(self._passes) > _MOST_NAMES:
            self._passes = {}
        for name in names:
            if name not in self._never:
                self._passes[name] = self._passes.get(name, 0) + 1

    def learn(self) -> None:
        """Take in what devices found out; for the background."""
        while self.later:
            comparison = self.later.pop(0)
            self.lose(comparison.changed(), lost_save=False)
            self.passed(comparison.names)

    def lose(self, names: Collection[str], *, lost_save: bool) -> None:
        """Never trust these again; `tell` says so once."""
        if lost_save:
            # The next save must not be lost as well to the next tensor: all are compared anew first.
            self._passes = {}
        new = [name for name in names if name not in self._never]
        for name in new:
            self._never.add(name)
            self._passes.pop(name, None)
        if new:
            self._untold.append((new, lost_save))

    def tell(self) -> None:
        """Warn of what lost its trust since the last time; for the thread that the user is in."""
        while self._untold:
            names, lost_save = self._untold.pop(0)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(names[:3]) + more
            was, it = ("were", "them") if len(names) > 1 else ("was", "it")
            if lost_save:
                rank_zero_warn(
                    f"{listed} {was} changed while a checkpoint copied {it}, by something other than a step "
                    "of an optimizer. That checkpoint was given up and older ones are untouched; from now on "
                    f"checkpoints copy {it} before training goes on."
                )
            else:
                rank_zero_warn(
                    f"{listed} {was} changed between two steps of the optimizer, by something else. No "
                    f"checkpoint is wrong: they copy {it} before training goes on, now and from now on."
                )
