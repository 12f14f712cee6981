"""A small model and its data, for tests that look at one thing of the trainer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl


class Toy(pl.LightningModule):
    """One linear layer; remembers the rows that it was trained on."""

    def __init__(self, lr: float = 0.1, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)
        self.seen: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += batch[1].tolist()
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def rows(count: int = 12, batch_size: int = 4, **arguments: Any) -> DataLoader[Any]:
    """``count`` rows ``(features (3,), id)``."""
    features = torch.arange(count * 3.0).view(count, 3) / (count * 3)
    return DataLoader(TensorDataset(features, torch.arange(count)), batch_size=batch_size, **arguments)


def trainer(**arguments: Any) -> pl.Trainer:
    """A trainer that says and saves nothing by itself, on one epoch."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(arguments.get("callbacks")),
    }
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **arguments})


def checkpoints(directory: Path) -> list[str]:
    """Names of the checkpoints below a directory."""
    return sorted(path.name for path in directory.rglob("*.ckpt"))
