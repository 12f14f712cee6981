"""How the processes of a job share a loader's rows: one order, cut into global batches, and these into parts.

Global batch k of an order of rows is rows ``[k * G, (k + 1) * G)`` of it, and rank r has the r-th part of it.
G is the batch size times the number of processes, so 2 ranks with batches of 8, 4 ranks with batches of 4 and
one process with batches of 16 see the same global batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """The processes that share the data, as one of them sees them.

    Attributes:
        rank: This process.
        ranks: How many there are; may be 1, where a run of several goes on in one.
        seeded: The rule of the run: each epoch's order is drawn from generators that are seeded for it. A run
            that began in one process draws as torch does, from rank 0's generators as they are.
        distributes: Whether a loader's batches are split among the ranks.
        broadcast: Returns rank 0's object on every rank.
        gather: Returns every rank's object on rank 0, None elsewhere.
    """

    rank: int
    ranks: int
    seeded: bool
    distributes: bool
    broadcast: Callable[[Any], Any]
    gather: Callable[[Any], list[Any] | None]

    @property
    def order(self) -> str:
        """The rule's name in a checkpoint."""
        return "seeded" if self.seeded else "drawn"


def job_of(trainer: Trainer, order: str | None) -> Job | None:
    """The job that a trainer's process is part of; None for one process that draws as torch does.

    Args:
        trainer: The trainer.
        order: The rule that the run has by its checkpoint, "seeded" or "drawn"; None if it begins here.
    """
    ranks = trainer.world_size
    seeded = ranks > 1 if order is None else order == "seeded"
    if ranks == 1 and not seeded:
        return None
    strategy = trainer.strategy
    return Job(
        trainer.global_rank, ranks, seeded, trainer.use_distributed_sampler and ranks > 1,
        strategy.broadcast, strategy.gather,
    )  # fmt: skip


# -- where batches begin and end -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Where global batches begin in an order of units: of rows, or of what a batch sampler gives.

    Attributes:
        size: Units in a global batch.
        of_rows: The units are rows. Then a batch that does not begin on the grid, as the first one after a
            resume with another batch size, is a short one that ends on it. Batches of other units, which are
            not taken apart, all have the full size from there on.
        unit_rows: Rows in a unit, where that is known.
        first: A batch, and the unit that it begins at, if that is not a multiple of the size.
    """

    size: int
    of_rows: bool = True
    unit_rows: int | None = 1
    first: tuple[int, int] = (0, 0)

    def begin_of(self, batch: int) -> int:
        """The unit that a batch begins at; of a batch from ``first`` on."""
        first_batch, first_unit = self.first
        if batch == first_batch:
            return first_unit
        return batch * self.size if self.of_rows else first_unit + (batch - first_batch) * self.size

    def alike(self, other: Grid) -> bool:
        """Whether both cut an order into batches of the same size."""
        return (self.size, self.of_rows, self.unit_rows) == (other.size, other.of_rows, other.unit_rows)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "size": self.size,
            "of_rows": self.of_rows,
            "unit_rows": self.unit_rows,
            "first": list(self.first),
        }


def grid_of(state: dict[str, Any]) -> Grid | None:
    """The grid that a stream's state was saved with; None where it does not tell."""
    saved = state.get("grid")
    if saved is not None:
        return Grid(saved["size"], saved["of_rows"], saved["unit_rows"], tuple(saved["first"]))
    # Older files are of one process, and know the batch size of a loader that has one.
    size = state.get("batch_size")
    return Grid(size) if isinstance(size, int) else None


def count_batches(units: int, size: int, drop_last: bool) -> int:
    """Global batches in an order of so many units."""
    return units // size if drop_last else -(-units // size)


def part_of(units: int, rank: int, ranks: int) -> slice:
    """A rank's part of a global batch of so many units.

    The parts of all ranks put together are the batch, and their sizes differ by at most 1. If there are fewer
    units than ranks, each rank has one, so that some are repeated.
    """
    if units < ranks:
        return slice(rank % units, rank % units + 1)
    return slice(rank * units // ranks, (rank + 1) * units // ranks)


def carried_over(done: Grid, batch: int, grid: Grid) -> tuple[int, bool]:
    """The units of ``grid`` that are done where batch number ``batch`` of ``done`` is about to begin.

    Returns:
        The number, and whether that is the same position; where the units cannot be cut there, or their sizes
        are unknown, it is one before it.
    """
    units = done.begin_of(batch)
    if done.unit_rows is None or grid.unit_rows is None:
        return units, done.of_rows == grid.of_rows
    rows = units * done.unit_rows
    return rows // grid.unit_rows, rows % grid.unit_rows == 0


def going_on(grid: Grid, done: int, units: int | None) -> tuple[int, Grid]:
    """The batch to go on with behind so many units, and the grid for the rest of the epoch.

    Args:
        grid: Of the loader.
        done: Units of the epoch that are done.
        units: Units in the epoch; None where nobody knows.
    """
    if units is not None and done >= units:
        return count_batches(units, grid.size, drop_last=False), grid
    batch = done // grid.size
    if done == batch * grid.size:
        return batch, grid
    if not grid.of_rows and units is not None:
        # The epoch keeps its number of batches.
        left = count_batches(units - done, grid.size, drop_last=False)
        batch = count_batches(units, grid.size, drop_last=False) - left
    return batch, replace(grid, first=(batch, done))


# -- cutting an order ----------------------------------------------------------------------------------------


def parts_of_sequence(
    order: Sequence[Any], grid: Grid, position: int, *, drop_last: bool, rank: int, ranks: int
) -> Iterator[Any]:
    """A rank's parts of the global batches from a position on, of an order that can be indexed."""
    for batch in itertools.count(position):
        begin, end = grid.begin_of(batch), grid.begin_of(batch + 1)
        found = min(end, len(order)) - begin
        if found <= 0 or (drop_last and begin + found < end):
            return
        own = part_of(found, rank, ranks)
        taken: Any = order[begin + own.start : begin + own.stop]
        rows: list[Any] = taken.tolist() if hasattr(taken, "tolist") else list(taken)
        yield rows if grid.of_rows else rows[0]


def global_batches(
    units: Iterator[Any], grid: Grid, position: int, *, drop_last: bool
) -> Iterator[list[Any]]:
    """The global batches from a position on; ``units`` gives what follows that position."""
    length = grid.begin_of(position + 1) - grid.begin_of(position)
    if length != grid.size:
        short = list(itertools.islice(units, length))
        if not short or (drop_last and len(short) < length):
            return
        yield short
    yield from BatchSampler(units, grid.size, drop_last)


def parts_of(batches: Iterable[list[Any]], grid: Grid, *, rank: int, ranks: int) -> Iterator[Any]:
    """A rank's part of each global batch."""
    if grid.of_rows:
        return (batch[part_of(len(batch), rank, ranks)] for batch in batches)
    return (batch[part_of(len(batch), rank, ranks).start] for batch in batches)


# -- a rank that there was not -------------------------------------------------------------------------------


def of_another_rank(state: dict[str, Any]) -> dict[str, Any]:
    """A stream's state for a rank that the job that saved it did not have: without any loader's own state.

    Args:
        state: Another rank's "data" of a checkpoint, or one of its "validation_data".
    """
    found = {**{key: state[key] for key in state if key not in ("loader", "cut")}, "of_another_rank": True}
    if isinstance(state.get("now"), dict):
        found["now"] = of_another_rank(state["now"])
    if "parts" in state:
        found["parts"] = [of_another_rank(part) for part in state["parts"]]
    begin = state.get("begin")
    if isinstance(begin, dict):
        found["begin"] = {key: begin[key] for key in begin if key not in ("loader", "cut")}
        if "parts" in begin:
            found["begin"]["parts"] = [of_another_rank(part) for part in begin["parts"]]
    return found
