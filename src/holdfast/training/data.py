"""Batches in a known order, from any position, with augmentation that does not depend on who loads them.

Map-style data is sought: the sampler's order is made again and rows before the position are never loaded.
Anything else is replayed. Both start from the generators as they were when the epoch began.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate

from holdfast.errors import CheckpointIncompatible
from holdfast.training import rng
from holdfast.training.seeded import SeededSampler, draw_as_a_loader_does
from holdfast.utilities.combined_loader import length_of


def _never_draws(loader: DataLoader[Any]) -> bool:
    """True for torch's own in-memory datasets with the default collate: nothing in their fetch is random."""
    dataset: Any = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    parts = dataset.datasets if type(dataset) is ConcatDataset else [dataset]
    return all(type(part) is TensorDataset for part in parts) and loader.collate_fn is default_collate


_AT_START = object()


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
        self._ended = False
        """Whether the loader has said that its epoch is over."""
        self._ahead = False
        """Whether the loop has fetched one batch more than it will have used."""
        self._order: SeededSampler | None = None
        self.rows: deque[list[Any]] | None = None
        """The dataset's rows of each batch on its way, oldest first; None unless `note_rows` was called."""
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
        self._order = SeededSampler(getattr(loader, name), self)
        seeded.__dict__[name] = self._order
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

    def another(self, stage: str) -> BatchStream:
        """A stream over the same loader, with seeds of its own; this one stays where it is."""
        seed, _, index, rank = self._seed_parts
        return BatchStream(self.loader, stage=stage, index=index, seed=seed, rank=rank)

    def length(self) -> int | None:
        """Number of batches in an epoch, or None where the loader cannot tell."""
        return length_of(self.loader)

    def note_rows(self) -> None:
        """From the next epoch on, keep the rows of each batch in ``rows``, where it has any."""
        if self.seekable and getattr(self.loader, "in_order", True):
            self.rows = deque()

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

    def note_begin(self) -> None:
        """Remember the state that this epoch's order is about to be drawn from."""
        if self._begin is None:
            self._begin = {**self.begin_state(), "loader_drew": True}

    def restore_begin(self, state: dict[str, Any]) -> None:
        """Put the loader's own generators and samplers back (the global ones are the caller's)."""
        for path, owner in self._samplers().items():
            for name, value in getattr(owner, "__dict__", {}).items():
                if f"{path}.{name}" in state["own"]:
                    rng.set_state_of(value, state["own"][f"{path}.{name}"])
            if path in state["samplers"] and _has_state(owner):
                owner.load_state_dict(state["samplers"][path])
        if self.stateful and "loader" in state:
            self.loader.load_state_dict(state["loader"])
            self._ended = True

    def state(self, mid_epoch: bool) -> dict[str, Any]:
        """The data's part of a checkpoint; ``mid_epoch`` says that an epoch is under way."""
        now = self.begin_state()
        del now["generators"]
        if self.stateful and self._ended:
            # What it gives in the epoch after this one may depend on this one.
            now["loader"] = self.loader.state_dict()
        state: dict[str, Any] = {"now": now, "batch_size": getattr(self.loader, "batch_size", None)}
        if mid_epoch:
            state["begin"] = self._begin
            state["ahead"] = self._ahead
            if self.stateful:
                ahead = self._position_state
                if ahead is not _AT_START:
                    state["loader"] = self.loader.state_dict() if ahead is None else ahead
        return state

    # -- iterating -----------------------------------------------------------------------------------------

    def start(self, epoch: int, again: int = 0) -> Iterator[Any]:
        """Begin epoch (or validation run) number ``epoch``, from 0, and return its batches.

        Args:
            epoch: The epoch.
            again: How often the data was begun in this epoch before: beside longer data it goes round.
        """
        self._seed(epoch, again)
        self.position = 0
        self._begin = None
        self._ended = self._ahead = False
        if self._order is not None:
            self._order.sought = None
            # DataLoader draws one number from the run's generator for its workers: when they are started, so
            # not in later epochs of persistent ones, which a run that resumes there could not follow. The
            # copy draws its own from elsewhere; this one keeps the order of rows that torch gives for the
            # same seed.
            draw_as_a_loader_does(self.loader)
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
        batches = self.seek(epoch, position, state, nothing_left=nothing_left)
        batches = self.catch_up(batches)
        self.put_back(state, nothing_left=nothing_left)
        return batches

    def seek(
        self, epoch: int, position: int, state: dict[str, Any], *, nothing_left: bool, again: int = 0
    ) -> Iterator[Any]:
        """The first step of `resume`: draw the epoch's order again, and go to the position."""
        self._seed(epoch, again)
        self._begin = state["begin"]
        self._ahead = bool(state.get("ahead")) and not nothing_left
        if nothing_left:
            return iter(())
        self.position = position if self.seekable else 0
        rng.restore(state["begin"]["generators"])
        self.restore_begin(state["begin"])
        if self.stateful and "loader" in state:
            self.loader.load_state_dict(state["loader"])
        if self._order is not None:
            if not state["begin"].get("loader_drew"):
                draw_as_a_loader_does(self.loader)
            self._order.seek()
        # A loader with a state of its own stands at the position already.
        batches = self._batches(position if self.stateful else 0)
        if not self.seekable and not self.stateful:
            self._replay(batches, position)
        return batches

    def _replay(self, batches: Iterator[Any], count: int) -> None:
        end = object()
        for index in range(count):
            if next(batches, end) is end:
                raise CheckpointIncompatible(
                    f"The checkpoint is {count} batches into the epoch, but the training data ended after "
                    f"{index}. Give the run the data it was started with."
                )

    def catch_up(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The second step of `resume`: if the loop was one batch ahead, fetch that one."""
        if self.stateful or not self._ahead:
            return batches
        end = object()
        first = next(batches, end)
        return iter(()) if first is end else itertools.chain((first,), batches)

    def put_back(self, state: dict[str, Any], *, nothing_left: bool) -> None:
        """The last step of `resume`: what the loader owns and draws from goes on from where it was."""
        # Until it is fetched from, a loader with a state of its own may still need what that restored.
        if nothing_left or not self.stateful:
            self.restore_begin(state["now"])

    def _seed(self, epoch: int, again: int) -> None:
        self.seed_base = rng.derive(*self._seed_parts, epoch, *([again] if again else []))
        if self.rows is not None:
            self.rows.clear()
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

    def _batches(self, first: int) -> Iterator[Any]:
        """The batches from the sampler's position on; or an iterable's, of which the next is ``first``."""
        if self.seekable:
            self._iterable.generator.manual_seed(self.seed_base)
            self._running = iter(self._iterable)
            return self._leaving(self._running) if self.isolated else self._running
        if self._begin is None:
            self._begin = self.begin_state()
        if self._iterable is not self.loader:
            self._iterable.generator.manual_seed(self.seed_base)
            draw_as_a_loader_does(self.loader)
        self._running = iter(self._iterable)
        return self._fetched(self._running, first)

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

    def _fetched(self, batches: Iterator[Any], index: int) -> Iterator[Any]:
        """An iterable's batches, the next of which is number ``index``; each is fetched in isolation."""
        base, isolation, begun_anew = self.seed_base, self.isolation, False
        while True:
            isolation.enter(rng.mix(base, index))
            try:
                batch = next(batches)
            except StopIteration:
                if index == 0 and self.stateful and not begun_anew:
                    # Put back to the end of an epoch, it may take that for the end of this one.
                    begun_anew = True
                    batches = self._running = iter(self._iterable)
                    continue
                self._ended = True
                return
            finally:
                isolation.leave()
            index += 1
            yield batch

    def look_ahead(self, batches: Iterator[Any], end: Any) -> Any:
        """The next batch, or ``end``, while the position stays before it."""
        self._ahead = True
        self.note_position()
        return next(batches, end)

    def note_position(self, *, at_start: bool = False) -> None:
        """Keep the state of a loader that has one: the batch that is about to be fetched counts later.

        Args:
            at_start: It is the first, and the loader need not know yet that it begins again.
        """
        if self.stateful:
            self._position_state = _AT_START if at_start else self.loader.state_dict()

    def finish(self, batches: Iterator[Any]) -> None:
        """Let the loader do what it does behind its last batch: RandomSampler may draw once more."""
        next(batches, None)


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
