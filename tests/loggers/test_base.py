"""Loggers of one's own: what the base class gives, and what a run does with them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.errors import ConfigError
from holdfast.loggers.logger import DummyExperiment, DummyLogger, Logger, rank_zero_experiment
from holdfast.utilities import rank_zero_only
from tests.training.toys import Toy, checkpoints, rows, trainer


class Recorder(Logger):
    """Writes down every call, as the loggers that people write for their own services look."""

    def __init__(self, name: Any = "mine", version: Any = "v", save_dir: str | None = None) -> None:
        super().__init__()
        self._name, self._version, self._save_dir = name, version, save_dir
        self.calls: list[Any] = []

    @property
    def name(self) -> Any:
        return self._name

    @property
    def version(self) -> Any:
        return self._version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self.calls

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        self.calls.append(("hyperparams", dict(params)))

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: Any) -> None:  # type: ignore[override]
        self.calls.append(("metrics", sorted(metrics), step))

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.calls.append(("graph", type(model).__name__))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.calls.append(("finalize", status))


class Logging(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.loss(batch))


def test_four_names_make_a_logger() -> None:
    class Least(Logger):
        name = version = None
        log_metrics = log_hyperparams = lambda *_, **__: None

    logger = Least()
    assert (logger.save_dir, logger.root_dir, logger.log_dir, logger.experiment) == (None,) * 4
    assert (logger.group_separator, logger.state_dict()) == ("/", {})
    with pytest.raises(TypeError, match="abstract"):
        Logger()  # type: ignore[abstract]


def test_what_a_run_calls(tmp_path: Path) -> None:
    logger = Recorder()
    fit = trainer(logger=[logger, Recorder("second")], log_every_n_steps=2, default_root_dir=tmp_path)
    fit.fit(Logging(lr=0.5), rows())
    expected = [
        ("hyperparams", {"lr": 0.5, "width": 1}),
        ("graph", "Logging"),
        ("metrics", ["epoch", "loss"], 1),
        ("finalize", "success"),
    ]
    assert logger.calls == expected
    assert [one.calls for one in fit.loggers] == [expected, expected]  # type: ignore[attr-defined]
    assert fit.logger is logger and fit.lightning_module.logger is logger
    assert fit.lightning_module.logger.experiment is logger.calls
    del logger.calls[:]
    fit.test(fit.lightning_module, rows(), verbose=False)
    assert logger.calls == [*expected[:2], ("metrics", ["epoch", "score"], 3), expected[3]]


@pytest.mark.parametrize("logger", ["wandb", ["wandb"]])
def test_what_is_not_a_logger_is_said(logger: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        trainer(logger=logger)
    assert str(raised.value) == (
        "Trainer(logger=...): expected a logger, several, True or False, found 'wandb'. Derive a logger of your "
        "own from holdfast.loggers.Logger."
    )


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_how_it_ended_is_said(error: type[BaseException], status: str) -> None:
    class Ends(Toy):
        def on_train_epoch_end(self) -> None:
            raise error

    logger = Recorder()
    with pytest.raises(error):
        trainer(logger=logger).fit(Ends(), rows())
    assert logger.calls[-1] == ("finalize", status)


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        ({}, "mine/v/checkpoints"),
        ({"version": 3}, "mine/version_3/checkpoints"),
        ({"version": None}, "mine/checkpoints"),
        ({"name": None}, "v/checkpoints"),
        ({"name": None, "version": None}, "checkpoints"),
        ({"name": "", "version": ""}, "checkpoints"),
        ({"save_dir": "elsewhere"}, "elsewhere/mine/v/checkpoints"),
    ],
)
def test_default_checkpoints_go_below_it_and_are_found_again(
    tmp_path: Path, arguments: dict[str, Any], directory: str
) -> None:
    for epochs in (1, 2):
        model = Logging()
        fit = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=Recorder(**arguments),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fit.fit(model, rows(), ckpt_path="auto")
        assert len(model.seen) == 12, "the second run goes on after the first one's epoch"
    assert fit.checkpoint_callback.dirpath == str(tmp_path / directory)
    assert {str(path.parent) for path in tmp_path.rglob("*.ckpt")} == {str(tmp_path / directory)}
    assert fit.log_dir == arguments.get("save_dir")


def test_hyperparameters_of_module_and_datamodule_are_sent_together() -> None:
    logger = Recorder()
    trainer(logger=logger).fit(Toy(lr=0.5), datamodule=Data(lr=0.5, noise=1.0))
    assert logger.calls[0] == ("hyperparams", {"lr": 0.5, "width": 1, "noise": 1.0})


@pytest.mark.parametrize("lr", [0.25, torch.tensor([0.5, 0.5])])
def test_one_name_with_two_values_is_an_error(lr: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        trainer(logger=Recorder()).fit(Toy(lr=0.5), datamodule=Data(lr=lr, noise=1.0))
    assert str(raised.value) == (
        "Toy and Data both have hyperparameters called ['lr'], with different values, and a logger has one "
        "place for each. Rename them, or call save_hyperparameters(logger=False) in one of the two."
    )


class Data(pl.LightningDataModule):
    def __init__(self, lr: Any, noise: float) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return rows()


class Reader(Recorder):
    """Opens what it hears of, as one that uploads it would."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        found = []
        for path in (checkpoint_callback.best_model_path, checkpoint_callback.last_model_path):
            if path:
                payload = torch.load(path, weights_only=True)
                found.append((os.path.basename(path), payload["global_step"]))
        self.calls.append((checkpoint_callback.monitor, found))


def test_it_hears_of_a_checkpoint_when_every_name_of_it_can_be_opened(tmp_path: Path) -> None:
    logger = Reader()
    model = Logging()
    model.on_train_batch_end = lambda *_: model.log("rising", float(model.trainer.global_step))  # type: ignore
    fit = trainer(
        logger=logger,
        callbacks=[
            ModelCheckpoint(
                tmp_path / "a", "{step}", monitor="rising", every_n_train_steps=1, save_last=True
            ),
            ModelCheckpoint(tmp_path / "b", "{step}", save_last="link"),
        ],
    )
    fit.fit(model, rows())
    assert [call for call in logger.calls if call[0] in ("rising", None)] == [
        ("rising", [("step=1.ckpt", 1), ("last.ckpt", 1)]),
        ("rising", [("step=1.ckpt", 1), ("last.ckpt", 2)]),
        ("rising", [("step=1.ckpt", 1), ("last.ckpt", 3)]),
        (None, [("step=3.ckpt", 3), ("last.ckpt", 3)]),
    ]
    assert checkpoints(tmp_path / "a") == ["last.ckpt", "step=1.ckpt"]


def test_other_ranks_get_an_experiment_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Recorder()
    assert logger.experiment is logger.calls
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"a": 1.0}, 0)
    logger.experiment.append("not on this rank")
    assert logger.calls == []
    assert isinstance(logger.experiment, DummyExperiment)


def test_the_dummy_takes_anything_and_ends() -> None:
    logger = DummyLogger()
    logger.log_metrics({"a": 1}, step=0)
    logger.log_hyperparams({"a": 1})
    logger.log_image("key", images=[])
    logger.experiment.add_figure("name", None).shown["now"] = True
    assert (logger.name, logger.version, list(logger.experiment)) == ("", "", [])
    assert pickle.loads(pickle.dumps(logger)).name == ""
