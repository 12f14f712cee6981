"""The model of the reference page, trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import holdfast as pl
from tests.training.toys import rows, trainer


class LitModel(pl.LightningModule):
    """The one of the reference page."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(self.hparams.in_dim, self.hparams.out_dim)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.l1(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def saved(model: Any, path: Path) -> Path:
    """Train for an epoch and save."""
    run = trainer()
    run.fit(model, rows())
    run.save_checkpoint(path)
    return path


def same(mine: nn.Module, path: Path) -> bool:
    weights = torch.load(path, weights_only=True)["state_dict"]
    return all(torch.equal(weights[key], value) for key, value in mine.state_dict().items())
