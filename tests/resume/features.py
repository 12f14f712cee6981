"""The command of a run that `feature_plans` describes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import holdfast as pl
from holdfast.loggers import CSVLogger, TensorBoardLogger
from holdfast.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from .feature_callbacks import Overridden, OwnIO, Plain, callbacks_of
from .feature_data import Plan
from .feature_loaders import train_data, val_data
from .feature_module import Data, Net
from .feature_stops import Stopper


def loggers_of(plan: Plan, root: Path) -> Any:
    if plan["loggers"] == "none":
        return False
    board = TensorBoardLogger(root, name="tb")
    if plan["loggers"] == "prefix":
        return [CSVLogger(root, name="", prefix="p", version="v"), board]
    csv = CSVLogger(root, name="csv", flush_logs_every_n_steps=3)
    return {"csv": [csv], "both": [board, csv], "both reversed": [csv, board], "tensorboard": [board]}[
        plan["loggers"]
    ]


def make(plan: Plan, root: Path, stop: Stopper) -> tuple[pl.Trainer, Net, dict[str, Any]]:
    """The run's command: its trainer, its module, and the arguments of ``fit``.

    Args:
        plan: What it is made of.
        root: Where it writes.
        stop: What ends it, or lets it end by itself.
    """
    plugin = {"own": OwnIO, "async": AsyncCheckpointIO, "torch": TorchCheckpointIO}.get(plan["io"])
    strategy: Any = {"subclass": Plain, "overridden": Overridden}.get(plan["strategy"])
    interval = {"always": timedelta(0), "never": timedelta(days=9)}.get(
        plan["val_interval"], plan["val_interval"]
    )
    callbacks = callbacks_of(plan, root)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        logger=loggers_of(plan, root),
        strategy=strategy("cpu") if strategy else "auto",
        callbacks=[*callbacks, stop] if plan["stopper_last"] else [stop, *callbacks],
        plugins=AsyncCheckpointIO(OwnIO()) if plan["io"] == "async own" else plugin and plugin(),
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=plan["epochs"],
        max_steps=plan["max_steps"],
        max_time=plan["max_time"],
        log_every_n_steps=plan["log_every"],
        min_steps=plan["min_steps"],
        exact=plan["exact"],
        accumulate_grad_batches=1 if plan["accumulate"] == "scheduled" else plan["accumulate"],
        gradient_clip_val=0.05 if plan["clip"] else None,
        gradient_clip_algorithm="value" if plan["clip"] == "value" else None,
        precision=plan["precision"],
        overfit_batches=plan["overfit"],
        limit_train_batches=plan["limit_train"],
        limit_val_batches=plan["limit_val"] if plan["val"] else 0,
        val_check_interval=interval,
        check_val_every_n_epoch=plan["val_every"],
        num_sanity_val_steps=plan["sanity"],
        reload_dataloaders_every_n_epochs=plan["reload"],
    )
    module = Net(plan)
    arguments: dict[str, Any] = {}
    if plan["module_data"] == "datamodule":
        arguments["datamodule"] = Data(plan)
    elif plan["module_data"] == "loaders":
        arguments = {
            "train_dataloaders": train_data(plan),
            "val_dataloaders": val_data(plan) if plan["val"] else None,
        }
    return trainer, module, arguments
