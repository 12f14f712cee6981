"""A model with tensors that are worth copying late, runs of it, and a gate that holds a file back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.checkpoint import commit
from holdfast.checkpoint.load import load
from tests.training.toys import trainer

WIDTH = 64  # a weight of 16 KiB: what is much smaller is copied at once


class Wide(pl.LightningModule):
    """Trained by Adam, with statistics that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
        )

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def batches(count: int = 8) -> DataLoader[Any]:
    """``count`` batches of 4 rows."""
    rows = torch.randn(4 * count, WIDTH, generator=torch.Generator().manual_seed(count))
    return DataLoader(TensorDataset(rows), batch_size=4)


def fit(saves: Any, *callbacks: Any, module: type[pl.LightningModule] = Wide, **arguments: Any) -> pl.Trainer:
    """Train on 8 batches; a list of callbacks may come in the place of one that saves."""
    made = [*callbacks, *(saves if isinstance(saves, list) else [saves])]
    torch.manual_seed(3)
    run = trainer(callbacks=made, **{"max_epochs": 1, **arguments})
    run.fit(module(), batches())
    return run


def every_step(directory: Path, **arguments: Any) -> ModelCheckpoint:
    """Saves each step, and keeps all."""
    return ModelCheckpoint(
        directory, **{"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1, **arguments}
    )


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor in a checkpoint, by where it is; of a path as a key only the name counts."""
    found: dict[str, Tensor] = {}

    def look(where: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[where] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                look(f"{where}.{os.path.basename(str(key))}", item)
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                look(f"{where}.{key}", item)

    look("", load(path))
    return found


def assert_same_tensors(path: Path, other: Path) -> None:
    """Two checkpoints hold the same values in the same places."""
    ones, others = tensors_of(path), tensors_of(other)
    assert ones.keys() == others.keys()
    differ = [where for where, value in ones.items() if not torch.equal(value, others[where])]
    assert differ == [], f"{path} and {other} differ in {differ}"


class Before(Callback):
    """Does something before the batch that follows ``step`` steps."""

    def __init__(self, step: int, do: Callable[[pl.Trainer], Any]) -> None:
        self.step = step
        self.do = do

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.do(trainer)


class Gate:
    """Holds back one of the files that are written in the background, when its snapshot is taken, until `open`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.opened = threading.Event()
        self.held = threading.Event()

    def open(self, *_: Any) -> None:
        self.opened.set()

    def end(self, trainer: pl.Trainer) -> None:
        """Open it, and wait until that save has ended; nobody has told the callbacks of it."""
        self.open()
        trainer.engine.wait()

    def __call__(self, name: str) -> None:
        if name == "temp-created" and threading.current_thread() is not threading.main_thread():
            self.number -= 1
            if not self.number:
                self.held.set()
                assert self.opened.wait(20)


@contextmanager
def gate(number: int = 1) -> Iterator[Gate]:
    """A gate in the way of the first, or a later, save in the background; of none with 0."""
    made, before = Gate(number), commit.crash_point
    commit.crash_point = made
    try:
        yield made
    finally:
        made.open()
        commit.crash_point = before
