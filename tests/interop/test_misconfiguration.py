"""`except MisconfigurationException` catches under holdfast what it catches under Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast
import holdfast.callbacks
from holdfast.utilities.exceptions import MisconfigurationException

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

if True:  # after the skip
    from lightning.pytorch.utilities.exceptions import MisconfigurationException as Theirs

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2)


def model(pl: Any, **members: Any) -> Any:
    """A module with one layer, whose members are replaced or added."""

    def init(self: Any) -> None:
        pl.LightningModule.__init__(self)
        self.layer = nn.Linear(3, 1)
        self.automatic_optimization = members.get("automatic", True)

    own = {
        "__init__": init,
        "training_step": lambda self, batch, batch_idx: self.layer(batch[0]).mean(),
        "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), lr=0.1),
    }
    return type("Model", (pl.LightningModule,), {**own, **members})()


def fit(arguments: dict[str, Any] | None = None, **members: Any) -> Callable[[Any], Any]:
    def program(pl: Any) -> None:
        pl.Trainer(**{**QUIET, **(arguments or {})}).fit(model(pl, **members), loader(), loader())

    return program


def saving(**arguments: Any) -> Callable[[Any], Any]:
    """Fit a model that logs val_loss in validation with this ModelCheckpoint."""

    def program(pl: Any) -> None:
        callback = pl.callbacks.ModelCheckpoint(**arguments)
        trainer = pl.Trainer(**{**QUIET, "enable_checkpointing": True, "callbacks": [callback]})
        trainer.fit(model(pl, validation_step=log("val_loss", 1.0)), loader(), loader())

    return program


def log(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    return lambda self, *rest: self.log(*args, **kwargs)


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "limit is too small a fraction": fit({"limit_train_batches": 0.01}),
    "limit below zero": fit({"limit_train_batches": -1}),
    "fraction over one": fit({"val_check_interval": 1.5}),
    "fast_dev_run below zero": fit({"fast_dev_run": -1}),
    "no such way to clip": fit({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "x"}),
    "reload below zero": fit({"reload_dataloaders_every_n_epochs": -1}),
    "max_epochs": fit({"max_epochs": -2}),
    "max_steps": fit({"max_steps": -2}),
    "accumulation by hand": fit({"accumulate_grad_batches": 2}, automatic=False),
    "clipping by hand": fit({"gradient_clip_val": 2.0}, automatic=False),
    "a step without a loss": fit(training_step=lambda self, batch, batch_idx: {"x": 1}),
    "a step that returns text": fit(training_step=lambda self, batch, batch_idx: "x"),
    "closure left out": fit(optimizer_step=lambda self, *args: None),
    "no monitor for the plateau": fit(
        configure_optimizers=lambda self: {
            "optimizer": (optimizer := torch.optim.SGD(self.parameters(), lr=0.1)),
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        }
    ),
    "optimizers of another kind": fit(configure_optimizers=lambda self: 5),
    "log where no loop runs": fit(on_fit_start=log("a", 1.0)),
    "log on a step where there is none": fit(on_train_epoch_end=log("a", 1.0, on_step=True)),
    "log with another reduction": fit(
        on_train_batch_start=log("a", 1.0, on_epoch=True, reduce_fx=torch.median)
    ),
    "no training data": lambda pl: pl.Trainer(**QUIET).fit(model(pl)),
    "no validation_step": lambda pl: pl.Trainer(**QUIET).validate(model(pl), loader()),
    "no test_step": lambda pl: pl.Trainer(**QUIET).test(model(pl), loader()),
    "loaders and a datamodule": lambda pl: pl.Trainer(**QUIET).fit(
        model(pl), loader(), datamodule=pl.LightningDataModule.from_datasets(loader().dataset)
    ),
    "two intervals": saving(every_n_epochs=1, every_n_train_steps=2),
    "k without a monitor": saving(save_top_k=3),
    "k below -1": saving(save_top_k=-2),
    "mode": saving(monitor="val_loss", mode="x"),
    "a monitor that nobody logs": saving(monitor="val_los"),
    "early stopping's mode": lambda pl: pl.callbacks.EarlyStopping("a", mode="x"),
    "the monitor's interval": lambda pl: pl.callbacks.LearningRateMonitor(logging_interval="x"),
    "rates without a logger": lambda pl: fit({"callbacks": pl.callbacks.LearningRateMonitor()})(pl),
    "the timer's interval": lambda pl: pl.callbacks.Timer(interval="x"),
    "the writer's interval": lambda pl: pl.callbacks.BasePredictionWriter(write_interval="x"),
    "epochs to average from": lambda pl: pl.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=-1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_caught(name: str) -> None:
    program = PROGRAMS[name]
    with pytest.raises(Theirs):
        program(lightning)
    with pytest.raises(MisconfigurationException):
        program(holdfast)
