"""Several loaders as the loops read them: a batch of each at a time, in a known order, from any position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from holdfast.training.data import BatchStream
from holdfast.training.sharding import grid_of
from holdfast.utilities.combined_loader import CombinedLoader, Rounds, combined_length, could_be_iterated
from holdfast.utilities.rank_zero import rank_zero_warn


def as_one_loader(loaders: Any, mode: str) -> Any:
    """One loader as it is; several, in any nesting, as a `CombinedLoader` with this mode."""
    return CombinedLoader(loaders, mode) if _are_several(loaders) else loaders  # type: ignore[arg-type]


def _are_several(loaders: Any) -> bool:
    """Whether all that is in a collection are loaders: a list of batches is one loader."""
    if not isinstance(loaders, (dict, list, tuple)) or not loaders:
        return False
    children = list(loaders.values()) if isinstance(loaders, dict) else list(loaders)
    return all(_is_loader(child) or _are_several(child) for child in children)


def _is_loader(item: Any) -> bool:
    if isinstance(item, (DataLoader, CombinedLoader)):
        return True
    # A tuple or a dict is a batch, or holds loaders.
    return could_be_iterated(item) and hasattr(item, "__iter__") and not isinstance(item, (tuple, dict))


class CombinedStream:
    """A `CombinedLoader` as the loops read it: of each of its loaders a stream, sought as if it were alone.

    Args:
        combined: The loader, in any mode but "sequential".
        stage: Part of the seed of each batch, as for `BatchStream`.
        more: What else each `BatchStream` is given.
    """

    stateful = False

    def __init__(self, combined: CombinedLoader, *, stage: str, **more: Any) -> None:
        self.combined = combined
        self._more = more
        self.loader = combined.iterables
        self.parts = [
            BatchStream(loader, stage=stage, index=index, **more)
            for index, loader in enumerate(combined.flattened)
        ]
        self._epoch = 0
        self._begun = [0] * len(self.parts)
        """How often each was begun again in this epoch."""
        self._given = [0] * len(self.parts)
        """Batches of this epoch that each gave before it was begun last."""
        self._rounds: Rounds | None = None
        self.limit: int | float = math.inf
        """Rounds after which the loop stops reading an epoch."""
        self._before: list[tuple[int, int]] | None = None
        """While the loop is one batch ahead: how often each was begun, and its position, before that one."""

    def another(self, stage: str) -> CombinedStream:
        """A stream over the same loaders, with seeds of its own; this one stays where it is."""
        return CombinedStream(self.combined, stage=stage, **self._more)

    def describe(self) -> dict[str, Any]:
        """What `BatchStream.describe` says of each loader."""
        return {"kind": "combined", "parts": [part.describe() for part in self.parts]}

    def length(self) -> int | None:
        """Number of batches in an epoch, or None where the loaders cannot tell."""
        lengths = [part.length() for part in self.parts]
        total = combined_length([math.inf if n is None else n for n in lengths], self.combined.mode)
        return None if math.isinf(total) else int(total)

    # -- the state ------------------------------------------------------------------------------------------

    def begin_state(self) -> dict[str, Any]:
        """What every part draws its epoch from."""
        return {"parts": [part.begin_state() for part in self.parts]}

    def restore_begin(self, state: dict[str, Any]) -> None:
        """Put the loaders' own generators and samplers back."""
        for part, saved in zip(self.parts, state.get("parts", []), strict=False):
            part.restore_begin(saved)

    def state(self, mid_epoch: bool) -> dict[str, Any]:
        """The data's part of a checkpoint; ``mid_epoch`` says that an epoch is under way."""
        parts = [part.state(mid_epoch) for part in self.parts]
        state: dict[str, Any] = {
            "now": {"parts": [part["now"] for part in parts]},
            "begin": None,
            "batch_size": None,
        }
        state |= {"order": parts[0]["order"]} if parts and "order" in parts[0] else {}
        rounds = self._rounds
        if mid_epoch and rounds is not None:
            state["begin"] = {"parts": parts}
            state["begun"] = list(self._begun)
            state["ended"], state["at_end"] = list(rounds.ended), list(rounds.at_end)
            state["taken"] = list(rounds.taken)
            for index, part in enumerate(parts):
                # A batch that waits to be trained on will be fetched again.
                now = (self._begun[index], rounds.taken[index])
                waits = self._before is not None and self._before[index] != now and rounds.taken[index] > 0
                state["taken"][index] -= waits
                part["ahead"] = waits
        return state

    # -- iterating ------------------------------------------------------------------------------------------

    def start(self, epoch: int) -> Iterator[Any]:
        """Begin an epoch, from 0, and return its batches."""
        self._epoch, self._before = epoch, None
        self._begun, self._given = [0] * len(self.parts), [0] * len(self.parts)
        # They may all draw from the run's generators. Workers would ask a loader's sampler at once, and
        # without them it is asked for the first batch: so that both draw alike, each step is done for all.
        opened: list[Iterator[Any]] = []
        for index, part in enumerate(self.parts):
            self._limit(index)
            part.begin(epoch)
            opened += [] if part.seekable else [part.open()]
        for part in self.parts:
            part.draw()
        others = iter(opened)
        return self._batches([part.open() if part.seekable else next(others) for part in self.parts])

    def resume(
        self, epoch: int, position: int, state: dict[str, Any], *, nothing_left: bool
    ) -> Iterator[Any]:
        """Return the batches of an epoch that was under way; see `BatchStream.resume`."""
        self._epoch, self._before = epoch, None
        saved = state["begin"].get("parts", [])
        if "taken" not in state or len(saved) != len(self.parts):
            rank_zero_warn(
                f"The checkpoint does not say how far each of the {len(self.parts)} training loaders was: "
                "the epoch goes on with their first batches."
            )
            return self.start(epoch)
        self._warn_of_sizes(saved)
        self._begun, taken = list(state["begun"]), list(state["taken"])
        self._given = [position - own for own in taken]
        # Parts may share a generator, so each of these steps is done for all before the next one.
        for i, (part, at_end) in enumerate(zip(self.parts, state["at_end"], strict=True)):
            done = nothing_left or at_end
            self._limit(i)
            part.seek(epoch, taken[i], saved[i], nothing_left=done, again=self._begun[i])
        for part, own, at_end in zip(self.parts, saved, state["at_end"], strict=True):
            part.put_back(own, nothing_left=nothing_left or at_end)
        iterators = [part.open() for part in self.parts]
        batches = self._batches(iterators)
        assert self._rounds is not None
        self._rounds.ended, self._rounds.at_end = list(state["ended"]), list(state["at_end"])
        self._rounds.taken = taken
        return batches

    def _warn_of_sizes(self, saved: list[dict[str, Any]]) -> None:
        for index, (part, own) in enumerate(zip(self.parts, saved, strict=True)):
            then, now = grid_of(own), part.shares.grid
            if then is not None and now is not None and not then.alike(now):
                rank_zero_warn(
                    f"The batch size of training loader {index} was {then.size} and is {now.size}: this "
                    "epoch goes on at the same number of batches, and so at another row."
                )

    def _batches(self, iterators: list[Iterator[Any]]) -> Iterator[Any]:
        self._rounds = Rounds(iterators, self.combined.mode, self._again)
        return map(self.combined.unflatten, self._rounds)

    def _limit(self, index: int) -> None:
        """Tell a part how many of its batches are read, since it was begun last, until the epoch is over."""
        # Not counted in lengths: a sampler may give fewer batches than it says.
        self.parts[index].limit = min(self.limit, self.length() or math.inf) - self._given[index]

    def _again(self, index: int) -> Iterator[Any]:
        assert self._rounds is not None
        self._begun[index] += 1
        self._given[index] += self._rounds.taken[index]
        self._limit(index)
        part = self.parts[index]
        batches = part.start(self._epoch, self._begun[index])
        if self._before is not None:
            part.note_position(at_start=True)
        return batches

    def look_ahead(self, batches: Iterator[Any], end: Any) -> Any:
        """The next batch, or ``end``, while the position stays before it."""
        assert self._rounds is not None
        self._before = list(zip(self._begun, self._rounds.taken, strict=True))
        for part in self.parts:
            part.note_position()
        return next(batches, end)

    def finish(self, batches: Iterator[Any]) -> None:
        """Let every loader that gave its last batch do what it does behind it."""
        assert self._rounds is not None
        for part, iterator, taken in zip(self.parts, self._rounds.iterators, self._rounds.taken, strict=True):
            if taken == part.length():
                next(iterator, None)

    def leave(self) -> None:
        """Be done with an epoch: the workers that it started end now."""
        for part in self.parts:
            part.leave()

    def close(self) -> None:
        """Stop the loaders' worker processes."""
        for part in self.parts:
            part.close()


def make_stream(loader: Any, *, stage: str, index: int, **more: Any) -> BatchStream | CombinedStream:
    """The stream that reads a loader; see `BatchStream` for what it is given."""
    if isinstance(loader, CombinedLoader):
        return CombinedStream(loader, stage=stage, **more)
    return BatchStream(loader, stage=stage, index=index, **more)
