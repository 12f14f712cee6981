"""Trains a small module on loaders of every kind, and resumes it: all that it saw has to be the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from tests.training.toys import trainer

Data = Callable[[], Any]


def draws() -> list[float]:
    """A number from each global generator."""
    return [torch.rand(()).item(), float(numpy.random.rand()), random.random()]


class Rows(Dataset[Any]):
    """A row's number, and draws."""

    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), *draws()], dtype=torch.float64)


class Numbers(IterableDataset[Any]):
    """Rows in a shuffled order and with draws; each worker gives its own share. It knows no position."""

    def __init__(self, count: int = 23, shuffled: bool = False) -> None:
        self.count = count
        self.shuffled = shuffled

    def __iter__(self) -> Iterator[Tensor]:
        order = list(range(self.count))
        if self.shuffled:
            random.shuffle(order)
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in order[first::step]:
            yield torch.tensor([float(index), *draws()], dtype=torch.float64)


def _share(count: int) -> range:
    """The rows of this worker."""
    info = get_worker_info()
    return range(count) if info is None else range(info.id, count, info.num_workers)


class Resumable(IterableDataset[Any]):
    """Its iterator knows its position, and has a generator of its own in its state."""

    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return _Position(_share(self.count))


class _Position:
    def __init__(self, share: range) -> None:
        self.share = share
        self.position = 0
        self.generator = random.Random(7)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.position >= len(self.share):
            raise StopIteration
        self.position += 1
        row = float(self.share[self.position - 1])
        return torch.tensor([row, self.generator.random(), 0.0, 0.0], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": self.generator.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        version, words, gauss = state["generator"]
        self.generator.setstate((version, tuple(words), gauss))


class GoingRound(IterableDataset[Any]):
    """Knows its position itself, and that over epochs: an epoch that is cut short is gone on with."""

    def __init__(self, count: int = 23) -> None:
        self.count = count
        self.position = 0
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < self.count:
            self.position += 1
            yield torch.tensor([self.position - 1.0, self.passes, *draws()[1:]], dtype=torch.float64)
        self.position = 0
        self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.passes = state["position"], state["passes"]


def noisy(rows: list[Tensor]) -> Tensor:
    """A collate function that draws."""
    batch = torch.stack(rows)
    return batch + torch.cat([torch.zeros(1), torch.tensor(draws())]) * 0.001


class Probe(pl.LightningModule):
    """Its weights depend on every number that it is given, in order, and on dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.seen: list[Any] = []
        self.epoch_ends: list[int] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        numbers = _numbers(batch)
        self.seen.append(numbers)
        noise = torch.nn.functional.dropout(self.weight, 0.5) * random.random()
        return (noise * torch.tensor(numbers).sum().cos()).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(_numbers(batch))
        self.log("val", torch.tensor(self.validated[-1]).sum())

    def on_train_epoch_end(self) -> None:
        self.epoch_ends.append(len(self.seen))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def _numbers(batch: Any) -> list[float]:
    """Every number in a batch."""
    if isinstance(batch, Tensor):
        return [float(number) for number in batch.flatten().tolist()]
    parts = batch.values() if isinstance(batch, dict) else batch
    return [] if batch is None else [number for part in parts for number in _numbers(part)]


def fit(
    data: Any, directory: Path | None = None, ckpt_path: Path | None = None, val: Any = None, **arguments: Any
) -> Probe:
    """Train; with a directory, a checkpoint of every step and of every epoch's end is left in it."""
    pl.seed_everything(4, verbose=False)
    saving: dict[str, Any] = {}
    if directory is not None or ckpt_path is not None:
        place = ckpt_path.parent / "resumed" if ckpt_path is not None else directory
        every = 1 if directory is not None else 1000
        common: dict[str, Any] = {"dirpath": place, "save_top_k": -1, "auto_insert_metric_name": False}
        saving["callbacks"] = [
            ModelCheckpoint(filename="{step}", every_n_train_steps=every, **common),
            ModelCheckpoint(filename="end-{step}", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        ]
    model = Probe()
    run = trainer(**{"max_epochs": 2, "num_sanity_val_steps": 0, **saving, **arguments})
    given = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}
    run.fit(model, **given, val_dataloaders=val, ckpt_path=ckpt_path)
    return model


def assert_exact(
    directory: Path,
    data: Data,
    *,
    steps: Iterable[int] | None = None,
    resumed: Data | None = None,
    val: Data = lambda: None,
    **arguments: Any,
) -> Probe:
    """Train whole, and from each of these steps and of the epochs' ends on: the rest is the same, bit for bit.

    Args:
        directory: An empty directory.
        data: Makes the loader, anew for each run.
        steps: Where to resume; everywhere where None.
        resumed: Makes the loader of the resumed runs, where it is another one.
        val: Makes the validation loader.
        arguments: The trainer's.
    """
    whole = fit(data(), directory, val=val(), **arguments)
    count = len(whole.seen)
    assert len({tuple(numbers) for numbers in whole.seen}) > 1
    for step in range(1, count) if steps is None else steps:
        assert step < count
        rest = fit((resumed or data)(), None, directory / f"{step}.ckpt", val(), **arguments)
        _assert_rest(rest, whole, step)
    for step in whole.epoch_ends[:-1]:
        rest = fit((resumed or data)(), None, directory / f"end-{step}.ckpt", val(), **arguments)
        _assert_rest(rest, whole, step)
    return whole


def _assert_rest(rest: Probe, whole: Probe, step: int) -> None:
    assert rest.seen == whole.seen[step:], f"resumed at step {step}"
    assert rest.validated == whole.validated[len(whole.validated) - len(rest.validated) :]
    assert torch.equal(rest.weight, whole.weight), f"resumed at step {step}"


def loader(**arguments: Any) -> DataLoader[Any]:
    """Shuffled rows, with draws in the dataset and in the collate function."""
    return DataLoader(
        **{"dataset": Rows(), "batch_size": 4, "shuffle": True, "collate_fn": noisy, **arguments}
    )
