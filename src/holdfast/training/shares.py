"""How one loader's rows are shared by the processes of a job, and where its batches begin and end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from holdfast.training import rng
from holdfast.training.loader_kinds import Way
from holdfast.training.loader_parts import generators_of_samplers, rows_sampler, splits_itself
from holdfast.training.sharding import (
    Grid,
    Job,
    carried_over,
    count_batches,
    going_on,
    grid_of,
)
from holdfast.utilities.combined_loader import length_of
from holdfast.utilities.rank_zero import rank_zero_info


class Shares:
    """A loader as the processes of a job share it.

    Args:
        loader: The loader.
        job: The processes; None for one that draws as torch does.
        way: How the loader is brought back to a position. Where it is sought, its order can be cut anywhere.
    """

    def __init__(self, loader: Any, job: Job | None, way: Way) -> None:
        sought = way == "sought"
        ranks = 1 if job is None else job.ranks
        self.loader = loader
        self._job = job
        self.batches: Any = rows_sampler(loader) if sought else None
        """The batch sampler that cuts an order of rows; None where the batches are somebody else's."""
        self.splits = sought and job is not None and job.distributes and not splits_itself(loader)
        """Whether each process has its part of every global batch."""
        self.rank = job.rank if self.splits and job is not None else 0
        self.ranks = ranks if self.splits else 1
        self.drop_last = bool(getattr(self.batches, "drop_last", False))
        self.seeds: list[int] | None = None
        """What the generators of the samplers' own were seeded with, where an order is seeded, not drawn."""
        if sought and job is not None and job.seeded:
            found = {id(one): one for _, one in generators_of_samplers(loader)}.values()
            self.seeds = [one.initial_seed() for one in found if isinstance(one, torch.Generator)]
        # A loader with a state knows its own position; of others, each process may have other rows.
        each_its_own = self.splits or splits_itself(loader) or way == "replayed"
        self._plain = self._make_grid(sought, ranks if each_its_own else 1)
        self.grid = self._plain
        """Where global batches begin in this epoch; None where the loader does not tell."""
        self.cuts_anywhere = sought and self.ranks == ranks
        self._located = False
        self.said = False
        """Whether `same_data` has said what there is to be said about it."""

    def _make_grid(self, sought: bool, ranks: int) -> Grid | None:
        loader = self.loader
        if self.batches is not None:
            return Grid(self.batches.batch_size * ranks)
        if not sought:
            size = getattr(loader, "batch_size", None) if isinstance(loader, DataLoader) else None
            return Grid(size * ranks) if isinstance(size, int) else None
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        rows = getattr(sampler, "batch_size", 1 if loader.batch_sampler is None else None)
        return Grid(ranks, of_rows=False, unit_rows=rows if isinstance(rows, int) else None)

    @property
    def own_grid(self) -> Grid:
        """Where this process's batches begin in the order that it cuts itself."""
        assert self.grid is not None
        if self.cuts_anywhere:
            return self.grid
        return Grid(self.batches.batch_size) if self.batches is not None else replace(self.grid, size=1)

    @property
    def as_torch_cuts(self) -> bool:
        """Whether the batches are those that the loader's own sampler gives, from any number of them on."""
        return self.ranks == 1 and (self.grid is None or self.own_grid.first == (0, 0))

    @property
    def batch_size(self) -> int | None:
        """Rows in a batch of the whole job, where that is known."""
        if self._job is None:
            size: int | None = getattr(self.loader, "batch_size", None)
            return size
        grid = self._plain
        return None if grid is None or grid.unit_rows is None else grid.size * grid.unit_rows

    def seed_of(self, base: int) -> int | None:
        """What an epoch's order is drawn from; None where that is the run's generators as they are.

        Args:
            base: The epoch's number, that is the same on every rank.
        """
        return None if self.seeds is None else rng.derive(base, "order", *self.seeds)

    def units(self) -> int | None:
        """Rows, or items of a batch sampler, in an epoch; None where nobody can tell."""
        if self.batches is not None:
            return length_of(self.batches.sampler)
        loader = self.loader
        return length_of(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)

    def length(self) -> int | None:
        """Global batches in an epoch of a loader that is split."""
        units, grid = self.units(), self._plain
        return None if units is None or grid is None else count_batches(units, grid.size, self.drop_last)

    # -- where an epoch begins, or is gone on with -----------------------------------------------------------

    def begin(self) -> None:
        """An epoch begins: its batches are on the grid."""
        self.grid, self._located = self._plain, False

    def locate(self, position: int, state: dict[str, Any]) -> int:
        """The batch that a stream goes on with, for `resume`, in an epoch that was under way.

        With batches of another size than before that is the one that holds the next row.

        Args:
            position: Batches that were done, of the size that they had then.
            state: The stream's, of a checkpoint.
        """
        done, grid = grid_of(state), self._plain
        if done is None or grid is None or done.alike(grid):
            return position
        units, whole = carried_over(done, position, grid)
        total = self.units() if self.cuts_anywhere else None
        batch, self.grid = going_on(grid, units, total)
        if not self.cuts_anywhere:
            batch, self.grid = units // grid.size, grid
        self._located = True
        self._say(done, units, batch, total, whole and (self.cuts_anywhere or units % grid.size == 0))
        return batch

    def _say(self, done: Grid, units: int, batch: int, total: int | None, exact: bool) -> None:
        grid = self.grid
        assert grid is not None
        unit = "row" if grid.of_rows else "item of its batch sampler"
        each = f" ({grid.size // self.ranks} on each of {self.ranks} ranks)" if self.ranks > 1 else ""
        line = f"the batch size was {done.size} and is {grid.size}{each}: the epoch goes on at {unit} "
        if not exact:
            line += f"{batch * grid.size}, batch {batch}; {units} were done, so that some come again"
        elif total is not None and units >= total:
            line = f"the batch size was {done.size} and is {grid.size}{each}: every row of the epoch is done"
        else:
            line += f"{units}, batch {batch}"
            length = grid.begin_of(batch + 1) - units
            rows = "row" if length == 1 else "rows"
            line += "" if length == grid.size else f", which has the {length} {rows} up to {units + length}"
        rank_zero_info(line)

    def resume(self, state: dict[str, Any]) -> bool:
        """Take the grid of an epoch that is gone on with; returns whether its batches have the same size."""
        done = grid_of(state)
        if self._located:
            self._located = False
            return False
        if done is None or self._plain is None:
            return state.get("batch_size") == getattr(self.loader, "batch_size", None)
        same = done.alike(self._plain)
        self.grid = done if same and self.cuts_anywhere else self._plain
        return same
