"""Samplers on the way to a loader's workers: skipping to a position, with a seed for every batch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from holdfast.training import rng
from holdfast.training.draws import Draws, at_once
from holdfast.training.loader_kinds import is_known_sampler
from holdfast.training.loader_parts import generators_of_samplers
from holdfast.training.sharding import global_batches, parts_of, parts_of_sequence

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
        shares, position, seed = stream.shares, stream.position, stream.shares.seed_of(stream.order_base)
        if seed is None and shares.as_torch_cuts:
            if stream.has_foreign_sampler:
                return self._apart(iter(self._inner), position)
            return _beyond(self._inner, position)
        if seed is not None:
            return self._by_seed(seed, position)
        batches = self._by_foreign(position) if stream.has_foreign_sampler else self._global(position)
        return parts_of(batches, shares.own_grid, rank=shares.rank, ranks=shares.ranks)

    # -- an order that is cut into the batches of a job ------------------------------------------------------

    def _order_of(self) -> Any:
        """The sampler whose units are cut."""
        return self._inner if self._stream.shares.batches is None else self._inner.sampler

    def _by_seed(self, seed: int, position: int) -> Iterator[Any]:
        """This rank's batches from a position on, of the order that a seed gives."""
        stream, shares, order = self._stream, self._stream.shares, self._order_of()
        grid, drop_last = shares.own_grid, shares.drop_last
        rank, ranks = shares.rank, shares.ranks
        known = at_once(order, seed)
        if known is not None:
            return parts_of_sequence(known, grid, position, drop_last=drop_last, rank=rank, ranks=ranks)
        own = [generator for _, generator in generators_of_samplers(stream.loader)]
        draws = Draws(seed, own)
        with draws:
            batches = self._global(position)
        batches = draws.each(batches, lazily=bool(own) or stream.has_foreign_sampler)
        return parts_of(batches, grid, rank=rank, ranks=ranks)

    def _global(self, position: int) -> Iterator[list[Any]]:
        shares = self._stream.shares
        grid = shares.own_grid
        units = _beyond(self._order_of(), grid.begin_of(position))
        return self._cut(units, position)

    def _cut(self, units: Iterator[Any], position: int) -> Iterator[list[Any]]:
        shares = self._stream.shares
        return global_batches(units, shares.own_grid, position, drop_last=shares.drop_last)

    def _by_foreign(self, position: int) -> Iterator[list[Any]]:
        """The global batches, of a sampler that may draw as it goes: see `_apart`."""
        grid, units = self._stream.shares.own_grid, iter(self._order_of())
        if not grid.of_rows:
            return self._cut(self._apart(units, grid.begin_of(position)), position)
        first_batch, first_unit = grid.first
        if not first_unit:
            return self._apart(self._cut(units, 0), position)
        done = itertools.chain([None], self._cut(units, first_batch))
        deque(itertools.islice(units, first_unit), maxlen=0)
        return self._apart(done, 1 + position - first_batch)

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
        base = rng.derive(self._stream.order_base, "sampler")
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
