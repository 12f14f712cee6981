"""Datasets and samplers that `features` draws from: all that makes a position in the data hard to come back to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate, get_worker_info

Plan = dict[str, Any]
Row = tuple[Tensor, Tensor]
FEATURES = 4


class Rows(Dataset[Row]):
    def __init__(self, rows: int, draws: bool, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(rows + 100 * seed)
        self.inputs = torch.randn(rows, FEATURES, generator=source)
        self.targets = self.inputs.sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=source)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Row:
        row = self.inputs[index]
        if self.draws:
            row = row + 0.1 * torch.randn(FEATURES) + random.random() * 0.1 + float(numpy.random.rand()) * 0.1
        return row, self.targets[index]


class RowsAtOnce(Rows):
    """Gives all rows of a batch in one go."""

    def __getitems__(self, indices: list[int]) -> list[Row]:
        shift = 0.1 * float(numpy.random.rand()) if self.draws else 0.0
        return [(inputs + shift, targets) for inputs, targets in map(self.__getitem__, indices)]


class Blocks(Dataset[Row]):
    """Gives whole batches: for ``batch_size=None``."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows) // self.size

    def __getitem__(self, index: int) -> Row:
        rows = [self.rows[index * self.size + at] for at in range(self.size)]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


class Stream(IterableDataset[Row]):
    """The rows in order, dealt out to the workers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.rows[index] for index in range(first, len(self.rows), step))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.rows)


class StatefulStream(IterableDataset[Row]):
    """Its iterator knows which row comes next."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return _Place(self.rows, range(first, len(self.rows), step))


class _Place:
    def __init__(self, rows: Rows, mine: range) -> None:
        self.rows, self.mine, self.at = rows, mine, 0

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.at >= len(self.mine):
            raise StopIteration
        self.at += 1
        return self.rows[self.mine[self.at - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Batches:
    """Batches from nowhere that torch knows: it can be iterated, and that is all."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[Row]:
        order = torch.randperm(len(self.rows)).tolist()
        for at in range(0, len(order) - self.size + 1, self.size):
            rows = [self.rows[index] for index in order[at : at + self.size]]
            yield torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


class StatefulLoader:
    """Knows its position, and gives every epoch another order."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows, self.size, self.position, self.begun = rows, size, 0, 0
        self.start: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = self.start = state["position"]
        self.begun = state["begun"]

    def __iter__(self) -> Any:
        start, self.start = self.start, None
        if start is None:
            start = 0
            self.begun += 1
        order = list(range(len(self.rows)))
        random.Random(self.begun).shuffle(order)
        for at in range(start, len(order) - self.size + 1, self.size):
            self.position = at + self.size
            rows = [self.rows[index] for index in order[at : at + self.size]]
            yield torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


class LazySampler(Sampler[int]):
    """Draws as it goes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        for _ in range(self.count):
            yield random.randrange(self.count)


class StatefulSampler(Sampler[int]):
    """Its order depends on how often it was begun, and on a state that moves as it is read."""

    def __init__(self, count: int) -> None:
        self.count, self.begun = count, 0

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]

    def __iter__(self) -> Any:
        self.begun += 1
        order = list(range(self.count))
        random.Random(self.begun).shuffle(order)
        return iter(order)


class Buckets(Sampler[list[int]]):
    """Rows of like size together: shuffled, sorted in pools of two batches, and the batches shuffled again."""

    def __init__(self, count: int, size: int, drop_last: bool) -> None:
        self.count, self.size, self.drop_last = count, size, drop_last

    def __len__(self) -> int:
        return self.count // self.size if self.drop_last else -(-self.count // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        order, pool = torch.randperm(self.count).tolist(), 2 * self.size
        order = [index for at in range(0, self.count, pool) for index in sorted(order[at : at + pool])]
        batches = [order[at : at + self.size] for at in range(0, self.count, self.size)]
        batches = batches[: len(self)]
        random.shuffle(batches)
        return iter(batches)


class LazyBatches(Sampler[list[int]]):
    """Batches of two rows or more, how many and which is drawn when they are asked for."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count // self.size

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            size = int(numpy.random.randint(2, self.size + 1))
            yield numpy.random.randint(0, self.count, size).tolist()


def collate_with_noise(rows: list[Row]) -> Any:
    """The default collate, and noise from each global generator."""
    inputs, targets = default_collate(rows)
    noise = 0.1 * torch.randn_like(inputs) + 0.1 * random.random() + 0.1 * float(numpy.random.rand())
    return inputs + noise, targets


def seed_worker(number: int) -> None:
    """A ``worker_init_fn`` as people write it."""
    numpy.random.seed(number)
    random.seed(number)


def parts_of(batch: Any) -> list[Row]:
    """The pairs of inputs and targets in a batch of any structure."""
    if isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch):
        return [(batch[0], batch[1])]
    if batch is None:
        return []
    children = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return [pair for child in children for pair in parts_of(child)]
