"""Where a run saves, what is in the file, and from which file it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint, SavePlan
from holdfast.checkpoint import catalog
from holdfast.checkpoint.load import load
from tests.training.toys import Toy, checkpoints, rows, trainer


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a run says."""
    from holdfast.utilities.rank_zero import logger

    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    return lines


class Finetuned(Toy):
    """Changes itself in the hook that runs last in a batch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)


class TestSafePoint:
    def test_a_save_holds_what_the_last_hook_of_the_batch_did(self, tmp_path: Path) -> None:
        weights = []

        class Watched(Finetuned):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                super().on_train_batch_end(outputs, batch, batch_idx)
                weights.append(self.layer.weight.detach().clone())

        callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(callbacks=callback).fit(Watched(), rows())
        for step, weight in enumerate(weights, 1):
            assert torch.equal(load(tmp_path / f"step={step}.ckpt")["state_dict"]["layer.weight"], weight)

    def test_a_save_inside_a_hook_is_marked(self, tmp_path: Path, said: list[str]) -> None:
        class Impatient(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if batch_idx == 1:
                    self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                return self.loss(batch)

        run = trainer()
        run.fit(Impatient(), rows())
        run.save_checkpoint(tmp_path / "after.ckpt")
        assert not catalog.read_summary(tmp_path / "inside.ckpt").exact
        assert catalog.read_summary(tmp_path / "after.ckpt").exact
        with pytest.warns(UserWarning, match="Once resumed") as warned:
            trainer().fit(Impatient(), rows(), ckpt_path=tmp_path / "inside.ckpt")
        assert [str(one.message) for one in warned] == [
            "Once resumed, this run is not bit for bit the one that never stopped:\n"
            "  inside.ckpt was not taken at a safe point, but inside a hook or after an exception: what the "
            "rest of that batch did is not in it. Go on from a checkpoint of ModelCheckpoint."
        ]

    def test_plans_are_made_before_any_of_their_files(self, tmp_path: Path) -> None:
        # Each file holds the state of both callbacks after both saves, so a resume from either is the same.
        callbacks = [
            ModelCheckpoint(tmp_path / "a", every_n_train_steps=3),
            ModelCheckpoint(tmp_path / "b", every_n_train_steps=3, save_last=True, mode="max"),
        ]
        trainer(callbacks=callbacks, max_epochs=2).fit(Toy(), rows())
        files = sorted(tmp_path.rglob("*.ckpt"))
        assert [path.relative_to(tmp_path).as_posix() for path in files] == [
            "a/epoch=1-step=6.ckpt",
            "b/epoch=1-step=6.ckpt",
            "b/last.ckpt",
        ]
        for path in files:
            states = load(path)["callbacks"].values()
            assert sorted(state["best_model_path"] for state in states) == list(map(str, files[:2]))

    def test_a_refused_save_is_rolled_back_and_older_files_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # In the background the next save has come due by then, and is saved: see test_background_saving.
        callback = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, background=False)
        replace, calls = os.replace, []

        def full_disk(source: str, target: str) -> None:
            calls.append(target)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full_disk)
        with pytest.raises(pl.StorageError, match="No space left on device"):
            trainer(callbacks=callback).fit(Toy(), rows())
        assert os.listdir(tmp_path) == ["epoch=0-step=1.ckpt"]
        assert load(tmp_path / "epoch=0-step=1.ckpt")["global_step"] == 1
        assert callback.best_model_path == str(tmp_path / "epoch=0-step=1.ckpt")

    def test_what_one_callback_deletes_is_not_anothers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_links(*args: Any, **kwargs: Any) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
        callbacks = [
            ModelCheckpoint(tmp_path / "a", every_n_train_steps=1, save_top_k=1),
            ModelCheckpoint(tmp_path / "b", every_n_train_steps=1, save_top_k=-1, mode="max"),
        ]
        trainer(callbacks=callbacks).fit(Toy(), rows())
        assert os.listdir(tmp_path / "a") == ["epoch=0-step=3.ckpt"]
        assert [load(path)["global_step"] for path in sorted((tmp_path / "b").iterdir())] == [1, 2, 3]

    def test_a_callback_of_ones_own_can_ask(self, tmp_path: Path) -> None:
        class Mine(Checkpoint):
            done: list[str]

            def __init__(self) -> None:
                self.done = []

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                if batch_idx == 1:
                    trainer.request_save(self)

            def plan_save(self, trainer: Any) -> SavePlan:
                return SavePlan(names=(str(tmp_path / "mine.ckpt"),), weights_only=False, metrics={})

            def committed(self, trainer: Any, plan: SavePlan, report: Any) -> None:
                self.done.append(report.path)

        callback = Mine()
        trainer(callbacks=callback).fit(Toy(), rows())
        assert callback.done == [str(tmp_path / "mine.ckpt")]
        assert load(tmp_path / "mine.ckpt")["global_step"] == 2


class TestContents:
    def test_top_level_keys_are_lightnings(self, tmp_path: Path) -> None:
        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["mine"] = 3

        class Counting(Callback):
            def state_dict(self) -> dict[str, Any]:
                return {"count": 5}

        run = trainer(precision="16-mixed", callbacks=Counting(), enable_checkpointing=False)
        run.fit(Scheduled(), rows())
        run.save_checkpoint(tmp_path / "a.ckpt")
        payload = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert set(payload) == {
            "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks",
            "optimizer_states", "lr_schedulers", "MixedPrecision", "hparams_name", "hyper_parameters", "holdfast",
            "mine",
        }  # fmt: skip
        assert payload["callbacks"] == {
            "TestContents.test_top_level_keys_are_lightnings.<locals>.Counting": {"count": 5}
        }
        run.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
        assert {"optimizer_states", "callbacks"}.isdisjoint(
            torch.load(tmp_path / "b.ckpt", weights_only=True)
        )

    def test_weights_alone_are_no_run(self, tmp_path: Path) -> None:
        run = trainer()
        run.fit(Toy(), rows())
        run.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
        with pytest.raises(pl.CheckpointIncompatible) as refused:
            trainer().fit(Toy(), rows(), ckpt_path=tmp_path / "b.ckpt")
        assert str(refused.value) == (
            "b.ckpt holds weights only; a run cannot go on from it. Load them with Toy.load_from_checkpoint and start "
            "a new run."
        )

    def test_another_number_of_optimizers(self, tmp_path: Path) -> None:
        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        run = trainer()
        run.fit(Toy(), rows())
        run.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(pl.CheckpointIncompatible) as refused:
            trainer(max_epochs=2).fit(Scheduled(), rows(), ckpt_path=tmp_path / "a.ckpt")
        assert str(refused.value) == (
            "a.ckpt holds the state of 0 LR schedulers, but configure_optimizers returned 1. Resume with the "
            "optimizers that the run was started with."
        )


class TestWhichFile:
    def fit(self, root: Path, **arguments: Any) -> pl.Trainer:
        callback = ModelCheckpoint(root / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(callbacks=callback, default_root_dir=root, **arguments)
        run.fit(Toy(), rows(), ckpt_path="auto")
        return run

    def test_auto_begins_then_goes_on_then_is_done(self, tmp_path: Path, said: list[str]) -> None:
        self.fit(tmp_path)
        assert (
            said[0]
            == f'ckpt_path="auto": no checkpoint in {os.path.relpath(tmp_path / "all")} yet; starting from scratch'
        )
        said.clear()
        run = self.fit(tmp_path, max_epochs=2)
        assert run.global_step == 6
        assert said[0].startswith(
            f"resumed from {os.path.relpath(tmp_path / 'all' / 'step=3.ckpt')}  step 3  restored: "
        )
        assert said[0].endswith("goes on at epoch 0, batch 3")
        said.clear()
        assert self.fit(tmp_path, max_epochs=2).global_step == 6
        # Its last safe point is that of the last batch: the end of the epoch is still to come.
        assert said[-1].endswith("goes on at epoch 1, batch 3")

    def test_auto_passes_over_what_is_damaged_and_says_why(
        self, tmp_path: Path, said: list[str], damage: Callable[[Path], None]
    ) -> None:
        self.fit(tmp_path)
        damage(tmp_path / "all" / "step=3.ckpt")
        (tmp_path / "all" / "step=2.ckpt").write_bytes((tmp_path / "all" / "step=2.ckpt").read_bytes()[:1000])
        said.clear()
        assert self.fit(tmp_path, max_epochs=2).global_step == 6
        skipped = [line for line in said if line.startswith("passed over")]
        assert len(skipped) == 2
        assert "step=3.ckpt is corrupt" in "".join(skipped)
        assert "step=1.ckpt" in next(line for line in said if line.startswith("resumed"))

    def test_auto_prefers_a_safe_point_to_a_newer_save_inside_a_hook(
        self, tmp_path: Path, said: list[str]
    ) -> None:
        class Saves(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.current_epoch == 1 and batch_idx == 2:
                    self.trainer.save_checkpoint(tmp_path / "all" / "by hand.ckpt")
                    raise RuntimeError("killed")
                return self.loss(batch)

        callback = ModelCheckpoint(tmp_path / "all")
        with pytest.raises(RuntimeError, match="killed"):
            trainer(callbacks=callback, max_epochs=2).fit(Saves(), rows(), ckpt_path="auto")
        assert checkpoints(tmp_path) == ["by hand.ckpt", "epoch=0-step=3.ckpt"]
        said.clear()
        trainer(callbacks=ModelCheckpoint(tmp_path / "all"), max_epochs=2).fit(
            Toy(), rows(), ckpt_path="auto"
        )
        assert "epoch=0-step=3.ckpt" in said[0]

    def test_last_and_best(self, tmp_path: Path) -> None:
        class Scored(Toy):
            def on_train_epoch_end(self) -> None:
                self.log("score", float(self.current_epoch == 1))

        callback = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_last=True)
        run = trainer(callbacks=callback, max_epochs=3)
        run.fit(Scored(), rows())
        again = trainer(callbacks=ModelCheckpoint(tmp_path, monitor="score", mode="max"), max_epochs=4)
        again.fit(Scored(), rows(), ckpt_path="last")
        assert again.ckpt_path == str(tmp_path / "last.ckpt")
        assert again.global_step == 12
        with pytest.raises(
            pl.ConfigError, match='ckpt_path="best": no checkpoint callback of this trainer has saved'
        ):
            trainer(callbacks=ModelCheckpoint(tmp_path)).fit(Toy(), rows(), ckpt_path="best")

    def test_last_with_nothing_there_warns_and_starts(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="there is no checkpoint in .*Starting from scratch"):
            trainer(callbacks=ModelCheckpoint(tmp_path)).fit(Toy(), rows(), ckpt_path="last")

    def test_auto_goes_on_in_the_same_version_and_its_log(self, tmp_path: Path) -> None:
        def run(epochs: int) -> None:
            pl.Trainer(
                max_epochs=epochs, default_root_dir=tmp_path, log_every_n_steps=1, accelerator="cpu",
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(Logged(), rows(), ckpt_path="auto")  # fmt: skip

        class Logged(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = self.loss(batch)
                self.log("loss", loss)
                return loss

        run(1)
        run(3)
        assert os.listdir(tmp_path / "lightning_logs") == ["version_0"]
        lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
        assert [line.split(",")[2] for line in lines] == ["step", *map(str, range(9))]

    def test_a_run_that_stopped_early_stays_stopped_until_its_limit_is_raised(
        self, tmp_path: Path, said: list[str]
    ) -> None:
        def run(epochs: int) -> pl.Trainer:
            callbacks = [EarlyStopping("flat", patience=1), ModelCheckpoint(tmp_path)]
            made = trainer(callbacks=callbacks, max_epochs=epochs)
            made.fit(Flat(), rows(), ckpt_path="auto")
            return made

        class Flat(Toy):
            def on_train_epoch_end(self) -> None:
                self.log("flat", 1.0)

        assert run(9).current_epoch == 2
        assert run(9).current_epoch == 2
        assert said[-1] == (
            "already finished: EarlyStopping stopped the run (2 epochs, 6 steps are done): flat did not improve "
            "once. The best was 1. Raise max_epochs or max_steps to train on."
        )
        assert run(10).current_epoch == 3


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Flips one bit in the middle of a file's largest tensor."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        weight = load(path)["state_dict"]["layer.weight"].numpy().tobytes()
        data[data.index(weight) + 2] ^= 4
        path.chmod(0o644)
        path.write_bytes(data)

    return flip
