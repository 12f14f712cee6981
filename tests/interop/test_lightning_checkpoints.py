"""PyTorch Lightning opens our checkpoints, and we go on from those that it wrote."""

from __future__ import annotations

import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast

from .regression import make_module, make_trainer, module_class

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

BATCHES = 8  # an epoch's: 30 rows, 4 a batch


def steps_of(pl: Any, root: Path, **arguments: Any) -> Any:
    """A trainer that keeps a file of every third step under ``root``."""
    every = pl.callbacks.ModelCheckpoint(
        dirpath=root, filename="{step}", every_n_train_steps=3, save_top_k=-1, auto_insert_metric_name=False
    )
    return make_trainer(pl, root, callbacks=[every], **arguments)


def same_weights(mine: Any, theirs: Any) -> bool:
    mine, theirs = mine.state_dict(), theirs.state_dict()
    return mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Any, Path]:
    """A module that holdfast trained, and its checkpoint."""
    module = make_module(holdfast, width=6, lr=0.02, notes={"tags": ["a", "b"], "none": None, "on": True})
    trainer = make_trainer(holdfast, tmp_path, max_epochs=2)
    trainer.fit(module)
    path = tmp_path / "ours.ckpt"
    trainer.save_checkpoint(path)
    return module, path


class TestOthersOpenOurs:
    def test_lightning_loads_the_model(self, ours: tuple[Any, Path]) -> None:
        module, path = ours
        loaded = module_class(lightning).load_from_checkpoint(path)
        assert same_weights(module, loaded)
        assert dict(loaded.hparams) == dict(module.hparams)
        assert loaded.hparams.notes == {"tags": ["a", "b"], "none": None, "on": True}

    def test_lightning_loads_it_with_other_hyperparameters(self, ours: tuple[Any, Path]) -> None:
        _, path = ours
        assert module_class(lightning).load_from_checkpoint(path, lr=0.5).hparams.lr == 0.5

    @pytest.mark.parametrize("mmap", [False, True])
    def test_torch_loads_it_without_running_code(self, ours: tuple[Any, Path], mmap: bool) -> None:
        module, path = ours
        payload = torch.load(path, weights_only=True, mmap=mmap)
        assert list(payload["state_dict"]) == list(module.state_dict())
        assert all(payload["state_dict"][name].equal(value) for name, value in module.state_dict().items())
        assert (payload["epoch"], payload["global_step"]) == (2, 2 * BATCHES)

    def test_zip_finds_every_record_right(self, ours: tuple[Any, Path]) -> None:
        _, path = ours
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None

    def test_hyperparameters_that_lightning_saves_and_cannot_load(self, tmp_path: Path) -> None:
        """Others get the nearest plain values; we get back what was saved."""
        notes = {"data": Path("rows.csv"), "options": Namespace(depth=2)}
        module = make_module(holdfast, notes=notes)
        trainer = make_trainer(holdfast, tmp_path, max_epochs=1)
        trainer.fit(module)
        trainer.save_checkpoint(tmp_path / "ours.ckpt")
        theirs = module_class(lightning).load_from_checkpoint(tmp_path / "ours.ckpt")
        assert theirs.hparams.notes == {"data": "rows.csv", "options": {"depth": 2}}
        assert module_class(holdfast).load_from_checkpoint(tmp_path / "ours.ckpt").hparams.notes == notes

    @pytest.mark.parametrize("scheduler", ["onecycle", "step", "plateau"])
    def test_lightning_trains_on_from_the_end_of_an_epoch(self, scheduler: str, tmp_path: Path) -> None:
        keep_all = {"save_top_k": -1, "filename": "{epoch}"}
        saving = holdfast.callbacks.ModelCheckpoint(dirpath=tmp_path, **keep_all)
        whole = make_module(holdfast, scheduler=scheduler)
        make_trainer(holdfast, tmp_path, callbacks=[saving]).fit(whole)
        resumed = make_module(lightning, scheduler=scheduler)
        trainer = make_trainer(lightning, tmp_path / "on", enable_checkpointing=False)
        trainer.fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)
        assert same_weights(whole, resumed)

    def test_lightning_finds_itself_at_the_right_step_inside_an_epoch(self, tmp_path: Path) -> None:
        """Where it goes on there is its own affair: it reads the epoch's first rows again."""
        steps_of(holdfast, tmp_path).fit(make_module(holdfast))
        seen: list[tuple[int, int]] = []

        class Look(lightning.Callback):
            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                seen.append((trainer.current_epoch, trainer.global_step))

        trainer = make_trainer(lightning, tmp_path / "on", callbacks=[Look()], enable_checkpointing=False)
        trainer.fit(make_module(lightning), ckpt_path=tmp_path / "12.ckpt")
        assert seen[0] == (1, 12)
        assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)


class Start(holdfast.Callback):
    """Remembers where training began and what was restored then."""

    def __init__(self) -> None:
        self.place: tuple[int, int] | None = None
        self.restored: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.place is None:
            self.place = (trainer.current_epoch, batch_idx)
            (optimizer,) = trainer.optimizers
            self.restored = {
                "global_step": trainer.global_step,
                "weights": {name: value.clone() for name, value in pl_module.state_dict().items()},
                "lr": optimizer.param_groups[0]["lr"],
                "momentum": [state["momentum_buffer"].clone() for state in optimizer.state.values()],
            }


class TestWeGoOnFromLightnings:
    """The data is in order and nothing random is drawn, so that our end must be Lightning's own.

    Not with ReduceLROnPlateau: Lightning saves before that scheduler has seen the epoch, and what it would
    have seen is not in the file.
    """

    @pytest.fixture(params=["onecycle", "step"])
    def scheduler(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def resume(self, path: Path, root: Path, scheduler: str, **arguments: Any) -> tuple[Any, Any, Start]:
        start = Start()
        module = make_module(holdfast, scheduler=scheduler)
        trainer = make_trainer(holdfast, root, callbacks=[start], **arguments)
        trainer.fit(module, ckpt_path=path)
        written = torch.load(path, weights_only=False)
        (optimizer,) = written["optimizer_states"]
        assert start.restored["global_step"] == written["global_step"]
        weights = start.restored["weights"]
        assert all(weights[name].equal(value) for name, value in written["state_dict"].items())
        assert start.restored["lr"] == optimizer["param_groups"][0]["lr"]
        buffers = [state["momentum_buffer"] for state in optimizer["state"].values()]
        assert all(
            mine.equal(theirs) for mine, theirs in zip(start.restored["momentum"], buffers, strict=True)
        )
        return module, trainer, start

    @pytest.mark.parametrize("epoch", [0, 1])
    def test_at_the_end_of_an_epoch(self, epoch: int, scheduler: str, tmp_path: Path) -> None:
        saving = lightning.callbacks.ModelCheckpoint(
            dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        whole = make_module(lightning, scheduler=scheduler)
        make_trainer(lightning, tmp_path, callbacks=[saving]).fit(whole)
        path = tmp_path / f"epoch={epoch}.ckpt"
        module, trainer, start = self.resume(path, tmp_path / "on", scheduler)
        assert start.place == (epoch + 1, 0)
        assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)
        assert same_weights(whole, module)

    def test_after_its_fit(self, scheduler: str, tmp_path: Path) -> None:
        shorter = make_trainer(lightning, tmp_path / "first", max_epochs=2, enable_checkpointing=False)
        shorter.fit(make_module(lightning, scheduler=scheduler))
        shorter.save_checkpoint(tmp_path / "done.ckpt")
        whole = make_module(lightning, scheduler=scheduler)
        make_trainer(lightning, tmp_path / "whole", enable_checkpointing=False).fit(whole)
        module, trainer, start = self.resume(tmp_path / "done.ckpt", tmp_path / "on", scheduler)
        assert start.place == (2, 0)
        assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)
        assert same_weights(whole, module)

    @pytest.mark.parametrize("step", [3, 12])
    def test_in_the_middle_of_an_epoch(self, step: int, scheduler: str, tmp_path: Path) -> None:
        whole = make_module(lightning, scheduler=scheduler)
        steps_of(lightning, tmp_path).fit(whole)
        module, trainer, start = self.resume(tmp_path / f"{step}.ckpt", tmp_path / "on", scheduler)
        assert start.place == (step // BATCHES, step % BATCHES)
        assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)
        assert same_weights(whole, module)

    @pytest.mark.parametrize("interval", [1.0, 0.5])
    def test_when_validation_has_ended(self, interval: float, scheduler: str, tmp_path: Path) -> None:
        saving = lightning.callbacks.ModelCheckpoint(
            dirpath=tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False
        )
        whole = make_module(lightning, scheduler=scheduler)
        make_trainer(lightning, tmp_path, callbacks=[saving], val_check_interval=interval).fit(whole)
        step = int(BATCHES * (1 + interval))
        module, trainer, start = self.resume(
            tmp_path / f"step={step}.ckpt", tmp_path / "on", scheduler, val_check_interval=interval
        )
        assert start.place == (step // BATCHES, step % BATCHES)
        assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)
        assert same_weights(whole, module)

    def test_the_model_alone(self, tmp_path: Path) -> None:
        trained = make_module(lightning, width=6, notes=["x"])
        trainer = make_trainer(lightning, tmp_path, max_epochs=1)
        trainer.fit(trained)
        trainer.save_checkpoint(tmp_path / "theirs.ckpt")
        loaded = module_class(holdfast).load_from_checkpoint(tmp_path / "theirs.ckpt")
        assert same_weights(trained, loaded)
        assert dict(loaded.hparams) == dict(trained.hparams)

    def test_the_model_alone_with_hyperparameters_that_lightning_cannot_load(self, tmp_path: Path) -> None:
        trained = make_module(lightning, notes=Namespace(depth=2))
        trainer = make_trainer(lightning, tmp_path, max_epochs=1)
        trainer.fit(trained)
        trainer.save_checkpoint(tmp_path / "theirs.ckpt")
        with pytest.raises(Exception, match="weights_only"):
            module_class(lightning).load_from_checkpoint(tmp_path / "theirs.ckpt")
        loaded = module_class(holdfast).load_from_checkpoint(tmp_path / "theirs.ckpt")
        assert same_weights(trained, loaded)
        assert loaded.hparams.notes == Namespace(depth=2)

    def test_best_scores_of_its_model_checkpoint(self, tmp_path: Path) -> None:
        """The files that Lightning ranked go on being ranked."""
        options = {"dirpath": tmp_path / "best", "monitor": "val_loss", "save_top_k": 2}
        theirs = lightning.callbacks.ModelCheckpoint(**options)
        trainer = make_trainer(lightning, tmp_path, callbacks=[theirs], max_epochs=2)
        trainer.fit(make_module(lightning))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        mine = holdfast.callbacks.ModelCheckpoint(**options)
        whole = make_trainer(holdfast, tmp_path, callbacks=[mine], max_epochs=2)
        whole.fit(make_module(holdfast), ckpt_path=tmp_path / "end.ckpt")
        assert mine.best_model_path == theirs.best_model_path
        assert mine.best_model_score == theirs.best_model_score
        assert {path: float(score) for path, score in mine.best_k_models.items()} == {
            path: float(score) for path, score in theirs.best_k_models.items()
        }
