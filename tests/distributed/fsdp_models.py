"""Models and runs that the tests of FSDP share; every rank imports them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl


class Net(pl.LightningModule):
    """Uneven parts: 7 rows, 3 rows, one row and a parameter of one element, over 2 or 3 ranks."""

    def __init__(self, *, norm: bool = False, manual: bool = False, optimizer: str = "adamw") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(7) if norm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(5, 7), middle, nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(3))
        self.automatic_optimization = not manual
        self.optimizer = optimizer
        self.seen: list[list[float]] = []

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows) * self.scale + self.shift

    def loss(self, batch: list[Tensor]) -> Tensor:
        self.seen.append(batch[0][:, 0].tolist())
        return self(batch[0]).pow(2).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.automatic_optimization:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self(batch[0]).pow(2).mean(), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            groups = [
                {"params": self.net.parameters(), "lr": 0.05},
                {"params": [self.scale, self.shift], "lr": 0.01, "momentum": 0.5},
            ]
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        if self.optimizer == "nadam":  # keeps a product without dimensions for each parameter
            return torch.optim.NAdam(self.parameters(), lr=0.02)
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def rows(count: int = 24) -> TensorDataset:
    """Rows of which the first number tells which one it is."""
    drawn = torch.randn(count, 5, generator=torch.Generator().manual_seed(1))
    drawn[:, 0] = torch.arange(count) / count
    return TensorDataset(drawn)


def loader(batch_size: int = 2, count: int = 24, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows(count), batch_size=batch_size, **options)


def whole(value: Any) -> Any:
    """A nested value with whole tensors in the place of parts. Ranks: all."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.detach().full_tensor().clone()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(one) for one in value]
    return value


def different(one: Any, other: Any, path: str = "") -> list[str]:
    """The places at which two nested values are not the same, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [at for key in keys for at in different(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [at for index, pair in pairs for at in different(*pair, f"{path}/{index}")]
    return [] if one == other else [path]


class Restored(pl.Callback):
    """Keeps what a fit starts from, whole."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = whole(dict(pl_module.state_dict()))
        self.optimizers = whole([one.state_dict() for one in trainer.optimizers])


def trainer_for(strategy: Any, root: str, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "default_root_dir": root,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(strategy=strategy, **{**settings, **options})


def listing(place: str | os.PathLike[str]) -> list[str]:
    return sorted(path.name for path in Path(place).iterdir() if not path.name.startswith("."))
