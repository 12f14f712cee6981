"""Samplers on the way to a loader's workers: skipping to a position, with a seed for every batch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from holdfast.training import rng

if TYPE_CHECKING:
    from holdfast.training.data import BatchStream


def _seed_and_return(seed: int, indices: Any) -> Any:
    rng.seed_generators(seed)
    return indices


class _SeededIndices:
    """Indices on their way to a worker: unpickling them there seeds the worker for this one batch.

    The seed travels with the batch, so it holds for forked, spawned and persistent workers alike, and for
    whichever of them gets the batch. (Wrapping the dataset would not: users reach it in their own code.)
    """

    __slots__ = ("indices", "seed")

    def __init__(self, seed: int, indices: Any) -> None:
        self.seed = seed
        self.indices = indices

    def __reduce__(self) -> tuple[Callable[[int, Any], Any], tuple[int, Any]]:
        return _seed_and_return, (self.seed, self.indices)


class SeededSampler:
    """Stands in for a loader's (batch) sampler: skips to the position and seeds each batch."""

    def __init__(self, inner: Any, stream: BatchStream) -> None:
        self._inner = inner
        self._stream = stream
        self.sought: Iterator[Any] | None = None
        """What `seek` left for the next iteration."""

    def __len__(self) -> int:
        return len(self._inner)

    def seek(self) -> None:
        """Draw the order and go to the stream's position now, not when the first batch is asked for."""
        inner = self._from_position()
        if self._stream.position == 0:
            # Most samplers draw with the first item.
            inner = itertools.chain(list(itertools.islice(inner, 1)), inner)
        self.sought = inner

    def _from_position(self) -> Iterator[Any]:
        stream = self._stream
        stream.note_begin()
        inner: Iterator[Any] = iter(self._inner)
        if stream.has_foreign_sampler:
            inner = self._apart(inner)
        for _ in itertools.islice(inner, stream.position):
            pass
        return inner

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that all of this happens when the first batch is asked for: DataLoader calls this
        # twice for the first epoch of its workers.
        stream, inner = self._stream, self.sought
        if inner is None:
            inner = self._from_position()
        self.sought = None
        batch = stream.position
        if stream.rows is not None:
            inner = _noted(inner, stream.rows)
        base = stream.seed_base
        if stream.workers:
            for indices in inner:
                yield _SeededIndices(rng.mix(base, batch), indices)
                batch += 1
        elif stream.isolated:
            # The sampler draws from the run's own generators; the fetch that follows a yield, in this
            # process, must not. `BatchStream` leaves the isolation when the batch is there.
            enter = stream.isolation.enter
            for indices in inner:
                enter(rng.mix(base, batch))
                yield indices
                batch += 1
        else:
            yield from inner

    def _apart(self, inner: Iterator[Any]) -> Iterator[Any]:
        """A user's sampler may draw as it goes, between the model's draws and ahead of them with workers.

        So it draws from the run's generators for the first batch, as torch's own do for the whole epoch, and
        from a stream of its own after that.
        """
        base, isolation = rng.derive(self._stream.seed_base, "sampler"), rng.Isolation()
        end = object()
        item, count = next(inner, end), 0
        while item is not end:
            yield item
            count += 1
            isolation.enter(rng.mix(base, count))
            try:
                item = next(inner, end)
            finally:
                isolation.leave()


def _noted(inner: Iterator[Any], rows: deque[list[Any]]) -> Iterator[Any]:
    for indices in inner:
        rows.append(list(indices) if isinstance(indices, (list, tuple)) else [indices])
        yield indices


def draw_as_a_loader_does(loader: DataLoader[Any]) -> None:
    """Draw the one number that a DataLoader draws for its workers when it is iterated."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
