"""The state of a loader that has one: what a checkpoint takes of it, and how it is put back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch.utils.data import DataLoader

from holdfast.training import rng, workers
from holdfast.training.replay import described
from holdfast.utilities.rank_zero import rank_zero_warn

_AT_START = object()


class LoaderState:
    """Where a loader with ``state_dict`` and ``load_state_dict`` stands, in an epoch and between two.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.ended = False
        """Whether the loader has said that its epoch is over."""
        self._ahead: Any = None
        self._cut: dict[str, Any] | None = None
        self._restored: dict[str, Any] = {}

    def begin(self) -> None:
        """An epoch begins, or is gone on with."""
        self.ended, self._cut, self._restored = False, None, {}

    # -- what a checkpoint takes -----------------------------------------------------------------------------

    def note_position(self, *, at_start: bool) -> None:
        """Keep the position as it is: the batch that is about to be fetched counts later."""
        self._ahead = _AT_START if at_start else self.loader.state_dict()

    def note_cut(self, seed: int) -> None:
        """The loop stops after the batch that comes now: keep what brings the loader to where that leaves it.

        It is left without being told that its epoch is over, in a state from which it begins anew. Putting
        back what it says then would have it go on instead. So keep what it says one batch before, which a
        resumed run puts back, to read that one batch and leave it as this run does.

        Args:
            seed: What the batch's random numbers come from.
        """
        self._cut = {"loader": copy.deepcopy(self.loader.state_dict()), "seed": seed}

    def between_epochs(self) -> dict[str, Any]:
        """What the loader may need for the epoch after this one."""
        if self._restored:
            return self._restored
        if self.ended:
            return {"loader": self.loader.state_dict()}
        return {} if self._cut is None else {"cut": self._cut}

    def in_epoch(self) -> dict[str, Any]:
        """What brings it to its position."""
        if self._ahead is _AT_START:
            return {}
        return {"loader": self.loader.state_dict() if self._ahead is None else self._ahead}

    # -- and puts back ---------------------------------------------------------------------------------------

    def fits(self, now: dict[str, Any]) -> bool:
        """Whether it can take back a state: that of a DataLoader is for one number of workers alone."""
        if now.get("of_another_rank"):
            return False
        then = now.get("workers")
        return not isinstance(self.loader, DataLoader) or then in (None, self.loader.num_workers)

    def restore_between_epochs(self, now: dict[str, Any]) -> None:
        """Bring the loader to where it stood between two epochs."""
        if "loader" not in now and "cut" not in now and not now.get("of_another_rank"):
            return
        if not self.fits(now):
            self.warn_of_workers(now, "begins its next epoch as it would begin the first one")
            return
        # What it says by itself until it is begun may differ: it has been read to bring it there.
        self._restored = {key: now[key] for key in ("loader", "cut") if key in now}
        if "loader" in now:
            self.loader.load_state_dict(now["loader"])
            if isinstance(self.loader, DataLoader) and self.loader.num_workers == 0:
                # At once, since it does so with iterators that draw from the generators that it has.
                with rng.apart(0):
                    iter(self.loader)
        else:
            cut = now["cut"]
            with rng.apart(cut["seed"]):
                self.loader.load_state_dict(cut["loader"])
                batches = workers.start(self.loader)
                rng.seed_generators(cut["seed"])
                next(batches, None)

    def warn_of_workers(self, now: dict[str, Any], what: str) -> None:
        """Say that it cannot take a state back, and what it does instead."""
        if now.get("of_another_rank"):
            warnings.warn(
                f"The checkpoint is of a job with fewer processes, and holds no state of this one's "
                f"{described(self.loader)}. So it {what}: rows may come twice or be left out.",
                stacklevel=2,
            )
            return
        rank_zero_warn(
            f"{described(self.loader)} had {now['workers']} workers and has {self.loader.num_workers}. Its "
            f"state is for that number alone, so it {what}: rows may come twice or be left out."
        )
