"""self.log in every hook and with every argument: the same values, rows, results and refusals as Lightning's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

HOOKS = (
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "training_step",
    "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping", "on_train_batch_end",
    "on_train_epoch_end", "on_train_end", "on_fit_end", "on_validation_start", "on_validation_epoch_start",
    "on_validation_batch_start", "validation_step", "on_validation_batch_end", "on_validation_epoch_end",
    "on_validation_end", "on_test_start", "on_test_epoch_start", "on_test_batch_start", "test_step",
    "on_test_batch_end", "on_test_epoch_end", "on_test_end", "on_predict_start", "predict_step",
    "on_predict_epoch_end", "setup", "configure_optimizers", "on_after_batch_transfer", "train_dataloader",
)  # fmt: skip
WHEN = [
    {name: value for name, value in zip(("on_step", "on_epoch"), pair, strict=True) if value is not None}
    for pair in itertools.product((None, True, False), repeat=2)
]
HOW: list[dict[str, Any]] = [
    {"logger": False}, {"logger": True}, {"prog_bar": False}, {"reduce_fx": "max"}, {"reduce_fx": torch.sum},
    {"reduce_fx": min}, {"reduce_fx": len}, {"reduce_fx": "median"}, {"batch_size": 3, "on_epoch": True},
    {"sync_dist": True}, {"rank_zero_only": True}, {"enable_graph": True}, {"add_dataloader_idx": False},
]  # fmt: skip


def rows() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(5, 2)), batch_size=2)


def logging_module(pl: Any, hook: str, arguments: dict[str, Any]) -> Any:
    """A module that logs the number of its calls of one hook."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...
        def test_step(self, batch: Any, batch_idx: int) -> None: ...
        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return 1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return rows()

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    inherited = getattr(Module, hook)

    def logged(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.log("x", float(self.calls), **{"prog_bar": True, **arguments})
        return inherited(self, *args, **kwargs)

    setattr(Module, hook, logged)
    return Module()


def rows_of(pl: Any) -> Any:
    """A logger that keeps its rows."""

    class Kept(pl.loggers.logger.Logger if pl is lightning else pl.loggers.Logger):
        name, version = "kept", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[Any] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, {name: float(value) for name, value in metrics.items()}))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    return Kept()


def outcome(pl: Any, hook: str, arguments: dict[str, Any]) -> Any:
    """All that somebody sees of it; "refused" where it raises."""
    logger = rows_of(pl)
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, log_every_n_steps=2, num_sanity_val_steps=0,
    )  # fmt: skip
    module, results = logging_module(pl, hook, arguments), None
    try:
        if "test" in hook:
            results = trainer.test(module, verbose=False)
        elif "predict" in hook:
            trainer.predict(module)
        else:
            trainer.fit(module)
    except Exception:
        return "refused"
    views = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
    seen = [{name: float(value) for name, value in getattr(trainer, view).items()} for view in views]
    return seen, logger.rows, results


@pytest.mark.parametrize("hook", HOOKS)
def test_when(hook: str, tmp_path: Path) -> None:
    for arguments in WHEN:
        theirs = outcome(lightning, hook, arguments)
        assert outcome(holdfast, hook, arguments) == theirs, arguments


@pytest.mark.parametrize(
    "hook", ["training_step", "validation_step", "on_train_epoch_end", "on_validation_epoch_end", "test_step"]
)
def test_how(hook: str, tmp_path: Path) -> None:
    for arguments in HOW:
        theirs = outcome(lightning, hook, arguments)
        assert outcome(holdfast, hook, arguments) == theirs, arguments
