"""ModelCheckpoint over files with another extension, and over those that a plugin of the user's writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint.checkpoint_io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from tests.training.toys import Toy, rows, trainer


class Scored(Toy):
    """``score`` is 1, 3, 2, 1.5 in the four epochs."""

    def on_train_epoch_end(self) -> None:
        self.log("score", (1.0, 3.0, 2.0, 1.5)[self.current_epoch])


def fit(callback: ModelCheckpoint, epochs: int, ckpt_path: Any = None, **arguments: Any) -> pl.Trainer:
    run = trainer(callbacks=[callback], max_epochs=epochs, **arguments)
    run.fit(Scored(), rows(), ckpt_path=ckpt_path)
    return run


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestAnotherExtension:
    class Pth(ModelCheckpoint):
        FILE_EXTENSION = ".pth"

    @pytest.mark.parametrize("ckpt_path", ["auto", "last"])
    def test_the_run_and_its_best_are_found_again(self, tmp_path: Path, ckpt_path: str) -> None:
        options: dict[str, Any] = {"monitor": "score", "save_top_k": 2, "save_last": True}
        fit(self.Pth(tmp_path / "a", **options), 3)
        assert names(tmp_path / "a") == ["epoch=0-step=3.pth", "epoch=2-step=9.pth", "last.pth"]
        shutil.move(tmp_path / "a", tmp_path / "b")
        callback = self.Pth(tmp_path / "b", **options)
        assert fit(callback, 4, ckpt_path).global_step == 12
        assert names(tmp_path / "b") == ["epoch=0-step=3.pth", "epoch=3-step=12.pth", "last.pth"]
        assert callback.best_model_score == torch.tensor(1.0)

    def test_a_changed_interval_keeps_the_best(self, tmp_path: Path) -> None:
        fit(self.Pth(tmp_path, monitor="score", save_top_k=2), 3)
        (tmp_path / "epoch=2-step=9.pth").rename(tmp_path / "mine.pth")  # nobody's now
        callback = self.Pth(tmp_path, monitor="score", save_top_k=2, every_n_epochs=2)
        fit(callback, 4, tmp_path / "mine.pth")
        assert callback.best_model_path == str(tmp_path / "epoch=0-step=3.pth")
        assert names(tmp_path) == ["epoch=0-step=3.pth", "epoch=3-step=12.pth", "mine.pth"]


class Folders(CheckpointIO):
    """Each checkpoint is a directory: the step as JSON, the rest by torch."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "step.json").write_text(json.dumps(checkpoint["global_step"]))
        torch.save(checkpoint, Path(path) / "all.pt")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(Path(path) / "all.pt", map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        self.removed.append(Path(path).name)
        shutil.rmtree(path)


class TestPlugin:
    def test_it_deletes_what_makes_way(self, tmp_path: Path) -> None:
        io = Folders()
        callback = ModelCheckpoint(tmp_path, monitor="score", save_top_k=1, mode="max", save_last=True)
        fit(callback, 3, plugins=[io])
        assert names(tmp_path) == ["epoch=1-step=6.ckpt", "last.ckpt"]
        assert io.removed == ["epoch=0-step=3.ckpt"]
        assert json.loads((tmp_path / "last.ckpt" / "step.json").read_text()) == 9
        assert callback.best_model_path == str(tmp_path / "epoch=1-step=6.ckpt")

    def test_a_resumed_run_goes_on_with_what_its_checkpoint_remembers(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"monitor": "score", "save_top_k": 2, "save_last": True}
        fit(ModelCheckpoint(tmp_path, **options), 3, plugins=[Folders()])
        io, callback = Folders(), ModelCheckpoint(tmp_path, **options)
        fit(callback, 4, tmp_path / "last.ckpt", plugins=[io])
        assert io.removed == ["epoch=2-step=9.ckpt"]
        assert names(tmp_path) == ["epoch=0-step=3.ckpt", "epoch=3-step=12.ckpt", "last.ckpt"]
        assert callback.best_model_score == torch.tensor(1.0)

    def test_the_checkpoint_that_the_user_resumed_from_stays(self, tmp_path: Path) -> None:
        fit(ModelCheckpoint(tmp_path), 1, plugins=[Folders()])
        io = Folders()
        fit(ModelCheckpoint(tmp_path), 3, tmp_path / "epoch=0-step=3.ckpt", plugins=[io])
        assert io.removed == ["epoch=1-step=6.ckpt"]
        assert names(tmp_path) == ["epoch=0-step=3.ckpt", "epoch=2-step=9.ckpt"]

    @pytest.mark.parametrize("make", [TorchCheckpointIO, AsyncCheckpointIO])
    def test_holdfasts_own_finds_its_best_again_like_the_engine(self, tmp_path: Path, make: Any) -> None:
        options: dict[str, Any] = {"monitor": "score", "save_top_k": 2, "save_last": True}
        fit(ModelCheckpoint(tmp_path / "a", **options), 3, plugins=[make()])
        shutil.move(tmp_path / "a", tmp_path / "b")
        callback = ModelCheckpoint(tmp_path / "b", **options)
        fit(callback, 4, "last", plugins=[make()])
        assert names(tmp_path / "b") == ["epoch=0-step=3.ckpt", "epoch=3-step=12.ckpt", "last.ckpt"]
        assert callback.best_model_path == str(tmp_path / "b" / "epoch=0-step=3.ckpt")
