"""Stops at moments that are easily forgotten; each was found by `test_random_features` and is here in small."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from holdfast.checkpoint.load import load
from holdfast.loggers import CSVLogger
from holdfast.plugins.io import AsyncCheckpointIO, CheckpointIO
from tests.training.toys import Toy, checkpoints, rows, trainer


class Logs(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


class Cut(Exception):
    """Stands for whatever ends a process."""


class CutsAt(Callback):
    """Ends the run in ``hook``, the last time that it is called if it is called ``times`` times."""

    def __init__(self, hook: str, times: int = 1) -> None:
        self.calls = 0

        def cut(*args: Any) -> None:
            self.calls += 1
            if self.calls == times:
                raise Cut

        setattr(self, hook, cut)
        self.hook = hook

    def uses_hook(self, name: str) -> bool:
        return name == self.hook


class StopsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Files(CheckpointIO):
    """A plugin as people write it: torch.save, torch.load, os.remove."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        os.remove(path)


@pytest.mark.parametrize("ending", [{"max_steps": 5}, {"callbacks": StopsAt(5)}], ids=["max_steps", "told"])
def test_after_the_last_batch_and_before_its_epoch_ended(ending: dict[str, Any], tmp_path: Path) -> None:
    """The limit is reached, but the epoch has not ended: what it logs and what its end does is still to come."""

    def run(root: Path, *cuts: Callback) -> pl.Trainer:
        callbacks = [*cuts, ModelCheckpoint(root, every_n_train_steps=1), ending.get("callbacks", Callback())]
        arguments = {"max_epochs": 9, "log_every_n_steps": 1, **ending, "callbacks": callbacks}
        made = trainer(logger=CSVLogger(root), **arguments)
        pl.seed_everything(1, verbose=False)
        made.fit(Logs(), rows(), ckpt_path="auto")
        return made

    whole = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", CutsAt("on_train_epoch_end", times=2))
    resumed = run(tmp_path / "cut")
    assert (resumed.current_epoch, resumed.global_step) == (whole.current_epoch, whole.global_step) == (2, 5)
    texts = [
        (tmp_path / root / "lightning_logs" / "version_0" / "metrics.csv").read_text()
        for root in ("whole", "cut")
    ]
    assert texts[0] == texts[1]
    assert resumed.callback_metrics["loss_epoch"] == whole.callback_metrics["loss_epoch"]


def test_between_the_last_save_and_the_deletion_of_the_one_before(tmp_path: Path) -> None:
    """There is nothing left to train, but a file that has to go."""

    class CutsBefore(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
            if checkpoint_callback.best_model_path.endswith("epoch=1-step=6.ckpt"):
                raise Cut

    def run(logger: CSVLogger) -> pl.Trainer:
        made = trainer(logger=logger, callbacks=ModelCheckpoint(), max_epochs=2)
        made.fit(Toy(), rows(), ckpt_path="auto")
        return made

    with pytest.raises(Cut):
        run(CutsBefore(tmp_path))
    assert checkpoints(tmp_path) == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"]
    resumed = run(CSVLogger(tmp_path))
    assert checkpoints(tmp_path) == ["epoch=1-step=6.ckpt"]
    assert Path(resumed.checkpoint_callback.best_model_path).name == "epoch=1-step=6.ckpt"


def test_a_finished_run_whose_last_epoch_is_lived_again(tmp_path: Path) -> None:
    """The files of the step that it goes on from are those of a future: they are written over, not ranked."""

    class Falls(Toy):
        def on_train_epoch_end(self) -> None:
            self.log("score", 1.0 / (1 + self.current_epoch))

    def run() -> ModelCheckpoint:
        best = ModelCheckpoint(
            tmp_path / "best", "{epoch}", monitor="score", save_top_k=2, save_weights_only=True
        )
        steps = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=3)
        trainer(callbacks=[best, steps], max_epochs=3).fit(Falls(), rows(), ckpt_path="auto")
        return best

    first = run()
    again = run()
    assert checkpoints(tmp_path / "best") == ["epoch=1.ckpt", "epoch=2.ckpt"]
    assert again.best_k_models == first.best_k_models


def test_what_the_end_of_an_epoch_logs_does_not_know_the_last_batch(tmp_path: Path) -> None:
    """A mean over a batch's rows is rounded, and a run that goes on from here has no batch."""
    value = 2.935671329498291
    assert torch.tensor(value) * 3 / 3 != value

    class LogsAtTheEnd(Logs):
        def on_train_epoch_end(self) -> None:
            self.log("own", torch.tensor(value))

    def run(path: Path | None = None) -> float:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        made = trainer(callbacks=saves)
        made.fit(LogsAtTheEnd(), rows(12, 3), ckpt_path=path)
        return made.callback_metrics["own"].item()

    assert run() == run(tmp_path / "step=4.ckpt") == value


def test_an_average_that_has_not_begun(tmp_path: Path) -> None:
    """It holds what the run began with, also in the files of a run that goes on."""

    def run(root: Path, path: Path | None = None) -> Tensor:
        saves = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
        average = StochasticWeightAveraging(0.1, swa_epoch_start=2)
        pl.seed_everything(1, verbose=False)
        trainer(callbacks=[saves, average]).fit(Toy(), rows(), ckpt_path=path)
        state = load(root / "step=3.ckpt")["callbacks"]["StochasticWeightAveraging"]
        assert state["n_averaged"] == 0
        return state["average_model_state"]["layer.weight"]

    with pytest.warns(match="averages nothing"):
        whole = run(tmp_path)
    with pytest.warns(match="averages nothing"):
        assert torch.equal(run(tmp_path / "again", tmp_path / "step=1.ckpt"), whole)


class TestPluginOfOnesOwn:
    def test_what_an_exception_left_is_not_taken_before_an_exact_file(self, tmp_path: Path) -> None:
        def run(*cuts: Callback) -> pl.Trainer:
            saves = [
                ModelCheckpoint(tmp_path, every_n_train_steps=2),
                OnExceptionCheckpoint(tmp_path / "bad"),
            ]
            made = trainer(callbacks=[*cuts, *saves], plugins=Files(), max_epochs=2)
            made.fit(Toy(), rows(), ckpt_path="auto")
            return made

        with pytest.raises(Cut):
            run(CutsAt("on_before_optimizer_step", times=4))
        assert checkpoints(tmp_path) == ["epoch=0-step=2.ckpt", "on_exception.ckpt"]
        assert Path(run().resumed_from or "").name == "epoch=0-step=2.ckpt"

    def test_what_made_way_for_the_checkpoint_is_deleted(self, tmp_path: Path) -> None:
        class Keeps(Files):
            def remove_checkpoint(self, path: Any) -> None:
                raise Cut

        def run(plugin: Files) -> None:
            made = trainer(callbacks=ModelCheckpoint(tmp_path), plugins=plugin, max_epochs=2)
            made.fit(Toy(), rows(), ckpt_path="auto")

        with pytest.raises(Cut):
            run(Keeps())
        assert checkpoints(tmp_path) == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"]
        run(Files())
        assert checkpoints(tmp_path) == ["epoch=1-step=6.ckpt"]

    def test_a_file_that_is_gone_is_deleted_in_the_background(self, tmp_path: Path) -> None:
        plugin = AsyncCheckpointIO(Files())
        plugin.remove_checkpoint(tmp_path / "gone.ckpt")
        plugin.teardown()


class Stateful:
    """Gives each epoch another order, and goes on inside of one from the position in its state."""

    def __init__(self) -> None:
        self.epoch = self.position = 0
        self.start: int | None = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.start = self.position

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start, None
        if start is None:
            start, self.epoch = 0, self.epoch + 1
        order = random.Random(self.epoch).sample(range(5), 5)
        for index in range(start, 5):
            self.position = index + 1
            yield torch.full((2, 3), order[index] / 5), torch.tensor([order[index]])


class Counted(Stateful):
    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("reload", [0, 2])
@pytest.mark.parametrize("loader", [Stateful, Counted])
def test_a_loader_with_a_state_that_goes_over_epochs(
    loader: type[Stateful], reload: int, tmp_path: Path
) -> None:
    def train(root: Path, path: Path | None = None) -> list[int]:
        saves = [
            ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(root, "end-{step}", save_top_k=-1),
        ]
        module = Toy()
        run = trainer(callbacks=saves, max_epochs=3, reload_dataloaders_every_n_epochs=reload)
        run.fit(module, loader(), ckpt_path=path)
        return module.seen

    seen = train(tmp_path)
    assert seen[:5] != seen[5:10]
    for path in sorted(tmp_path.glob("*.ckpt")):
        step = int(path.stem.partition("step=")[2])
        assert train(tmp_path / "again", path) == seen[step:], path.stem
