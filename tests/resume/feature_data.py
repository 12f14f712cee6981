"""The loaders that `features` draws from: all that makes a position in the data hard to come back to."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from holdfast.utilities.combined_loader import CombinedLoader

Plan = dict[str, Any]
FEATURES = 4


class Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, rows: int, draws: bool, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(rows + 100 * seed)
        self.inputs = torch.randn(rows, FEATURES, generator=source)
        self.targets = self.inputs.sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=source)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.inputs[index]
        if self.draws:
            row = row + 0.1 * torch.randn(FEATURES) + random.random() * 0.1 + float(numpy.random.rand()) * 0.1
        return row, self.targets[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows[index] for index in range(len(self.rows)))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.rows)


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


def loader(plan: Plan, rows: int, seed: int = 0, **more: Any) -> DataLoader[Any]:
    options: dict[str, Any] = {
        "batch_size": plan["batch_size"],
        "shuffle": plan["shuffle"],
        "drop_last": plan["drop_last"],
        "num_workers": plan["workers"],
    }
    if plan["own_generator"]:
        options["generator"] = torch.Generator().manual_seed(5 + seed)
    return DataLoader(Rows(rows, plan["draws"], seed), **{**options, **more})


def train_data(plan: Plan, seed: int = 0) -> Any:
    kind, rows, size = plan["data"], plan["rows"], plan["batch_size"]
    if kind == "one":
        return loader(plan, rows, seed)
    if kind == "lazy sampler":
        return loader(plan, rows, seed, shuffle=False, sampler=LazySampler(rows))
    if kind == "stateful sampler":
        return loader(plan, rows, seed, shuffle=False, sampler=StatefulSampler(rows))
    if kind == "iterable":
        return DataLoader(
            Stream(Rows(rows, plan["draws"], seed)), batch_size=size, drop_last=plan["drop_last"]
        )
    if kind == "sized iterable":
        return DataLoader(
            SizedStream(Rows(rows, plan["draws"], seed)), batch_size=size, drop_last=plan["drop_last"]
        )
    if kind == "stateful loader":
        return StatefulLoader(Rows(rows, plan["draws"], seed), size)
    if kind == "list":
        return [loader(plan, rows, seed), loader(plan, rows + 5, seed + 1)]
    if kind == "nested":
        return {
            "a": loader(plan, rows, seed),
            "b": [loader(plan, rows + 3, seed + 1), loader(plan, 6, seed + 2)],
        }
    if kind == "cycle with iterable":
        return CombinedLoader(
            [
                loader(plan, rows, seed),
                DataLoader(
                    Stream(Rows(7, plan["draws"], seed)), batch_size=size, drop_last=plan["drop_last"]
                ),
            ],
            "max_size_cycle",
        )
    return CombinedLoader({"a": loader(plan, rows, seed), "b": loader(plan, 6, seed + 1)}, kind)


def val_data(plan: Plan, seed: int = 0) -> Any:
    kind = plan["val"]
    if kind is None:
        return []
    size = plan["batch_size"]
    first = DataLoader(Rows(5, kind == "drawing", 50 + seed), batch_size=size, shuffle=kind == "shuffled")
    if kind in ("one", "drawing", "shuffled"):
        return first
    if kind == "iterable":
        return DataLoader(Stream(Rows(7, True, 50 + seed)), batch_size=size)
    second = DataLoader(Rows(9, True, 60 + seed), batch_size=size, shuffle=True)
    return [first, second] if kind == "two" else CombinedLoader([first, second], kind)


def parts_of(batch: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch):
        return [(batch[0], batch[1])]
    if batch is None:
        return []
    children = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return [pair for child in children for pair in parts_of(child)]
