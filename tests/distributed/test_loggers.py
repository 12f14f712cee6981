"""Loggers in several processes: rank 0 settles where they write, and writes; every rank knows where."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from holdfast.loggers import CSVLogger, Logger, TensorBoardLogger
from holdfast.loggers.logger import rank_zero_experiment

from .ranks import run_ranks, start_ranks


class Net(pl.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, width)
        self.seen: list[Any] = []

    def setup(self, stage: str) -> None:
        self.seen.append(self.trainer.log_dir)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(8.0).unsqueeze(1)), batch_size=2)


def make_trainer(root: str, logger: Any, **arguments: Any) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu", "strategy": "ddp", "logger": logger, "enable_checkpointing": False,
        "max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": root, **arguments,
    }  # fmt: skip
    return pl.Trainer(**arguments)


def files(root: str | Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*"))


def two_versions(root: str) -> Any:
    found = []
    for early in (False, True):
        trainer, model = make_trainer(root, CSVLogger(root)), Net()
        if early and trainer.is_global_zero:
            assert trainer.logger is not None
            _ = trainer.logger.experiment  # its directory is there before the other rank looks
        trainer.fit(model, loader(), loader())
        assert trainer.logger is not None
        found.append((trainer.logger.version, trainer.log_dir, trainer.logger.log_dir, model.seen))
    return found


def test_every_rank_has_rank_zeros_version_and_only_rank_zero_writes(tmp_path: Path) -> None:
    first, second = run_ranks(two_versions, str(tmp_path))
    place = str(tmp_path / "lightning_logs" / "version_")
    assert first == second == [(n, f"{place}{n}", f"{place}{n}", [f"{place}{n}"]) for n in (0, 1)]
    names = ["", "/hparams.yaml", "/metrics.csv"]
    assert files(tmp_path) == ["lightning_logs"] + [
        f"lightning_logs/version_{n}{name}" for n in (0, 1) for name in names
    ]
    rows = (tmp_path / "lightning_logs/version_1/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] + row.split(",")[3] for row in rows] == ["epochstep", "00", "01", "01", "01"]


class Plain(Logger):
    """Of the user's own, not made for several processes: it writes wherever it is called."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.run: str | None = None
        self.calls: list[str] = []

    @property
    def name(self) -> str:
        return "plain"

    @property
    def version(self) -> str | None:
        return self.run

    @property
    def log_dir(self) -> str | None:
        return None if self.run is None else os.path.join(self.root, self.run)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        self.run = self.run or uuid.uuid4().hex
        return self

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append("log_metrics")

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        self.calls.append("log_hyperparams")

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.calls.append("log_graph")

    def save(self) -> None:
        self.calls.append("save")

    def finalize(self, status: str) -> None:
        self.calls.append(f"finalize {status}")

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {}


def of_ones_own(root: str) -> Any:
    logger = Plain(root)
    trainer = make_trainer(root, logger, callbacks=[LearningRateMonitor(), ModelCheckpoint(dirpath=root)],
                           enable_checkpointing=True)  # fmt: skip
    trainer.fit(Net(), loader(), loader())
    logger.experiment.add_text("anything")  # a dummy takes it
    return trainer.log_dir, logger.run, sorted(set(logger.calls))


Plain.add_text = lambda self, text: None  # type: ignore[attr-defined]


def test_a_logger_of_ones_own_is_called_on_rank_zero_alone(tmp_path: Path) -> None:
    first, second = run_ranks(of_ones_own, str(tmp_path))
    assert first[0] == second[0] == str(tmp_path / first[1])
    assert second[1:] == (None, [])
    assert first[2] == [
        "finalize success", "log_graph", "log_hyperparams", "log_metrics", "save", "state_dict",
    ]  # fmt: skip


def goes_on(root: str) -> Any:
    seen = []
    for epochs in (1, 2):
        saving = ModelCheckpoint(filename="last-{epoch}")
        logger = [CSVLogger(root), TensorBoardLogger(root, name="board")]
        trainer = make_trainer(root, logger, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(Net(), loader(), ckpt_path="auto")
        seen.append(
            (trainer.log_dir, [one.version for one in trainer.loggers], len(trainer.continued_loggers))
        )
        if epochs == 1:
            # What another job has begun meanwhile.
            trainer.strategy.barrier()
            Path(root, "lightning_logs", "version_1").mkdir(parents=True, exist_ok=True)
            trainer.strategy.barrier()
    return seen


def test_a_resumed_job_goes_on_in_its_logs_on_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first, second = run_ranks(goes_on, str(tmp_path))
    place = str(tmp_path / "lightning_logs" / "version_0")
    assert first == second == [(place, [0, 0], 0), (place, [0, 0], 2)]
    rows = (Path(place) / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss_epoch,loss_step,step"
    assert [row.split(",")[3] for row in rows[1:]] == ["0", "1", "1", "2", "3", "3"]
    assert files(tmp_path / "lightning_logs/version_1") == []
    assert len(list((tmp_path / "board" / "version_0").glob("events*"))) == 2


class Says(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.print("printed")
        pl_module.print("printed too")


def loud(root: str, bar: str) -> None:
    bars = {"tqdm": TQDMProgressBar, "rich": RichProgressBar, "plain": None}
    kind = bars[bar]
    callbacks = [Says(), ModelSummary(), *([] if kind is None else [kind()])]
    trainer = make_trainer(root, CSVLogger(root), callbacks=callbacks, enable_progress_bar=True,
                           enable_model_summary=True, enable_checkpointing=True, profiler="simple")  # fmt: skip
    trainer.fit(Net(), loader(), loader())
    trainer.validate(dataloaders=loader())
    trainer.test(_Testing(), loader())


class _Testing(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("tested", 1.0)


@pytest.mark.parametrize("bar", ["plain", "tqdm", "rich"])
def test_what_is_said_is_said_by_rank_zero(tmp_path: Path, bar: str) -> None:
    first, second = start_ranks(loud, str(tmp_path), bar).wait()
    assert (first.code, first.error, second.code, second.error) == (0, "", 0, "")
    for text in ("printed\n", "printed too\n", "Linear", "saved ", "validate", "tested"):
        assert text in first.output
    assert second.output == ""
