"""Samplers on the way to a loader's workers: skipping to a position, with a seed for every batch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from holdfast.training import rng
from holdfast.training.loader_kinds import is_known_sampler

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
        self.drawn: int | None = None
        """Items drawn so far in the epoch, where workers fetch ahead of the position."""
        self.ended = False
        """Whether the sampler has done what it does behind its last item."""

    def __len__(self) -> int:
        return len(self._inner)

    def seek(self, drawn: int, *, ended: bool) -> None:
        """Draw the order and go to the stream's position now, not when the first batch is asked for.

        Args:
            drawn: How many items had been drawn in all. The sampler's own generators are put back to where
                they were after those, so no fewer may be drawn before that, and no more.
            ended: It had come to its end.
        """
        inner, position = self._from_position(), self._stream.position
        # Most samplers draw with the first item.
        taken = list(itertools.islice(inner, max(drawn - position, int(position == 0))))
        taken += itertools.islice(inner, int(ended))
        self.sought = itertools.chain(taken, inner)

    def _from_position(self) -> Iterator[Any]:
        stream = self._stream
        stream.note_begin()
        if stream.has_foreign_sampler:
            return self._apart(iter(self._inner), stream.position)
        return _beyond(self._inner, stream.position)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that all of this happens when the first batch is asked for: DataLoader calls this
        # twice for the first epoch of its workers.
        stream, inner = self._stream, self.sought
        if inner is None:
            inner = self._from_position()
        self.sought = None
        batch = stream.position
        self.ended = False
        limited = stream.limit < (stream.length() or 0)
        if limited:
            # Workers that fetch ahead would have it draw for batches that nobody reads.
            inner = itertools.islice(inner, max(0, int(stream.limit) - batch))
        if stream.rows is not None:
            inner = _noted(inner, stream.rows)
        base = stream.seed_base
        if stream.workers:
            for indices in inner:
                self.drawn = batch + 1
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
        self.ended = not limited

    def _apart(self, inner: Iterator[Any], skip: int) -> Iterator[Any]:
        """A user's sampler may draw as it goes, between the model's draws and ahead of them with workers.

        So it draws from the run's generators for the first batch, as torch's own do for the whole epoch, and
        from a stream of its own after that.
        """
        base = rng.derive(self._stream.seed_base, "sampler")
        if skip and next(inner, _END) is not _END:
            isolation = rng.Isolation()
            isolation.enter(base)
            try:
                for count in range(1, skip):
                    rng.seed_generators(rng.mix(base, count))
                    if next(inner, _END) is _END:
                        break
            finally:
                isolation.leave()
        return _each_apart(inner, base, skip)


_END = object()


def _each_apart(inner: Iterator[Any], base: int, count: int) -> Iterator[Any]:
    isolation = rng.Isolation()
    while True:
        if count:
            isolation.enter(rng.mix(base, count))
        try:
            item = next(inner, _END)
        finally:
            isolation.leave()
        if item is _END:
            return
        yield item
        count += 1


def _beyond(sampler: Any, position: int) -> Iterator[Any]:
    """A sampler's items from a position on."""
    if position and isinstance(sampler, BatchSampler) and is_known_sampler(sampler):
        # Row by row in C, instead of batch by batch: what it draws from its own sampler is the same.
        rows = _beyond(sampler.sampler, position * sampler.batch_size)
        return iter(BatchSampler(rows, sampler.batch_size, sampler.drop_last))
    items: Iterator[Any] = iter(sampler)
    deque(itertools.islice(items, position), maxlen=0)
    return items


def _noted(inner: Iterator[Any], rows: deque[list[Any]]) -> Iterator[Any]:
    for indices in inner:
        rows.append(list(indices) if isinstance(indices, (list, tuple)) else [indices])
        yield indices


def draw_as_a_loader_does(loader: DataLoader[Any]) -> None:
    """Draw the one number that a DataLoader draws for its workers when it is iterated."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
