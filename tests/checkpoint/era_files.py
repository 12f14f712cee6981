"""Checkpoints in the layout of each era of PyTorch Lightning, made by plain torch: two epochs of `Model`."""

from __future__ import annotations

import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCHES, LR = 2, 3, 0.1
STEPS = EPOCHS * BATCHES
SCALER = {
    "scale": 1024.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 7,
}
BEST = {"best_model_score": torch.tensor(0.25), "best_model_path": "best.ckpt"}
STOPPING = {"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(0.25), "patience": 5}
MONITORS = "'monitor': 'loss', 'mode': 'min'"
INTERVALS = "'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None"


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(36.0).view(12, 3) / 36), batch_size=4)


def model_class(pl: Any, *, whole: bool = False) -> type:
    """The module on top of ``pl.LightningModule``; ``whole`` takes a Namespace, as was usual before 0.8."""

    class Base(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def train_dataloader(self) -> Any:
            return batches()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    class Model(Base):
        def __init__(self, lr: float = LR) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(5)
            self.layer = nn.Linear(3, 1)

    class WholeModel(Base):
        def __init__(self, hparams: Namespace) -> None:
            super().__init__()
            self.save_hyperparameters(hparams)
            torch.manual_seed(5)
            self.layer = nn.Linear(3, hparams.width)

    return WholeModel if whole else Model


def trained() -> dict[str, Any]:
    """Two epochs of `Model`, without any trainer: what every era has under the same names."""
    torch.manual_seed(5)
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(EPOCHS):
        for (rows,) in batches():
            optimizer.zero_grad()
            layer(rows).square().mean().backward()
            optimizer.step()
        scheduler.step()
    return {
        "state_dict": {f"layer.{name}": value for name, value in layer.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
    }


@contextmanager
def importable(*names: str) -> Iterator[list[type]]:
    """Classes of a package that is not installed, for as long as a file that names them is written."""
    made = []
    before = set(sys.modules)
    for name in names:
        module, _, short = name.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        cls = type(short, (dict,), {"__module__": module})
        setattr(sys.modules[module], short, cls)
        made.append(cls)
    try:
        yield made
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def progress(count: int) -> dict[str, Any]:
    four = dict.fromkeys(("ready", "started", "processed", "completed"), count)
    return {"current": dict(four), "total": dict(four)}


def loops(*, steps_known: bool, today: bool) -> dict[str, Any]:
    """The end of the second epoch as 1.6 to 1.9 stored it, or ``today``."""
    step = {"ready": STEPS, "completed": STEPS}
    optim = {"optimizer": {"step": {"current": step, "total": step}, "zero_grad": progress(STEPS)}}
    epochs, done = progress(EPOCHS), progress(BATCHES)
    for count in epochs.values():
        count["completed"] = EPOCHS - 1
    done["total"] = dict.fromkeys(done["total"], STEPS)
    fit = {
        "state_dict": {},
        "epoch_progress": epochs,
        "epoch_loop.state_dict": {"_batches_that_stepped": STEPS} if steps_known else {},
        "epoch_loop.batch_progress": {**done, "is_last_batch": True},
        "epoch_loop.scheduler_progress": {"current": step, "total": step},
    }
    if today:
        fit["epoch_loop.automatic_optimization.state_dict"] = {}
        fit["epoch_loop.automatic_optimization.optim_progress"] = optim
        fit["epoch_loop.manual_optimization.state_dict"] = {}
        fit["epoch_loop.manual_optimization.optim_step_progress"] = {"current": step, "total": step}
        fit["epoch_loop.val_loop.state_dict"] = {}
        fit["epoch_loop.val_loop.batch_progress"] = {**progress(0), "is_last_batch": False}
    else:
        fit["epoch_loop.batch_loop.state_dict"] = {}
        fit["epoch_loop.batch_loop.optimizer_loop.state_dict"] = {}
        fit["epoch_loop.batch_loop.optimizer_loop.optim_progress"] = {**optim, "optimizer_position": 1}
        fit["epoch_loop.batch_loop.manual_loop.state_dict"] = {}
        fit["epoch_loop.batch_loop.manual_loop.optim_step_progress"] = {"current": step, "total": step}
        fit["epoch_loop.val_loop.state_dict"] = {}
        fit["epoch_loop.val_loop.dataloader_progress"] = progress(0)
        fit["epoch_loop.val_loop.epoch_loop.state_dict"] = {}
        fit["epoch_loop.val_loop.epoch_loop.batch_progress"] = {**progress(0), "is_last_batch": False}
    return {"fit_loop": fit}


def write(era: str, path: Path) -> Path:
    """Write the file of an era."""
    # Until 1.6 what was stored is what comes next, counted from 0; since then it is the epoch that ended.
    payload = {**trained(), "epoch": EPOCHS, "global_step": STEPS, "pytorch-lightning_version": era}
    if era >= "0.9":
        payload |= {"hparams_name": "kwargs", "hyper_parameters": {"lr": LR}}
    if era >= "1.6":
        payload["epoch"] = EPOCHS - 1
        payload["loops"] = loops(steps_known=era >= "1.6.5", today=era >= "2")
    checkpoint = f"ModelCheckpoint{{{MONITORS}, {INTERVALS}"
    stopping = f"EarlyStopping{{{MONITORS}}}"
    with importable(
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ) as (model_checkpoint, early_stopping, attribute_dict):
        if era == "0.7.6":
            del payload["pytorch-lightning_version"]
            payload |= {"hparams": {"lr": LR, "width": 1}, "hparams_type": "Namespace"}
            payload["checkpoint_callback_best"] = BEST["best_model_score"]
        elif era == "0.8.5":
            payload |= {"module_arguments": attribute_dict(lr=LR)}
            payload |= {f"checkpoint_callback_{key}": value for key, value in BEST.items()}
        elif era == "0.9.1":
            payload["hyper_parameters"] = attribute_dict(lr=LR)
            payload |= {f"checkpoint_callback_{key}": value for key, value in BEST.items()}
        elif era == "1.1.8":
            payload["callbacks"] = {model_checkpoint: {**BEST, "dirpath": "."}, early_stopping: STOPPING}
            payload["native_amp_scaling_state"] = SCALER
        elif era == "1.5.10":
            payload["callbacks"] = {checkpoint + "}": BEST, stopping: STOPPING}
            payload["native_amp_scaling_state"] = SCALER
            payload["amp_scaling_state"] = {"loss_scaler0": {"loss_scale": 2.0}}
        elif era in ("1.6.0", "1.8.6"):
            key = checkpoint + ", 'save_on_train_epoch_end': True}"
            payload["callbacks"] = {key: BEST, stopping: STOPPING}
            payload["NativeMixedPrecisionPlugin"] = SCALER
        else:
            payload["callbacks"] = {checkpoint + "}": BEST, stopping: STOPPING}
            payload["MixedPrecisionPlugin" if era == "2.0.9" else "MixedPrecision"] = SCALER
        # torch before 1.6, of the same years, wrote its old format.
        torch.save(payload, path, _use_new_zipfile_serialization=era >= "1")
    return path


ERAS = ("0.7.6", "0.8.5", "0.9.1", "1.1.8", "1.5.10", "1.6.0", "1.8.6", "2.0.9", "2.6.0")
