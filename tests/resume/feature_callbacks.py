"""Callbacks, plugins and strategies that `features` draws from."""

from __future__ import annotations

import os
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import holdfast as pl
from holdfast.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from holdfast.plugins.io import CheckpointIO
from holdfast.strategies import SingleDeviceStrategy

from .feature_data import Plan
from .tape import bits


class Fingerprints(pl.Callback):
    """Logs which rows came, and in which order: each value depends on every bit of every batch before."""

    def __init__(self) -> None:
        self.sums = {"train": 0, "val": 0}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("rows", self.with_batch("train", batch), on_step=True, on_epoch=False)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *rest: Any) -> None:
        if not trainer.sanity_checking:
            self.with_batch("val", batch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.log("val_rows", float(self.sums["val"] % 2**24))

    def with_batch(self, stage: str, batch: Any) -> float:
        self.sums[stage] = zlib.crc32(repr(bits(batch)).encode(), self.sums[stage])
        return float(self.sums[stage] % 2**24)  # what a float32 can hold

    def state_dict(self) -> dict[str, Any]:
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = dict(state)


class Remembers(pl.Callback):
    """A state of its own, that training depends on."""

    def __init__(self) -> None:
        self.total, self.seen = 0.0, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.total += float(trainer.callback_metrics.get("loss_step", 1.0))
        self.seen = [*self.seen[-3:], trainer.global_step]
        with torch.no_grad():
            pl_module.head.bias.add_(0.001 * self.total)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.total *= 0.5

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.total *= 0.25

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.seen = state["total"], state["seen"]


class ChangesRate(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5


class StopsAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class Writer(BasePredictionWriter):
    def write_on_batch_end(self, *args: Any) -> None:
        raise AssertionError


class OwnIO(CheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, f"{path}.part")
        os.replace(f"{path}.part", path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        os.remove(path)


class Overridden(SingleDeviceStrategy):
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        return result

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        checkpoint["mine"] = 1
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().load_checkpoint(path, *args, **kwargs)
        assert found["mine"] == 1
        return found


class Plain(SingleDeviceStrategy):
    pass


def callbacks_of(plan: Plan, root: Path) -> list[Any]:
    found: list[Any] = [Fingerprints()]
    average = plan["average"]
    if average == "swa":
        found.append(StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2))
    if average == "swa early":
        found.append(
            StochasticWeightAveraging(
                0.01, swa_epoch_start=1, annealing_strategy="linear", annealing_epochs=1
            )
        )
    if average == "mean":
        found.append(WeightAveraging())
    if average == "mean no buffers":
        found.append(WeightAveraging(use_buffers=False))
    if average == "ema":
        found.append(EMAWeightAveraging(decay=0.7))
    if average == "ema epochs":
        found.append(EMAWeightAveraging(decay=0.7, update_every_n_steps=2, update_starting_at_epoch=0))
    if average == "ema late":
        found.append(EMAWeightAveraging(decay=0.7, update_every_n_steps=2, update_starting_at_step=4))
    if plan["finetuning"] is not None:
        found.append(BackboneFinetuning(plan["finetuning"], lambda_func=lambda epoch: 1.5))
    if plan["monitor"]:
        found.append(
            LearningRateMonitor(
                None if plan["monitor"] == "all" else plan["monitor"],
                log_momentum=True,
                log_weight_decay=True,
            )
        )
    if plan["accumulate"] == "scheduled":
        found.append(GradientAccumulationScheduler({0: 2, 1: 3, 2: 1}))
    if plan["timer"]:
        found.append(Timer(timedelta(hours=5), interval="epoch"))
    if plan["lambda"]:

        def nudge(trainer: Any, module: Any, *rest: Any) -> None:
            with torch.no_grad():
                module.head.bias.mul_(0.99)

        found.append(
            LambdaCallback(on_train_batch_end=nudge, on_train_epoch_start=nudge, on_validation_start=nudge)
        )
    if plan["lr_callback"]:
        found.append(ChangesRate())
    if plan["state_callback"]:
        found.append(Remembers())
    if plan["stop_at"]:
        found.append(StopsAt(plan["stop_at"]))
    if plan["early"] == "train":
        found.append(EarlyStopping("loss_epoch", patience=1, min_delta=0.05, check_on_train_epoch_end=True))
    if plan["early"] == "val":
        found.append(EarlyStopping("val_loss", patience=2, min_delta=0.05, strict=False))
    if plan["early"] == "threshold":
        found.append(
            EarlyStopping("loss_epoch", stopping_threshold=0.9, patience=5, check_on_train_epoch_end=True)
        )
    if plan["on_exception"]:
        found.append(OnExceptionCheckpoint(root / "exceptions"))
    found.append(Writer("batch"))
    for number, kind in enumerate(plan["saves"]):
        found.append(saver(kind, root, number))
    return found


def saver(kind: str, root: Path, number: int) -> ModelCheckpoint:
    where = root / f"kept{number}"
    return {
        "default": lambda: ModelCheckpoint(),
        "step1": lambda: ModelCheckpoint(every_n_train_steps=1),
        "step2": lambda: ModelCheckpoint(every_n_train_steps=2, save_last=True),
        "step2_dir": lambda: ModelCheckpoint(
            where, filename="{step}-{loss_step:.2f}", every_n_train_steps=4, save_top_k=-1
        ),
        "step3_last": lambda: ModelCheckpoint(where, every_n_train_steps=3, save_last="link"),
        "epoch2": lambda: ModelCheckpoint(every_n_epochs=2, save_top_k=-1),
        "epoch_topk": lambda: ModelCheckpoint(monitor="loss_epoch", save_top_k=2, save_last=True),
        "max_topk": lambda: ModelCheckpoint(
            where, monitor="peak", mode="max", save_top_k=2, filename="{epoch}-{peak:.3f}"
        ),
        "val_topk": lambda: ModelCheckpoint(where, monitor="val_loss", save_top_k=2, save_last=True),
        "step_topk": lambda: ModelCheckpoint(
            monitor="loss_step", save_top_k=2, every_n_train_steps=1, save_last=True
        ),
        "all": lambda: ModelCheckpoint(save_top_k=-1, every_n_train_steps=1),
        "last": lambda: ModelCheckpoint(where, save_top_k=0, save_last=True),
        "time": lambda: ModelCheckpoint(train_time_interval=timedelta(0), save_last=True),
        "exc": lambda: ModelCheckpoint(where, save_on_exception=True, filename="x-{epoch}"),
        "weights": lambda: ModelCheckpoint(
            where, save_weights_only=True, monitor="loss_epoch", filename="w-{epoch}"
        ),
        "weights2": lambda: ModelCheckpoint(
            where, save_weights_only=True, monitor="loss_epoch", save_top_k=2, filename="w-{epoch}"
        ),
        "named": lambda: ModelCheckpoint(where, filename="same", every_n_train_steps=1, save_top_k=-1),
        "epoch_train_end": lambda: ModelCheckpoint(
            save_on_train_epoch_end=True, save_top_k=1, save_last=True
        ),
        "overwrite": lambda: ModelCheckpoint(
            where, filename="only", enable_version_counter=False, every_n_train_steps=2
        ),
    }[kind]()
