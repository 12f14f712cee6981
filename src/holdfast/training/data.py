"""Batches in a known order, from any position, with augmentation that does not depend on who loads them.

Map-style data is sought: the sampler's order is made again and rows before the position are never loaded.
Anything else is replayed. Both start from the generators as they were when the epoch began.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate

from holdfast.errors import CheckpointIncompatible
from holdfast.training import rng


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


class _SeededSampler:
    """Stands in for a loader's (batch) sampler: skips to the position and seeds each batch."""

    def __init__(self, inner: Any, stream: BatchStream) -> None:
        self._inner = inner
        self._stream = stream

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that all of this happens when the first batch is asked for: DataLoader calls this
        # twice for the first epoch of its workers.
        stream = self._stream
        inner = iter(self._inner)
        # DataLoader draws one number from the run's generator for its workers: when they are started, so not
        # in later epochs of persistent ones, which a run that resumes there could not follow. The copy draws
        # its own from elsewhere; this one keeps the order of rows that torch gives for the same seed.
        _draw_as_a_loader_does(stream.loader)
        if stream.has_foreign_sampler:
            inner = self._apart(inner)
        batch = stream.position
        end = object()
        for _ in range(batch):
            if next(inner, end) is end:
                return
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


def _draw_as_a_loader_does(loader: DataLoader[Any]) -> None:
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def _never_draws(loader: DataLoader[Any]) -> bool:
    """True for torch's own in-memory datasets with the default collate: nothing in their fetch is random."""
    dataset: Any = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    parts = dataset.datasets if type(dataset) is ConcatDataset else [dataset]
    return all(type(part) is TensorDataset for part in parts) and loader.collate_fn is default_collate


def _has_state(owner: Any) -> bool:
    return hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")


class BatchStream:
    """One loader as the loops read it.

    Args:
        loader: A DataLoader, anything with ``state_dict``/``load_state_dict``, or any iterable of batches.
        stage: "train", "validate", "test" or "predict"; part of the seed of each batch.
        index: Position of the loader among the stage's loaders; part of the seed.
        seed: The seed of the run.
        rank: Rank of this process; part of the seed.
    """

    def __init__(self, loader: Any, *, stage: str, index: int, seed: int, rank: int = 0) -> None:
        self.loader = loader
        self.position = 0
        self.workers = False
        self.isolated = True
        self.isolation = rng.Isolation()
        self.seed_base = 0
        self._seed_parts = (seed, stage, index, rank)
        self._iterable = loader
        self._begin: dict[str, Any] | None = None
        self._running: Any = None
        self._position_state: Any = None
        self.stateful = _has_state(loader)
        self.seekable = False
        self.has_foreign_sampler = False
        if isinstance(loader, DataLoader):
            self.workers = loader.num_workers > 0
            # A subclass with an __iter__ of its own may not ask the sampler that stands in for the user's.
            own_iteration = type(loader).__iter__ is not DataLoader.__iter__
            if not self.stateful and not own_iteration and not isinstance(loader.dataset, IterableDataset):
                self.seekable = True
                samplers = [s for s in self._samplers().values() if s is not loader]
                self.has_foreign_sampler = not all(
                    type(sampler).__module__.startswith("torch.utils.data.") for sampler in samplers
                )
                self.isolated = not self.workers and not _never_draws(loader)
                self._iterable = self._seeded_copy(loader)
            elif self.workers and not self.stateful:
                self._iterable = self._restarted_copy(loader)

    def _seeded_copy(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        seeded = copy.copy(loader)
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        # DataLoader forbids setting these after construction, since its own state would go stale; in a
        # shallow copy that has not been iterated yet there is none.
        seeded.__dict__[name] = _SeededSampler(getattr(loader, name), self)
        seeded.__dict__["_iterator"] = None
        seeded.__dict__["generator"] = torch.Generator()
        return seeded

    def _restarted_copy(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """A copy whose workers start anew in each epoch, from its seed: as they do after a resume."""
        restarted = copy.copy(loader)
        restarted.__dict__["_iterator"] = None
        restarted.__dict__["persistent_workers"] = False
        restarted.__dict__["generator"] = torch.Generator()
        return restarted

    def length(self) -> int | None:
        """Number of batches in an epoch, or None where the loader cannot tell."""
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            return None

    # -- the state of the data at the start of an epoch, and its position -----------------------------------

    def _samplers(self) -> dict[str, Any]:
        """The loader and every sampler it draws from, samplers inside of samplers too, each by its path."""
        found: dict[str, Any] = {"loader": self.loader}
        roots = [(name, getattr(self.loader, name, None)) for name in ("batch_sampler", "sampler")]
        waiting = [(name, sampler) for name, sampler in roots if sampler is not None]
        while waiting:
            path, sampler = waiting.pop(0)
            if any(sampler is known for known in found.values()):
                continue
            found[path] = sampler
            for name, value in getattr(sampler, "__dict__", {}).items():
                if isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
                    waiting.append((f"{path}.{name}", value))
        return found

    def begin_state(self) -> dict[str, Any]:
        """What `start` needs to produce this epoch again: every generator and sampler it will draw from."""
        state: dict[str, Any] = {"generators": rng.capture(), "own": {}, "samplers": {}}
        for path, owner in self._samplers().items():
            for name, value in getattr(owner, "__dict__", {}).items():
                own = rng.state_of(value)
                if own is not None:
                    state["own"][f"{path}.{name}"] = own
            if owner is not self.loader and _has_state(owner):
                state["samplers"][path] = copy.deepcopy(owner.state_dict())
        return state

    def restore_begin(self, state: dict[str, Any]) -> None:
        """Put the loader's own generators and samplers back (the global ones are the caller's)."""
        for path, owner in self._samplers().items():
            for name, value in getattr(owner, "__dict__", {}).items():
                if f"{path}.{name}" in state["own"]:
                    rng.set_state_of(value, state["own"][f"{path}.{name}"])
            if path in state["samplers"] and _has_state(owner):
                owner.load_state_dict(state["samplers"][path])

    def state(self, mid_epoch: bool) -> dict[str, Any]:
        """The data's part of a checkpoint; ``mid_epoch`` says that an epoch is under way."""
        now = self.begin_state()
        del now["generators"]
        state: dict[str, Any] = {"now": now, "batch_size": getattr(self.loader, "batch_size", None)}
        if mid_epoch:
            state["begin"] = self._begin
            if self.stateful:
                ahead = self._position_state
                state["loader"] = self.loader.state_dict() if ahead is None else ahead
        return state

    # -- iterating -----------------------------------------------------------------------------------------

    def start(self, epoch: int) -> Iterator[Any]:
        """Begin epoch (or validation run) number ``epoch``, from 0, and return its batches."""
        self._seed(epoch)
        self.position = 0
        self._begin = self.begin_state()
        return self._batches(0)

    def resume(
        self, epoch: int, position: int, state: dict[str, Any], *, nothing_left: bool
    ) -> Iterator[Any]:
        """Return the batches of an epoch that was under way, from ``position`` on.

        The global generators are left as they were when the epoch began; restoring them to where the run was
        is the caller's, and comes after this.

        Args:
            epoch: The epoch.
            position: Batches of it that are done.
            state: What `state` gave for it.
            nothing_left: The epoch's batches are all done; it only has to end.

        Raises:
            CheckpointIncompatible: the data ended before ``position`` was reached.
        """
        self._seed(epoch)
        self._begin = state["begin"]
        if nothing_left:
            self.restore_begin(state["now"])
            return iter(())
        self.position = position if self.seekable else 0
        rng.restore(state["begin"]["generators"])
        self.restore_begin(state["begin"])
        if self.stateful and "loader" in state:
            self.loader.load_state_dict(state["loader"])
        batches = self._batches(position)
        if self.stateful:
            return batches
        # Samplers draw their order when the first batch is asked for, so that has to happen now, while the
        # generators are those of the epoch's start.
        end = object()
        first = next(batches, end)
        # By now the order is drawn, and what else was drawn from the same generators since is made up for.
        self.restore_begin(state["now"])
        return iter(()) if first is end else itertools.chain((first,), batches)

    def _seed(self, epoch: int) -> None:
        self.seed_base = rng.derive(*self._seed_parts, epoch)
        for sampler in self._samplers().values():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def close(self) -> None:
        """Stop worker processes now; left to the garbage collector they hold memory, and seconds later."""
        iterators: tuple[Any, ...] = (self._running, getattr(self._iterable, "_iterator", None))
        for iterator in iterators:
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
        self._running = None
        if self._iterable is not self.loader:
            self._iterable.__dict__["_iterator"] = None

    def _batches(self, position: int) -> Iterator[Any]:
        if not self.seekable:
            # A loader with a state of its own stands at the position already.
            return self._replayed(0, position) if self.stateful else self._replayed(position, 0)
        self._iterable.generator.manual_seed(self.seed_base)
        self._running = iter(self._iterable)
        return self._leaving(self._running) if self.isolated else self._running

    def _leaving(self, batches: Iterator[Any]) -> Iterator[Any]:
        leave = self.isolation.leave
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                leave()
            yield batch

    def _replayed(self, skip: int, first: int) -> Iterator[Any]:
        """An iterable's batches from number ``first`` on, less ``skip``; each is fetched in isolation."""
        if self._iterable is not self.loader:
            self._iterable.generator.manual_seed(self.seed_base)
            _draw_as_a_loader_does(self.loader)
        self._running = iter(self._iterable)
        return self._fetched(self._running, skip, first)

    def _fetched(self, batches: Iterator[Any], skip: int, index: int) -> Iterator[Any]:
        base, isolation = self.seed_base, self.isolation
        skip += index
        while True:
            isolation.enter(rng.mix(base, index))
            try:
                batch = next(batches)
            except StopIteration:
                if index < skip:
                    raise CheckpointIncompatible(
                        f"The checkpoint is {skip} batches into the epoch, but the training data ended after "
                        f"{index}. Give the run the data it was started with."
                    ) from None
                return
            finally:
                isolation.leave()
            index += 1
            if index > skip:
                yield batch

    def look_ahead(self, batches: Iterator[Any], end: Any) -> Any:
        """The next batch, or ``end``, while the position stays before it."""
        if self.stateful:
            self._position_state = self.loader.state_dict()
        return next(batches, end)


def flatten_loaders(loaders: Any) -> list[Any]:
    """The loaders of an evaluation as a list: one loader, a list or tuple of them, or a dict's values."""
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    if isinstance(loaders, (list, tuple)) and loaders and all(_is_loader(item) for item in loaders):
        return list(loaders)
    return [loaders]


def _is_loader(item: Any) -> bool:
    return isinstance(item, DataLoader) or (
        isinstance(item, Iterable) and not isinstance(item, (torch.Tensor, str, bytes, tuple, dict))
    )


def batch_size_of(batch: Any) -> int:
    """Rows in a batch: the first dimension of the first tensor in it, else of the first array; else 1."""
    found = _first_dimension(batch, torch.Tensor)
    if found is None:
        numpy = sys.modules.get("numpy")
        found = None if numpy is None else _first_dimension(batch, numpy.ndarray)
    return 1 if found is None else found


def _first_dimension(batch: Any, kind: type[Any]) -> int | None:
    if isinstance(batch, kind):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, dict):
        batch = batch.values()
    elif hasattr(batch, "__dataclass_fields__"):
        batch = vars(batch).values()
    elif not isinstance(batch, (list, tuple)):
        return None
    for part in batch:
        found = _first_dimension(part, kind)
        if found is not None:
            return found
    return None


def move_to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it, and anything with ``.to``, on ``device``."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type != "cpu")
    if isinstance(batch, dict):
        moved = {key: move_to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move_to_device(value, device) for value in batch)
    if hasattr(batch, "to") and callable(batch.to):
        return batch.to(device)
    return batch
