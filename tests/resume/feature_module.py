"""The module and the datamodule that `features` trains: one small net with a switch for all it can log and do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional

import holdfast as pl

from .feature_data import FEATURES, Plan, parts_of
from .feature_loaders import train_data, val_data
from .feature_optimizers import Rate, by_hand, configured


class Net(pl.LightningModule):
    def __init__(self, plan: Plan, width: int = 5) -> None:
        super().__init__()
        if plan["hyper"]:
            self.save_hyperparameters(ignore=["plan"])
        self.plan = plan
        layers: list[nn.Module] = [nn.Linear(FEATURES, width)]
        if plan["net"] in ("batchnorm", "both"):
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.Tanh())
        if plan["net"] in ("dropout", "both"):
            layers.append(nn.Dropout(0.3))
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)
        if plan["target"]:
            self.target = nn.Linear(width, 1).requires_grad_(False)
        if plan["encoder"]:
            self.encoder = copy.deepcopy(self.backbone).requires_grad_(False)
        if plan["compiled"]:
            self.backbone.compile(backend="eager")
        if plan["metrics"]:
            self.mean = torchmetrics.MeanMetric()
            self.errors = torchmetrics.MetricCollection(
                {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
            )
            self.own = torchmetrics.SumMetric()
            self.val_mse = torchmetrics.MeanSquaredError()
        self.automatic_optimization = not plan["manual"]
        self.passed: Callable[[str], Any] = len  # whoever may end the run in a step puts itself here

    def setup(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> Any:
        return train_data(self.plan, self.trainer.current_epoch if self.plan["reload"] else 0)

    def val_dataloader(self) -> Any:
        return val_data(self.plan, self.trainer.current_epoch if self.plan["reload"] else 0)

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.head.weight.dtype
        hidden = self.backbone(inputs.to(dtype))
        out = self.head(hidden)
        targets = targets.to(out.dtype)
        if self.plan["target"]:
            targets = 0.5 * (targets + self.target(hidden.detach()))
        if self.plan["encoder"]:
            targets = targets + 0.1 * self.encoder(inputs.to(dtype)).mean(1, keepdim=True).detach()
        return functional.mse_loss(out, targets), out.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pairs = parts_of(batch)
        losses = [self.loss(*pair) for pair in pairs]
        loss = sum(one[0] for one in losses) / len(losses)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("peak", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("noise", torch.rand(()), on_step=True, on_epoch=False)
        if self.plan["log_odd"] and batch_idx % 2:
            self.log("odd", loss, on_step=True, on_epoch=True, batch_size=3)
            self.log_dict(
                {"odd/a": loss, "odd/b": batch_idx + 0.5}, on_step=False, on_epoch=True, batch_size=2
            )
        if self.plan["metrics"]:
            out, targets = losses[0][1].float(), pairs[0][1].float()
            self.mean(loss.detach().float())
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            self.errors.update(out, targets)
            self.log_dict(self.errors, on_step=False, on_epoch=True)
            self.own.update(loss.detach().float())
        self.passed("training step")
        if self.plan["manual"]:
            return by_hand(self, loss, pairs, batch_idx)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for inputs, targets in parts_of(batch):
            if self.plan["val"] == "drawing":
                inputs = inputs + 0.1 * torch.randn_like(inputs)
            loss, out = self.loss(inputs, targets)
            self.log("val_loss", loss, batch_size=len(inputs), add_dataloader_idx=False) if self.plan[
                "val"
            ] not in ("two", "sequential") or dataloader_idx == 0 else self.log(
                "val_other", loss, batch_size=len(inputs), add_dataloader_idx=False
            )
            if self.plan["log_odd"]:
                self.log("val_step", loss, on_step=True, on_epoch=True, batch_size=len(inputs))
            if self.plan["metrics"]:
                self.val_mse.update(out.float(), targets.float())

    def on_validation_epoch_end(self) -> None:
        if self.plan["metrics"]:
            self.log("val_mse", self.val_mse.compute())
            self.val_mse.reset()

    def on_train_epoch_end(self) -> None:
        if self.plan["metrics"]:
            self.log("own", self.own.compute())
            self.own.reset()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.plan["target"]:
            with torch.no_grad():
                for kept, live in zip(self.target.parameters(), self.head.parameters()):
                    kept.lerp_(live, 0.1)
        if self.plan["encoder"]:
            with torch.no_grad():
                for kept, live in zip(self.encoder.parameters(), self.backbone.parameters()):
                    kept.lerp_(live, 0.05)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Rate):
            scheduler.turn()
        else:
            super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> Any:
        return configured(self)


class Data(pl.LightningDataModule):
    def __init__(self, plan: Plan, rows: int = 3) -> None:
        super().__init__()
        if plan["hyper"]:
            self.save_hyperparameters(ignore=["plan"])
        self.plan, self.asked = plan, 0

    def train_dataloader(self) -> Any:
        return train_data(self.plan, self.trainer.current_epoch if self.plan["reload"] else 0)

    def val_dataloader(self) -> Any:
        return val_data(self.plan, self.trainer.current_epoch if self.plan["reload"] else 0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if (
            self.trainer.state.fn == "fit"
            and not self.trainer.validating
            and not self.trainer.sanity_checking
        ):
            self.asked += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]
