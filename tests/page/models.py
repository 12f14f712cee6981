"""The models of the page, in its words, and so small that their numbers can be worked out by hand."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl


class OneWeight(pl.LightningModule):
    """One weight, 0.62 at first. An epoch is one step and moves it by 0.1: down three times, then up again.

    ``val_loss`` is that weight: 0.52, 0.42, 0.32, 0.42, 0.52.
    """

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.backbone = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.backbone.weight, 0.62)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.l1_loss(self.backbone(batch[0]), batch[1])
        return loss if self.current_epoch < 3 else -loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        y_hat = self.backbone(x)
        self.log("val_loss", functional.l1_loss(y_hat, y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(1, 1), torch.zeros(1, 1)))

    val_dataloader = train_dataloader


class LitAutoEncoder(OneWeight):
    """Saves its hyperparameter."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.save_hyperparameters()


class LitModel(OneWeight):
    """Takes its dimensions from its hyperparameters."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(self.hparams.in_dim, self.hparams.out_dim)


class MyModel(OneWeight):
    """Takes all of its hyperparameters in one `argparse.Namespace` named hparams."""

    def __init__(self, hparams: Namespace) -> None:
        super().__init__(hparams.learning_rate)
        self.save_hyperparameters(hparams)
        self.l1 = nn.Linear(hparams.width, 1)


class TwoOptimizers(OneWeight):
    """Two optimizers, each with a learning rate scheduler of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.zero_grad()
            loss = functional.mse_loss(self.backbone(batch[0]) + self.other(batch[0]), batch[1])
            self.manual_backward(0.01 * loss)  # which fits into 16 bits, whatever the weights are
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(self.backbone.parameters()), torch.optim.Adam(self.other.parameters())]
        schedules = torch.optim.lr_scheduler
        return optimizers, [
            schedules.StepLR(optimizers[0], 2, 0.5),
            schedules.ExponentialLR(optimizers[1], 0.9),
        ]


def quiet(**arguments: Any) -> dict[str, Any]:
    """Arguments of a Trainer that says little and trains five epochs on the CPU."""
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return {"max_epochs": 5, **silent, **arguments}
