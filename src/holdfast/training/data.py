"""Batches in a known order, from any position, with augmentation that does not depend on who loads them.

Map-style data is sought: the sampler's order is made again and rows before the position are never loaded.
Anything else is replayed. Both start from the generators as they were when the epoch began.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from holdfast.training import own_generators, replay, rng, same_data, workers
from holdfast.training.batch_size import batch_size_of as batch_size_of
from holdfast.training.loader_kinds import (
    copy_of,
    is_known_sampler,
    iterates_later,
    never_draws,
    way_of,
)
from holdfast.training.loader_parts import (
    described_to_compare,
    generators_of_samplers,
    samplers_of,
    samplers_with_state,
)
from holdfast.training.loader_state import LoaderState
from holdfast.training.seeded import SeededSampler, draw_as_a_loader_does
from holdfast.training.sharding import Job
from holdfast.training.shares import Shares
from holdfast.utilities.combined_loader import length_of


class BatchStream:
    """One loader as the loops read it.

    Args:
        loader: A DataLoader, anything with ``state_dict``/``load_state_dict``, or any iterable of batches.
        stage: "train", "validate", "test" or "predict"; part of the seed of each batch.
        index: Position of the loader among the stage's loaders; part of the seed.
        seed: The seed of the run.
        rank: Rank of this process; part of the seed.
        shield: Signals that the loader's workers ignore; see `workers.signals_of_the_run`.
        replaying: Told of data that has to be read again.
        job: The processes that share the data; None for one that draws as torch does.
    """

    def __init__(
        self,
        loader: Any,
        *,
        stage: str,
        index: int,
        seed: int,
        rank: int = 0,
        shield: tuple[int, ...] = (),
        replaying: replay.Replaying = replay.silently,
        job: Job | None = None,
    ) -> None:
        self.loader = loader
        self.stage, self.index, self.job = stage, index, job
        self.way = way_of(loader)
        """How it comes back to a position: "sought", "stateful" or "replayed"."""
        self.seekable, self.stateful = self.way == "sought", self.way == "stateful"
        self.shares = Shares(loader, job, self.way)
        """How its rows are shared by the processes of the job."""
        self.position = 0
        self.limit: int | float = float("inf")
        """Batches after which the loop stops reading an epoch."""
        self.isolation = rng.Isolation()
        self.seed_base = 0
        self.order_base = 0
        """What an order that has to be the same on every rank is drawn from."""
        self._seed_parts = (seed, stage, index, rank)
        self._shield, self._replaying = shield, replaying
        self._iterable = loader
        self._own = LoaderState(loader) if self.stateful else None
        self._begin: dict[str, Any] | None = None
        self._running: Any = None
        self._waiting: Iterator[Any] | None = None
        self._ahead = False
        """Whether the loop has fetched one batch more than it will have used."""
        self.order: SeededSampler | None = None
        """What stands in for the (batch) sampler of a loader that is sought."""
        self.rows: deque[list[Any]] | None = None
        """The dataset's rows of each batch on its way, oldest first; None unless `note_rows` was called."""
        self.workers = isinstance(loader, DataLoader) and loader.num_workers > 0
        self.reads_here = isinstance(loader, DataLoader) and not self.workers and not self.stateful
        """Whether generators of the dataset's own move in this process, batch by batch."""
        self.isolated = not self.workers
        self.has_foreign_sampler = False
        if self.seekable:
            samplers = [sampler for sampler in self.samplers() if sampler is not loader]
            self.has_foreign_sampler = not all(map(is_known_sampler, samplers))
            self.isolated = not self.workers and not never_draws(loader)
            self._iterable = self._seeded_copy(loader)
        elif self.workers and not self.stateful:
            self._iterable = copy_of(loader)
            # They start anew in each epoch, from its seed: as they do after a resume.
            self._iterable.__dict__["persistent_workers"] = False
        if self.workers and not iterates_later(loader):
            workers.shield(self._iterable, shield)

    def _seeded_copy(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        seeded: DataLoader[Any] = copy_of(loader)
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        self.order = SeededSampler(getattr(loader, name), self)
        seeded.__dict__[name] = self.order
        return seeded

    def another(self, stage: str) -> BatchStream:
        """A stream over the same loader, with seeds of its own; this one stays where it is."""
        seed, _, index, rank = self._seed_parts
        return BatchStream(
            self.loader, stage=stage, index=index, seed=seed, rank=rank, shield=self._shield, job=self.job
        )

    def length(self) -> int | None:
        """Number of batches in an epoch, or None where the loader cannot tell."""
        return self.shares.length() if self.shares.splits else length_of(self.loader)

    def describe(self) -> dict[str, Any]:
        """What an exact resume depends on: the way it is read, workers, order, rows, and what draws in it."""
        return described_to_compare(self)

    def samplers(self) -> list[Any]:
        """The loader and every sampler that it draws from."""
        return list(samplers_of(self.loader).values())

    def kept_generators(self) -> list[Any]:
        """The generators of the data's own whose states are in a checkpoint."""
        return [generator for _, generator in self._generators()]

    def note_rows(self) -> None:
        """From the next epoch on, keep the rows of each batch in ``rows``, where it has any."""
        if self.seekable and getattr(self.loader, "in_order", True):
            self.rows = deque()

    # -- the state of the data at the start of an epoch, and its position -----------------------------------

    def begin_state(self) -> dict[str, Any]:
        """What `start` needs to produce this epoch again: every generator and sampler it will draw from."""
        # A seeded order needs none of the generators, which are each rank's own.
        state: dict[str, Any] = {} if self.shares.seeds is not None else {"generators": rng.capture()}
        state["samplers"] = {}
        state["own"] = {path: rng.state_of(generator) for path, generator in self._generators()}
        if self.shares.seeds is not None:
            state["order_seeds"] = list(self.shares.seeds)
        for path, owner in samplers_with_state(self.loader):
            state["samplers"][path] = copy.deepcopy(owner.state_dict())
        return state

    def _generators(self) -> Iterator[tuple[str, Any]]:
        """The generators of its own that the data draws from in this process, each by its path."""
        yield from generators_of_samplers(self.loader)
        if self.reads_here:
            yield from own_generators.reachable(self.loader.dataset, "dataset")
            yield from own_generators.reachable(self.loader.collate_fn, "collate_fn")

    def note_begin(self) -> None:
        """Remember the state that this epoch's order is about to be drawn from."""
        if self._begin is None:
            self._begin = {**self.begin_state(), "loader_drew": True}

    def restore_begin(self, state: dict[str, Any]) -> None:
        """Put the loader's own generators and samplers back (the global ones are the caller's)."""
        if self._own is not None:
            self._own.restore_between_epochs(state)
        self.restore_order(state, self._generators())

    def restore_order(self, state: dict[str, Any], generators: Iterator[tuple[str, Any]]) -> None:
        """Put back what the order is drawn from: samplers, and these generators."""
        for path, generator in generators:
            if path in state["own"]:
                rng.set_state_of(generator, state["own"][path])
        if self.shares.seeds is not None:
            self.shares.seeds = list(state.get("order_seeds", self.shares.seeds))
        for path, owner in samplers_with_state(self.loader):
            if path in state["samplers"]:
                owner.load_state_dict(state["samplers"][path])

    def state(self, mid_epoch: bool) -> dict[str, Any]:
        """The data's part of a checkpoint; ``mid_epoch`` says that an epoch is under way."""
        now = self.begin_state()
        now.pop("generators", None)
        if isinstance(self.loader, DataLoader):
            now["workers"] = self.loader.num_workers
        now |= {} if self._own is None else self._own.between_epochs()
        state: dict[str, Any] = {"now": now, "batch_size": getattr(self.loader, "batch_size", None)}
        if self.job is not None:
            state["order"] = self.job.order
        if mid_epoch:
            if self.shares.grid is not None:
                state["grid"] = self.shares.grid.state()
            state["begin"] = self._begin
            state["ahead"] = self._ahead
            if self.order is not None:
                state["drawn"], state["ended"] = self.order.drawn, self.order.ended
            state |= {} if self._own is None else self._own.in_epoch()
        return state

    # -- iterating -----------------------------------------------------------------------------------------

    def start(self, epoch: int, again: int = 0) -> Iterator[Any]:
        """Begin epoch (or validation run) number ``epoch``, from 0, and return its batches.

        Args:
            epoch: The epoch.
            again: How often the data was begun in this epoch before: beside longer data it goes round.
        """
        self.begin(epoch, again)
        if self.job is not None:
            self.draw()
        return self.open()

    def begin(self, epoch: int, again: int = 0) -> None:
        """The first step of `start`: draw what a loader draws when it is iterated."""
        self._seed(epoch, again)
        self._waiting = None
        self.position = 0
        self._begin = None
        self._ahead = False
        if self._own is not None:
            self._own.begin()
        self.leave()
        self.shares.begin()
        if self.job is not None:
            same_data.check(self)
        if self.order is not None:
            self.order.sought = None
            if self.shares.seeds is not None:
                return
            # DataLoader draws one number from the run's generator for its workers: when they are started, so
            # not in later epochs of persistent ones, which a run that resumes there could not follow. The
            # copy draws its own from elsewhere; this one keeps the order of rows that torch gives for the
            # same seed.
            draw_as_a_loader_does(self.loader)

    def draw(self) -> None:
        """A step between `begin` and `open`: draw the epoch's order now, not when a batch is asked for."""
        if self.order is None:
            return
        job = self.job
        if job is None or job.seeded or job.ranks == 1:
            self.order.seek(0, ended=False)
            return
        self._begin = same_data.draw_together(self)

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
        self.seek(epoch, position, state, nothing_left=nothing_left)
        self.put_back(state, nothing_left=nothing_left)
        return self.open()

    def seek(
        self, epoch: int, position: int, state: dict[str, Any], *, nothing_left: bool, again: int = 0
    ) -> None:
        """The first step of `resume`: draw the epoch's order again, and go to the position."""
        self._seed(epoch, again)
        self._begin = state["begin"]
        self._ahead = bool(state.get("ahead")) and not nothing_left
        self._waiting = iter(())
        if nothing_left:
            return
        if self.shares.seeds is None:
            rng.restore(state["begin"]["generators"])
        self.restore_begin(state["begin"])
        if self.order is None:
            self._waiting = self._read_up_to(position, state)
            return
        self.position, self._waiting = position, None
        same_size = self.shares.resume(state)
        if self.job is not None:
            same_data.check(self)
        if self.shares.seeds is None and not state["begin"].get("loader_drew"):
            draw_as_a_loader_does(self.loader)
        drawn = (state.get("drawn") if same_size else None) or position + self._ahead
        self.order.seek(drawn, ended=same_size and bool(state.get("ended")))

    def _read_up_to(self, position: int, state: dict[str, Any]) -> Iterator[Any]:
        """The batches of a loader that is not sought, from the position on."""
        own = self._own
        stands_there = own is not None and own.fits(state["now"])
        if own is not None:
            own.begin()
            if not stands_there:
                own.warn_of_workers(state["now"], "is read again from the start of the epoch")
            elif "loader" in state:
                self.loader.load_state_dict(state["loader"])
        batches = self._batches(position if stands_there else 0)
        if not stands_there:
            numbers = self._replaying(self.loader, self.index, position)
            replay.read_again(batches, numbers, position)
        return batches if self.stateful else self._caught_up(batches)

    def _caught_up(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; if the loop was one ahead, that one is fetched already."""
        if not self._ahead:
            return batches
        end = object()
        first = next(batches, end)
        return iter(()) if first is end else itertools.chain((first,), batches)

    def put_back(self, state: dict[str, Any], *, nothing_left: bool) -> None:
        """The second step of `resume`: what the loader owns and draws from goes on from where it was."""
        # Until it is fetched from, a loader with a state of its own may still need what that restored.
        if nothing_left or not self.stateful:
            self.restore_begin(state["now"])

    def open(self) -> Iterator[Any]:
        """The last step of `resume`: the batches from the position on."""
        if self._waiting is None:
            # Not before: workers that fetch ahead have the sampler draw ahead.
            batches = self._caught_up(self._batches(0))
            return batches if self.job is None else same_data.compared(self, batches)
        return self._waiting

    def _seed(self, epoch: int, again: int) -> None:
        now = [epoch, again] if again else [epoch]
        self.seed_base = rng.derive(*self._seed_parts, *now)
        self.order_base = rng.derive(*self._seed_parts[:3], 0, *now) if self.job else self.seed_base
        if self.rows is not None:
            self.rows.clear()
        for sampler in self.samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def leave(self) -> None:
        """Be done with an epoch: its workers end now, and not when they are forgotten."""
        running, self._running = self._running, None
        if running is not getattr(self._iterable, "_iterator", None) or not self._persistent():
            workers.end(running)

    def _persistent(self) -> bool:
        return bool(getattr(self._iterable, "persistent_workers", False))

    def close(self) -> None:
        """Stop worker processes now; left to the garbage collector they hold memory, and seconds later."""
        workers.end(self._running)
        workers.end(getattr(self._iterable, "_iterator", None))
        self._running = None
        if self._iterable is not self.loader:
            self._iterable.__dict__["_iterator"] = None
        else:
            workers.unshield(self.loader)

    def _batches(self, first: int) -> Iterator[Any]:
        """The batches from the sampler's position on; or an iterable's, of which the next is ``first``."""
        if self.seekable:
            self._iterable.generator.manual_seed(self.seed_base)
            self._running = workers.start(self._iterable)
            return self._leaving(self._running) if self.isolated else self._running
        if self._begin is None:
            self._begin = self.begin_state()
        if self._iterable is not self.loader:
            self._iterable.generator.manual_seed(self.seed_base)
            draw_as_a_loader_does(self.loader)
        elif self._own is not None and isinstance(self.loader, DataLoader) and self.loader.generator is None:
            draw_as_a_loader_does(self.loader)
        self._running = self._started()
        return self._fetched(self._running, first)

    def _started(self) -> Iterator[Any]:
        """The iterator over a loader that is not sought."""
        if self._own is None:
            return workers.start(self._iterable)
        # With a state to put back it may take another number of draws, which the run's generators are not to
        # show: it draws from some of its own, as a DataLoader that has a generator does.
        self.isolation.enter(rng.derive(self.seed_base, "start"))
        try:
            return workers.start(self._iterable)
        finally:
            self.isolation.leave()

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
        own = self._own
        last = -1 if own is None else self.limit - 1
        while True:
            if index == last and own is not None:
                own.note_cut(rng.mix(base, index))
            isolation.enter(rng.mix(base, index))
            try:
                batch = next(batches)
            except StopIteration:
                if index == 0 and own is not None and not begun_anew:
                    # Put back to the end of an epoch, it may take that for the end of this one.
                    begun_anew = True
                    isolation.leave()
                    batches = self._running = self._started()
                    continue
                if own is not None:
                    own.ended = True
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
        if self._own is not None:
            self._own.note_position(at_start=at_start)

    def finish(self, batches: Iterator[Any]) -> None:
        """Let the loader do what it does behind its last batch: RandomSampler may draw once more."""
        next(batches, None)
