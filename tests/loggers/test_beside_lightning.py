"""The same program under real Lightning and under holdfast: the same calls, curves, rows and directories."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

import holdfast.loggers.csv_logs
import holdfast.loggers.logger
from holdfast.errors import ConfigError
from tests.loggers.events import accumulated, series, table

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning.pytorch")


def module_of(pl: Any) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, lr: float = 0.1, net: Any = None, name: str = "n") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(3, 1)
            self.example_input_array = torch.ones(2, 3)

        def forward(self, x: Any) -> Any:
            return self.layer(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self(batch[0]).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log_dict({"group/a": 1.0, "group/b": float(batch_idx)})
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self(batch[0]).mean(), on_step=True, on_epoch=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", self(batch[0]).mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    return Net


def run(pl: Any, logger: Any, net: Any = None) -> Any:
    pl.seed_everything(3)
    data = DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=2,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = module_of(pl)(net={"width": 3, "sizes": [1, 2]}) if net is None else net
    trainer.fit(model, data, data)
    trainer.test(model, data, verbose=False)
    return trainer


def files(directory: Path) -> list[str]:
    """Every file below, without what tells one event file from another."""
    found = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    return sorted(name.partition("tfevents")[0] for name in found)


def test_tensorboard_shows_the_same(tmp_path: Path, lightning: Any) -> None:
    found = []
    for pl, place in ((lightning, tmp_path / "lightning"), (holdfast, tmp_path / "holdfast")):
        logger = pl.loggers.TensorBoardLogger(
            place, name="digits", log_graph=True, prefix="p", sub_dir="board"
        )
        trainer = run(pl, logger)
        assert trainer.log_dir == logger.log_dir
        tags = accumulated(logger.log_dir).Tags()
        hparams = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
        found.append((series(place), table(logger.log_dir), tags["graph"], hparams, set(files(place))))
    assert found[1] == found[0]
    assert set(found[0][0]) >= {"digits/version_0/board:p-loss_step", "digits/version_0/board:p-hp_metric"}


def test_the_same_metrics_csv(tmp_path: Path, lightning: Any) -> None:
    found = []
    for pl, place in ((lightning, tmp_path / "lightning"), (holdfast, tmp_path / "holdfast")):
        logger = pl.loggers.CSVLogger(place, version="mine", prefix="p", flush_logs_every_n_steps=3)
        trainer = run(pl, logger)
        assert trainer.log_dir == logger.log_dir
        rows = Path(logger.experiment.metrics_file_path).read_text()
        hparams = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
        found.append((rows, list(hparams.items()), files(place)))
    assert found[1] == found[0]


@pytest.mark.parametrize("kinds", [("TensorBoardLogger", "CSVLogger"), ("CSVLogger", "CSVLogger")])
def test_several_loggers_take_the_same_versions(tmp_path: Path, lightning: Any, kinds: Any) -> None:
    found = []
    for pl, place in ((lightning, tmp_path / "lightning"), (holdfast, tmp_path / "holdfast")):
        loggers = [getattr(pl.loggers, kind)(place) for kind in kinds]
        trainer = run(pl, loggers)
        versions = [logger.version for logger in loggers]
        directories = (trainer.log_dir, trainer.checkpoint_callback.dirpath)
        found.append((versions, [os.path.relpath(one, place) for one in directories], files(place)))
    assert found[1] == found[0]
    assert found[0][0] == [0, 1]


def recorder_of(pl: Any) -> Any:
    module = holdfast.loggers.logger if pl is holdfast else pl.loggers.logger

    class Recorder(module.Logger):  # type: ignore[misc]
        name, version = "mine", 0

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        @property
        @module.rank_zero_experiment
        def experiment(self) -> Any:
            return self.calls

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.calls.append(("metrics", dict(metrics), step))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self.calls.append(("hyperparams", dict(params), args, kwargs))

        def log_graph(self, *args: Any, **kwargs: Any) -> None:
            self.calls.append(("graph", [type(one).__name__ for one in args], kwargs))

        def finalize(self, status: str) -> None:
            self.calls.append(("finalize", status))

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            path = checkpoint_callback.best_model_path
            self.calls.append(("saved", os.path.basename(path), os.path.exists(path)))

    return Recorder()


def test_a_logger_of_ones_own_gets_the_same_calls(
    tmp_path: Path, lightning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for pl, place in ((lightning, tmp_path / "lightning"), (holdfast, tmp_path / "holdfast")):
        place.mkdir()
        monkeypatch.chdir(place)
        logger = recorder_of(pl)
        trainer = run(pl, logger)
        saved = [call for call in logger.calls if call[0] == "saved"]
        others = [call for call in logger.calls if call[0] != "saved"]
        # Lightning saves before it logs the epoch's means, holdfast at its safe point after it.
        found.append((others, saved, os.path.relpath(trainer.checkpoint_callback.dirpath, place)))
    assert found[1] == found[0]
    assert [call[0] for call in found[0][0]][-4:] == ["hyperparams", "graph", "metrics", "finalize"]


def test_module_and_datamodule_that_disagree_are_an_error_in_both(lightning: Any) -> None:
    for pl, error in ((lightning, RuntimeError), (holdfast, ConfigError)):

        class Data(pl.LightningDataModule):  # type: ignore[misc, name-defined]
            def __init__(self, lr: float) -> None:
                super().__init__()
                self.save_hyperparameters()

            def train_dataloader(self) -> Any:
                return DataLoader(TensorDataset(torch.ones(2, 3)))

        trainer = pl.Trainer(
            accelerator="cpu", logger=recorder_of(pl), enable_progress_bar=False, max_epochs=1
        )
        with pytest.raises(error, match="lr"):
            trainer.fit(module_of(pl)(lr=0.1), datamodule=Data(lr=0.2))


def test_every_public_name_and_argument_is_there(lightning: Any) -> None:
    from lightning.pytorch.loggers import csv_logs, logger, tensorboard

    pairs = [
        (logger.Logger, holdfast.loggers.logger.Logger),
        (logger.DummyLogger, holdfast.loggers.logger.DummyLogger),
        (csv_logs.CSVLogger, holdfast.loggers.CSVLogger),
        (csv_logs.ExperimentWriter, holdfast.loggers.csv_logs.ExperimentWriter),
        (tensorboard.TensorBoardLogger, holdfast.loggers.TensorBoardLogger),
    ]
    for theirs, ours in pairs:
        names = [name for name in dir(theirs) if not name.startswith("_")]
        assert [name for name in names if not hasattr(ours, name)] == []
        for name in ["__init__", *names]:
            if not inspect.isfunction(getattr(theirs, name)):
                continue
            wanted, given = (list(inspect.signature(getattr(one, name)).parameters) for one in (theirs, ours))
            takes_anything = "args" in wanted or "args" in given
            assert given[: len(wanted)] == wanted or takes_anything, (theirs, name)
    public = [name for name in lightning.loggers.__all__ if name in holdfast.loggers.__all__]
    assert sorted(public) == sorted(holdfast.loggers.__all__)
