"""One small regression without anything random, written once for holdfast and for PyTorch Lightning."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

FEATURES = 5


def loader(rows: int, batch_size: int = 4) -> DataLoader[Any]:
    source = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, FEATURES, generator=source)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch_size)


def module_class(pl: Any) -> type:
    """The LightningModule, on top of ``pl.LightningModule``."""

    class Regression(pl.LightningModule):
        def __init__(
            self, width: int = 8, lr: float = 0.05, scheduler: str = "onecycle", notes: Any = None
        ) -> None:
            super().__init__()
            self.save_hyperparameters()
            layers = nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1)
            self.net = nn.Sequential(*layers)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = functional.mse_loss(self(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("plain", loss)
            for reduction in ("mean", "max", "min", "sum"):
                self.log(reduction, loss, on_step=False, on_epoch=True, reduce_fx=reduction)
            self.log_dict({"hidden": loss * 2, "halved": loss / 2}, logger=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            error = functional.mse_loss(self(batch[0]), batch[1])
            self.log("val_loss", error)
            self.log("val_worst", error, reduce_fx="max")
            self.log("val_steps", error, on_step=True, on_epoch=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", functional.mse_loss(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

        def train_dataloader(self) -> DataLoader[Any]:
            return loader(30)

        def val_dataloader(self) -> DataLoader[Any]:
            return loader(10)

        def test_dataloader(self) -> DataLoader[Any]:
            return loader(11)

        def predict_dataloader(self) -> DataLoader[Any]:
            return loader(9)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
            schedulers = torch.optim.lr_scheduler
            if self.hparams.scheduler == "onecycle":
                onecycle = schedulers.OneCycleLR(optimizer, 0.1, total_steps=100)
                return [optimizer], [{"scheduler": onecycle, "interval": "step"}]
            if self.hparams.scheduler == "step":
                return [optimizer], [schedulers.StepLR(optimizer, 1, 0.5)]
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    return Regression


def make_module(pl: Any, **hyperparameters: Any) -> Any:
    """A module whose first weights are the same every time and in both packages."""
    torch.manual_seed(3)
    return module_class(pl)(**hyperparameters)


def make_trainer(pl: Any, root: Path, **arguments: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": root,
            "max_epochs": 3,
            **quiet,
            **arguments,
        }
    )


def csv_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file as numbers, without the cells that are empty."""
    with path.open(newline="") as file:
        return [{key: float(cell) for key, cell in row.items() if cell != ""} for row in csv.DictReader(file)]


def tree(root: Path) -> list[str]:
    """Every file under ``root``, by its path relative to it."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
