"""plugins=: what is accepted and refused, and a run whose checkpoints a plugin writes and reads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.checkpoint.catalog import read_summary
from holdfast.errors import StorageError
from holdfast.plugins import (
    AsyncCheckpointIO,
    CheckpointIO,
    DoublePrecision,
    MixedPrecision,
    TorchCheckpointIO,
)
from holdfast.plugins.environments import LightningEnvironment
from holdfast.strategies import SingleDeviceStrategy
from tests.training.toys import Toy, rows, trainer


class PlainFiles(CheckpointIO):
    """A plugin as people write it: torch.save, torch.load, os.remove."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append(("save", Path(path).name, storage_options))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        self.calls.append(("load", Path(path).name))
        return torch.load(path, map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", Path(path).name))
        os.remove(path)

    def teardown(self) -> None:
        self.calls.append(("teardown",))


class Shuffled(Toy):
    """Has hyperparameters that torch.load would not open, and momentum."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(
    folder: Path, epochs: int, plugin: Any, every: int = 2, **arguments: Any
) -> tuple[Shuffled, pl.Trainer]:
    saves = ModelCheckpoint(folder, filename="{epoch}", save_last=True, every_n_train_steps=every)
    pl.seed_everything(1)
    model = Shuffled(argparse.Namespace(a=Path("b")))
    run = trainer(max_epochs=epochs, plugins=plugin, callbacks=[saves])
    run.fit(model, rows(shuffle=True), **arguments)
    return model, run


class TestArguments:
    def test_one_or_several_of_each_kind(self) -> None:
        double, io, environment = DoublePrecision(), PlainFiles(), LightningEnvironment()
        run = trainer(plugins=[io, double, environment])
        assert run.precision_plugin is run.strategy.precision_plugin is double
        assert run.strategy.checkpoint_io is io
        assert run.cluster_environment is environment
        alone = trainer(plugins=io)
        assert alone.strategy.checkpoint_io is io
        assert alone.precision == "32-true"
        assert trainer().strategy.own_checkpoint_io is None
        assert type(trainer().strategy.checkpoint_io) is TorchCheckpointIO

    def test_of_the_strategy(self) -> None:
        io, double = PlainFiles(), DoublePrecision()
        run = trainer(accelerator="auto", strategy=SingleDeviceStrategy("cpu", None, io, double))
        assert (run.strategy.checkpoint_io, run.precision_plugin) == (io, double)

    def test_a_strategy_may_be_used_again(self) -> None:
        strategy = SingleDeviceStrategy("cpu")
        trainer(accelerator="auto", strategy=strategy, plugins=[PlainFiles(), DoublePrecision()])
        run = trainer(accelerator="auto", strategy=strategy, precision="bf16-mixed")
        assert (run.precision, run.strategy.own_checkpoint_io) == ("bf16-mixed", None)
        assert strategy.precision_plugin is run.precision_plugin

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"plugins": "ddp"},
                "Trainer(plugins=[...]): expected objects of Precision, CheckpointIO or ClusterEnvironment, "
                "found 'ddp'.",
            ),
            (
                {"plugins": [PlainFiles]},
                "Trainer(plugins=[...]): expected objects of Precision, CheckpointIO or ClusterEnvironment, "
                "found the class PlainFiles.",
            ),
            (
                {"plugins": [PlainFiles(), TorchCheckpointIO()]},
                "Trainer(plugins=[...]): PlainFiles and TorchCheckpointIO are both a CheckpointIO. Leave one out.",
            ),
            (
                {"plugins": [DoublePrecision(), MixedPrecision("bf16-mixed", "cpu")]},
                "Trainer(plugins=[...]): DoublePrecision and MixedPrecision are both a precision. Leave one out.",
            ),
            (
                {"plugins": DoublePrecision(), "precision": "bf16-mixed"},
                "Trainer(precision='bf16-mixed', plugins=[DoublePrecision]): each gives a precision. Leave one out.",
            ),
            (
                {
                    "strategy": SingleDeviceStrategy("cpu", precision_plugin=DoublePrecision()),
                    "accelerator": "auto",
                    "precision": "bf16-mixed",
                },
                "Trainer(precision='bf16-mixed', strategy=SingleDeviceStrategy(precision_plugin=DoublePrecision)): "
                "each gives a precision. Leave one out.",
            ),
            (
                {
                    "strategy": SingleDeviceStrategy("cpu", checkpoint_io=PlainFiles()),
                    "accelerator": "auto",
                    "plugins": TorchCheckpointIO(),
                },
                "Trainer(plugins=[TorchCheckpointIO]) and SingleDeviceStrategy(checkpoint_io=...) both give a "
                "CheckpointIO. Leave one out.",
            ),
        ],
    )
    def test_what_is_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(**arguments)
        assert str(refused.value) == message


class TestCheckpointIO:
    @pytest.mark.parametrize(
        "make",
        [PlainFiles, TorchCheckpointIO, AsyncCheckpointIO, lambda: AsyncCheckpointIO(PlainFiles())],
        ids=["plain files", "the engine", "the engine, async", "plain files, async"],
    )
    @pytest.mark.parametrize("ckpt_path", ["auto", "last", "path"])
    def test_a_resumed_run_is_the_one_that_never_stopped(
        self, make: Any, ckpt_path: str, tmp_path: Path
    ) -> None:
        whole, _ = fit(tmp_path / "whole", 3, make())
        fit(tmp_path / "cut", 1, make())
        if ckpt_path == "path":
            ckpt_path = str(tmp_path / "cut" / "last.ckpt")
        gone_on, run = fit(tmp_path / "cut", 3, make(), ckpt_path=ckpt_path)
        assert run.global_step == 9
        assert torch.equal(whole.layer.weight, gone_on.layer.weight)
        assert gone_on.hparams.options == argparse.Namespace(a=Path("b"))

    def test_calls_and_files(self, tmp_path: Path) -> None:
        io = PlainFiles()
        _, run = fit(tmp_path, 2, io)
        run.save_checkpoint(tmp_path / "mine.ckpt", storage_options={"region": "eu"})
        assert [call for call in io.calls if call[0] in ("save", "teardown")] == [
            ("save", "epoch=0.ckpt", None),
            ("save", "last.ckpt", None),
            ("save", "epoch=1.ckpt", None),
            ("save", "last.ckpt", None),
            ("save", "epoch=1.ckpt", None),
            ("save", "last.ckpt", None),
            ("teardown",),
            ("save", "mine.ckpt", {"region": "eu"}),
        ]
        opened = torch.load(tmp_path / "mine.ckpt")
        assert opened["hyper_parameters"]["options"] == {"a": "b"}
        assert opened["holdfast"]["summary"]["step"] == 6
        io.calls.clear()
        run.validate(type("Validated", (Shuffled,), {"validation_step": lambda *_: None})(), rows(), "best")
        assert io.calls == [("load", "epoch=1.ckpt"), ("teardown",)]

    def test_the_engine_as_a_plugin_writes_what_the_engine_writes(self, tmp_path: Path) -> None:
        for name, plugin in {"plugin": AsyncCheckpointIO(), "engine": None}.items():
            fit(tmp_path / name, 1, plugin, every=3)
        summaries = [read_summary(tmp_path / name / "last.ckpt") for name in ("plugin", "engine")]
        assert [(s.step, s.epoch, s.exact, s.kind, s.metrics) for s in summaries] == [
            (3, 0, True, "full", {})
        ] * 2

    def test_a_background_save_is_published_when_it_is_durable(self, tmp_path: Path) -> None:
        """In Lightning best_model_path changes when the save begins, and the old file may be gone by then."""
        seen: list[tuple[str, list[str]]] = []

        class Watches(Callback):
            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                best = trainer.checkpoint_callback.best_model_path
                seen.append((Path(best).name, sorted(path.name for path in tmp_path.glob("*.ckpt"))))

        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
        run = trainer(plugins=AsyncCheckpointIO(), callbacks=[Watches(), saves])
        run.fit(Toy(), rows(20))
        for best, files in seen:
            assert best == "" or best in files
        assert saves.best_model_path == str(tmp_path / "step=5.ckpt")
        assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=5.ckpt"]

    def test_a_failed_background_save_keeps_what_there_was(self, tmp_path: Path) -> None:
        class Full(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
                if checkpoint["global_step"] == 2:
                    raise StorageError("the disk is full")
                super().save_checkpoint(checkpoint, path, storage_options)

        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
        run = trainer(plugins=AsyncCheckpointIO(Full()), callbacks=[saves])
        with pytest.raises(StorageError, match="the disk is full"):
            run.fit(Toy(), rows(20))
        assert saves.best_model_path == str(tmp_path / "step=1.ckpt")
        names = {path.name for path in tmp_path.glob("*.ckpt")}
        assert "step=1.ckpt" in names
        assert "step=2.ckpt" not in names

    def test_auto_refuses_to_start_over_what_the_plugin_cannot_read(self, tmp_path: Path) -> None:
        class Broken(PlainFiles):
            def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
                raise ValueError("no key")

        fit(tmp_path, 1, PlainFiles())
        (tmp_path / "last.ckpt").unlink()
        with pytest.raises(pl.CheckpointIncomplete) as refused:
            fit(tmp_path, 2, Broken(), ckpt_path="auto")
        name = os.path.relpath(tmp_path / "epoch=0.ckpt")
        assert str(refused.value) == (
            'ckpt_path="auto": there are checkpoints, but not one is whole and verified, and starting from step 0 '
            f"would bury them:\n  {name}: Broken raised ValueError('no key')\n"
            "Move them away, or give a path, or ckpt_path=None to start anew."
        )

    def test_what_is_no_checkpoint_is_refused(self, tmp_path: Path) -> None:
        class Odd(PlainFiles):
            def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
                return [1]

        with pytest.raises(pl.CheckpointIncomplete) as refused:
            trainer(plugins=Odd()).fit(Toy(), rows(), ckpt_path="x.ckpt")
        assert str(refused.value) == (
            "Odd.load_checkpoint('x.ckpt') must return the checkpoint as a dict, found list."
        )

    def test_without_a_plugin_there_are_no_storage_options(self, tmp_path: Path) -> None:
        run = trainer()
        run.fit(Toy(), rows())
        with pytest.raises(pl.ConfigError, match="writes local files and takes none"):
            run.save_checkpoint(tmp_path / "a.ckpt", storage_options={"region": "eu"})
        assert list(tmp_path.glob("*.ckpt")) == []
