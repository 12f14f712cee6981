"""What ranks run in the tests of saving, signals and time: a small model and fits of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint


class Model(pl.LightningModule):
    """A linear layer with dropout, and a loss that differs from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.dropout = torch.nn.Dropout(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.dropout(self.layer(batch[0])).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).pow(2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(rows: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(rows, 4, generator=generator)), batch_size=2, shuffle=True)


def trainer_in(place: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """A trainer of all ranks, which saves and says what the callbacks want."""
    defaults: dict[str, Any] = {
        "strategy": "ddp", "accelerator": "cpu", "max_epochs": 2, "logger": False, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": place,
        "callbacks": list(callbacks),
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **options})


def new_model() -> Model:
    pl.seed_everything(1)
    return Model()


def rank() -> int:
    return int(os.environ["RANK"])


def files(place: Path) -> list[str]:
    return sorted(one.name for one in place.rglob("*.ckpt"))


def weights(model: Model) -> list[float]:
    return [value for one in model.parameters() for value in one.detach().flatten().tolist()]


class At(Callback):
    """Does something after a batch, on some ranks."""

    def __init__(self, step: int, do: Any, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.step, self.do, self.ranks = step, do, ranks

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.progress.total_batches == self.step and trainer.global_rank in self.ranks:
            self.do(trainer)


def checkpoint(place: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=place / "kept", **options)
