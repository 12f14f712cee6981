"""Saving while training goes on: what is in the files, when they are known, and what becomes of what fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast as pl
from holdfast.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from holdfast.checkpoint import catalog
from holdfast.checkpoint.load import load
from holdfast.training.preemption import Preempted
from tests.training.saved_in_background import (
    Before,
    Wide,
    assert_same_tensors,
    batches,
    every_step,
    fit,
    gate,
)
from tests.training.toys import checkpoints, trainer


class Manual(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Searching(Wide):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Rescaled(Wide):
    """An embedding that forward itself rescales."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64, max_norm=0.5)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.embedding(torch.arange(0, 64, 2)).square().mean()


class Clipped(Wide):
    """Clips its weights by the back door, before each forward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net[0].weight.data.clamp_(-0.05, 0.05)
        return super().training_step(batch, batch_idx)


class NoLoss(Wide):
    """Skips a batch, whose step is made all the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (Wide, {}),
        (Wide, {"accumulate_grad_batches": 3}),
        (Wide, {"precision": "bf16-mixed", "gradient_clip_val": 0.5}),
        (Manual, {}),
        (Searching, {}),
        (Rescaled, {}),
        pytest.param(
            Clipped,
            {},
            marks=pytest.mark.filterwarnings("ignore:state_dict.net.0.weight was changed:UserWarning"),
        ),
        pytest.param(
            NoLoss, {}, marks=pytest.mark.filterwarnings("ignore:training_step returned None:UserWarning")
        ),
    ],
    ids=["adam", "half a window", "bf16", "manual", "lbfgs", "max_norm", "clipped", "no loss"],
)
def test_the_files_are_those_that_the_foreground_writes(
    module: type[Wide], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Of every batch and the end of every epoch: first snapshots, late ones, gradients of half a window."""

    class Everywhere(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            trainer.request_save(self)

        def _decide(self, trainer: Any, asked: Any) -> Any:
            self.filename = f"{trainer.progress.total_batches}"
            self._saved_step = -1
            return super()._decide(trainer, asked)

    runs = []
    for background in (True, False):
        saves = Everywhere(
            tmp_path / str(background), every_n_train_steps=99, save_top_k=-1, background=background
        )
        runs.append(fit(saves, module=module, max_epochs=2, **arguments))
    assert [run.checkpoint_stats.saves for run in runs] == [16, 16]
    assert any(report.background for report in runs[0].checkpoint_stats.reports)
    assert not any(report.background for report in runs[1].checkpoint_stats.reports)
    names = checkpoints(tmp_path / "True")
    assert len(names) == 16
    assert names == checkpoints(tmp_path / "False")
    for name in names:
        assert_same_tensors(tmp_path / "True" / name, tmp_path / "False" / name)


def test_rankings_are_those_of_the_foreground(tmp_path: Path) -> None:
    shown = []
    for background in (True, False):
        directory = tmp_path / str(background)
        best = ModelCheckpoint(
            directory,
            monitor="loss",
            save_top_k=3,
            save_last=True,
            every_n_train_steps=1,
            background=background,
        )
        newest = ModelCheckpoint(directory / "newest", every_n_train_steps=3, background=background)
        weights = ModelCheckpoint(
            directory / "weights", every_n_train_steps=2, save_weights_only=True, background=background
        )
        run = fit([best, newest, weights], max_epochs=2, log_every_n_steps=1)
        states = []
        for callback in (best, newest, weights):
            state = {key: value for key, value in callback.state_dict().items() if key != "run"}
            states.append(str(state).replace(str(directory), ""))
        shown.append((states, checkpoints(directory), run.checkpoint_stats.deleted))
    assert shown[0] == shown[1]
    assert shown[0][2] > 10


class TestWhenItIsKnown:
    def test_at_the_first_safe_point_after_it_is_durable(self, tmp_path: Path) -> None:
        """Until then the step goes on without it, and nothing is public, deleted or told."""
        told, seen = [], []

        class Told(pl.loggers.CSVLogger):
            def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
                told.append((checkpoint_callback.best_model_path, checkpoints(tmp_path)))

        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)

        class Look(Callback):
            def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
                if trainer.global_step == 3:
                    seen.append((saves.best_model_path, checkpoints(tmp_path)))
                    held.open()
                    trainer.engine.wait()
                    seen.append((saves.best_model_path, checkpoints(tmp_path)))

        with gate() as held:
            fit(saves, Look(), logger=Told(tmp_path / "logs"), limit_train_batches=5)
        two, four = str(tmp_path / "step=2.ckpt"), str(tmp_path / "step=4.ckpt")
        assert seen == [("", []), ("", ["step=2.ckpt"])]
        # The older one goes when the loggers have the newer one.
        assert told == [(two, ["step=2.ckpt"]), (four, ["step=2.ckpt", "step=4.ckpt"])]
        assert (saves.best_model_path, checkpoints(tmp_path)) == (four, ["step=4.ckpt"])

    def test_what_is_public_is_durable_at_every_hook(self, tmp_path: Path) -> None:
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_last=True)
        seen = []

        class Look(Callback):
            def look(self, *_: Any) -> None:
                paths = saves.best_model_path, saves.last_model_path
                seen.append([load(path)["global_step"] if path else 0 for path in paths])

            on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_end = look

        fit(saves, Look())
        # The file under ``last`` may be newer than what is known.
        assert all(best <= last for best, last in seen)
        for steps in zip(*seen, strict=True):
            assert list(steps) == sorted(steps)
        assert seen[-1] == [8, 8]

    def test_before_training_ends_and_before_a_file_of_the_users(self, tmp_path: Path) -> None:
        saves = ModelCheckpoint(tmp_path / "saves", filename="{step}", every_n_train_steps=5)
        at_end = []

        class Own(Callback):
            def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
                if trainer.global_step == 5:
                    held.open()
                    trainer.save_checkpoint(tmp_path / "own.ckpt")
                    at_end.append(saves.best_model_path)

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                at_end.append(saves.best_model_path)

        with gate() as held:
            fit(saves, Own())
        assert at_end == [str(tmp_path / "saves" / "step=5.ckpt")] * 2
        # It holds a callback's state as it is once that save is done.
        (state,) = load(tmp_path / "own.ckpt")["callbacks"].values()
        assert state["best_model_path"] == at_end[0]

    def test_hearing_of_it_saves_nothing_and_costs_no_step(self, tmp_path: Path) -> None:
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        points = []

        class Counted(pl.Trainer):
            def safe_point(self, exact: bool = True) -> None:
                points.append((self.global_step, list(self.saves_in_flight) != []))
                super().safe_point(exact)

        wait = Before(3, lambda trainer: trainer.engine.wait())
        torch.manual_seed(3)
        run = Counted(
            callbacks=[wait, saves], max_epochs=1, limit_train_batches=4, logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        run.fit(Wide(), batches())
        assert checkpoints(tmp_path) == ["step=2.ckpt", "step=4.ckpt"]
        assert points[0] == (2, False)
        assert {step for step, _ in points} <= {2, 3, 4}

    def test_a_second_fit(self, tmp_path: Path) -> None:
        saves = every_step(tmp_path)
        run = fit(saves, max_epochs=1)
        assert run.saves_in_flight == []
        run.fit_loop = None
        run.max_epochs = 2
        run.fit(Wide(), batches(), ckpt_path=tmp_path / "step=8.ckpt")
        assert [load(tmp_path / f"step={step}.ckpt")["global_step"] for step in (1, 8, 9, 16)] == [
            1,
            8,
            9,
            16,
        ]
        assert run.checkpoint_stats.saves == 8
        assert run.saves_in_flight == []

    def test_a_trial_run_saves_nothing(self, tmp_path: Path) -> None:
        run = fit(every_step(tmp_path), fast_dev_run=3)
        assert (checkpoints(tmp_path), str(run.checkpoint_stats)) == ([], "nothing was saved")


class TestWhatEndsARun:
    def test_an_exception_beside_a_save(self, tmp_path: Path) -> None:
        """The save is finished and known before anybody decides what else to save."""
        saves = ModelCheckpoint(
            tmp_path / "a", filename="{step}", every_n_train_steps=2, save_on_exception=True
        )
        rescue = OnExceptionCheckpoint(tmp_path / "b")

        def fails(trainer: Any) -> None:
            held.open()
            raise RuntimeError("on purpose")

        with gate() as held, pytest.raises(RuntimeError, match="on purpose"):
            fit([saves, rescue], Before(3, fails))
        assert saves.best_model_path == str(tmp_path / "a" / "step=2.ckpt")
        assert checkpoints(tmp_path / "a") == ["step=2.ckpt", "step=3.ckpt"]
        assert load(tmp_path / "a" / "step=3.ckpt")["global_step"] == 3
        assert load(tmp_path / "b" / "on_exception.ckpt")["global_step"] == 3

    def test_a_signal_beside_a_save(self, tmp_path: Path) -> None:
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)

        def stop(trainer: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            held.open()

        with gate() as held, pytest.raises(Preempted):
            fit(saves, Before(2, stop))
        assert checkpoints(tmp_path) == ["step=2.ckpt", "stopped.ckpt"]
        assert saves.best_model_path == str(tmp_path / "step=2.ckpt")
        about = catalog.read_summary(tmp_path / "stopped.ckpt")
        assert (about.step, about.exact) == (3, True)

    def test_a_kill_after_the_commit_and_before_anybody_knows(self, tmp_path: Path) -> None:
        """The file is there, what it makes superfluous too; the run goes on from it and ends with the same files."""
        program = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from tests.training.test_background_saving import unknown\n"
            "unknown(Path(sys.argv[1]), kill=True)\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "killed")]
        root = Path(__file__).parents[2]
        ended = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60)
        assert ended.returncode == -signal.SIGKILL
        assert checkpoints(tmp_path / "killed") == ["step=2.ckpt", "step=4.ckpt"]
        unknown(tmp_path / "whole")
        run = unknown(tmp_path / "killed")
        assert run.resumed_from == str(tmp_path / "killed" / "step=4.ckpt")
        assert checkpoints(tmp_path / "killed") == checkpoints(tmp_path / "whole") == ["step=8.ckpt"]
        assert_same_tensors(tmp_path / "killed" / "step=8.ckpt", tmp_path / "whole" / "step=8.ckpt")


def unknown(directory: Path, *, kill: bool = False) -> pl.Trainer:
    """Train with a save every second step; die when the second one is durable and not told of."""

    def die(trainer: Any) -> None:
        held.open()
        trainer.engine.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    pl.seed_everything(3)
    saves = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=2)
    run = trainer(callbacks=[*([Before(4, die)] if kill else []), saves])
    with gate(2 if kill else 0) as held:
        run.fit(Wide(), batches(), ckpt_path="auto")
    return run


class Full:
    """Refuses to give files of some steps their final names, a number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: int, times: int = 99) -> None:
        self.steps = steps
        self.left = times
        replace = os.replace

        def refuse(source: Any, target: Any) -> None:
            if any(str(target).endswith(f"step={step}.ckpt") for step in self.steps) and self.left:
                self.left -= 1
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)


class TestAFailure:
    def test_is_raised_at_the_next_safe_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Full(monkeypatch, 4)
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
        run = trainer(callbacks=[Before(4, lambda trainer: held.end(trainer)), saves])
        with gate(2) as held, pytest.raises(pl.StorageError, match="No space left on device") as failed:
            run.fit(Wide(), batches())
        assert run.global_step == 5
        assert "replacing" in [frame.name for frame in traceback.extract_tb(failed.value.__traceback__)]
        assert checkpoints(tmp_path) == ["step=2.ckpt"]
        assert saves.best_model_path == str(tmp_path / "step=2.ckpt")
        assert (run.checkpoint_stats.saves, run.checkpoint_stats.failed) == (1, 1)

    def test_is_raised_where_training_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Full(monkeypatch, 8)
        saves, ended = every_step(tmp_path, every_n_train_steps=4), []

        class End(Callback):
            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                ended.append(True)

        with pytest.raises(pl.StorageError, match="No space left on device"):
            fit(saves, End())
        assert (checkpoints(tmp_path), ended) == (["step=4.ckpt"], [])

    def test_does_not_keep_what_is_due_from_being_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Full(monkeypatch, 2)
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
        with gate(2) as held, pytest.raises(pl.StorageError, match="step=2.ckpt"):
            fit(saves, Before(2, lambda trainer: held.end(trainer)))
        assert checkpoints(tmp_path) == ["step=3.ckpt"]
        assert catalog.read_summary(tmp_path / "step=3.ckpt").exact
        assert saves.best_model_path == str(tmp_path / "step=3.ckpt")

    def test_beside_a_signal_keeps_nothing_from_being_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Full(monkeypatch, 2)
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)

        def stop(trainer: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            held.end(trainer)

        with gate() as held, pytest.raises(pl.StorageError, match="step=2.ckpt"):
            fit(saves, Before(2, stop))
        assert checkpoints(tmp_path) == ["stopped.ckpt"]

    def test_before_a_file_of_the_users_is_raised_when_that_is_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Full(monkeypatch, 2)

        def own(trainer: Any) -> None:
            held.open()
            trainer.save_checkpoint(tmp_path / "own.ckpt")

        with gate() as held, pytest.raises(pl.StorageError, match="step=2.ckpt"):
            fit(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2), Before(2, own))
        assert load(tmp_path / "own.ckpt")["global_step"] == 2

    @pytest.mark.parametrize("background", [True, False])
    def test_is_only_said_where_that_is_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
    ) -> None:
        Full(monkeypatch, 4)
        saves = ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=2, on_error="warn", background=background
        )
        seen = []

        class Look(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
                if trainer.global_step == 5:
                    trainer.engine.wait()
                    seen.append((saves.best_model_path, checkpoints(tmp_path)))

        with pytest.warns(UserWarning, match="was not saved") as warned:
            run = fit(saves, Look())
        assert [str(one.message) for one in warned] == [
            "step=4.ckpt was not saved, and training goes on without it (on_error='warn'). StorageError: Could not "
            f"rename a file to {tmp_path / 'step=4.ckpt'}: No space left on device. "
            + str(warned[0].message).partition("No space left on device. ")[2]
        ]
        assert seen == [(str(tmp_path / "step=2.ckpt"), ["step=2.ckpt"])]
        assert (checkpoints(tmp_path), run.global_step) == (["step=8.ckpt"], 8)
        assert (run.checkpoint_stats.saves, run.checkpoint_stats.failed) == (3, 1)

    @pytest.mark.parametrize("background", [True, False])
    def test_is_tried_again_where_that_is_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
    ) -> None:
        refusing = Full(monkeypatch, 4, times=2)
        saves = every_step(tmp_path, every_n_train_steps=4, on_error="retry", background=background)
        run = fit(saves)
        assert (refusing.left, checkpoints(tmp_path)) == (0, ["step=4.ckpt", "step=8.ckpt"])
        assert [report.attempts for report in run.checkpoint_stats.reports] == [3, 1]
        refusing.left = 3
        with pytest.raises(pl.StorageError, match="No space left on device"):
            fit(
                every_step(tmp_path / "again", every_n_train_steps=4, on_error="retry", background=background)
            )
        assert refusing.left == 0
        assert "step=4.ckpt" not in checkpoints(tmp_path / "again")

    def test_callbacks_that_disagree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of those that share a file the strictest counts, and the foreground."""
        Full(monkeypatch, 4)
        lax = ModelCheckpoint(tmp_path / "lax", "{step}", every_n_train_steps=4, on_error="warn")
        strict = ModelCheckpoint(tmp_path / "strict", "{step}", every_n_train_steps=2, background=False)
        run = trainer(callbacks=[lax, strict])
        with pytest.raises(pl.StorageError, match="No space left on device"):
            run.fit(Wide(), batches())
        assert run.global_step == 4
        assert checkpoints(tmp_path) == ["step=2.ckpt"]


class TestASnapshotThatIsNotOneMoment:
    """Weights are changed by something else than a step while a save may still copy them."""

    def fit(
        self, directory: Path, change: Any, *callbacks: Any, **arguments: Any
    ) -> tuple[ModelCheckpoint, pl.Trainer]:
        """Save every second step; before step 7 change weights beside the third save, the first that copies late."""
        saves = ModelCheckpoint(
            directory, "{step}", monitor="loss", mode="max", save_top_k=-1, every_n_train_steps=2, **arguments
        )

        def changes(trainer: Any) -> None:
            assert held.held.wait(20)
            try:
                change(trainer)
            finally:
                held.open()

        class Changing(Wide):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.trainer.global_step == 6:
                    changes(self.trainer)
                return super().training_step(batch, batch_idx)

        with gate(3) as held:
            run = fit(saves, *callbacks, module=Changing, max_epochs=2)
        return saves, run

    @pytest.mark.parametrize("change", ["scaled", "loaded"])
    def test_is_thrown_away_and_saved_at_the_next_safe_point(self, change: str, tmp_path: Path) -> None:
        live = {}

        class Known(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
                if trainer.global_step == 7:
                    trainer.engine.wait()
                    live.update({name: value.clone() for name, value in pl_module.state_dict().items()})
                    live["loss"] = trainer.callback_metrics["loss"]

        with pytest.warns(UserWarning, match="changed while a checkpoint copied") as warned:
            saves, run = self.fit(tmp_path / "a", CHANGES[change], Known(), save_last=True)
        assert (len(warned), run.checkpoint_stats.discarded, run.checkpoint_stats.failed) == (1, 1, 0)
        steps = [2, 4, 7, 8, 10, 12, 14, 16]
        assert checkpoints(tmp_path / "a") == sorted(["last.ckpt", *(f"step={step}.ckpt" for step in steps)])
        path = tmp_path / "a" / "step=7.ckpt"
        assert [
            name for name, value in load(path)["state_dict"].items() if not torch.equal(value, live[name])
        ] == []
        assert saves.best_k_models[str(path)] == live["loss"]
        # It is a checkpoint like any other.
        resumed = trainer(callbacks=ModelCheckpoint(tmp_path / "b", monitor="loss", mode="max"), max_epochs=2)
        resumed.fit(Wide(), batches(), ckpt_path=path)
        ends = [one.lightning_module.state_dict() for one in (run, resumed)]
        assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []

    def test_beside_an_exception_it_is_saved_as_what_that_leaves(self, tmp_path: Path) -> None:
        def fails(run: Any) -> None:
            CHANGES["scaled"](run)
            raise RuntimeError("on purpose")

        with (
            pytest.warns(UserWarning, match="changed while a checkpoint copied"),
            pytest.raises(RuntimeError, match="on purpose"),
        ):
            self.fit(tmp_path, fails)
        assert checkpoints(tmp_path) == [f"step={step}.ckpt" for step in (2, 4, 6)]
        assert [catalog.read_summary(path).exact for path in sorted(tmp_path.iterdir())] == [
            True,
            True,
            False,
        ]

    def test_is_not_what_a_hook_of_an_epochs_end_makes_of_it(self, tmp_path: Path) -> None:
        """Before such a hook it is waited for what copies the weights."""

        class Scaling(Wide):
            def on_train_epoch_end(self) -> None:
                CHANGES["scaled"](self.trainer)

            def on_train_epoch_start(self) -> None:
                CHANGES["scaled"](self.trainer)

        runs = [
            fit(
                [
                    every_step(tmp_path / str(background), background=background),
                    ModelCheckpoint(tmp_path / f"epochs {background}", save_top_k=-1, background=background),
                ],
                module=Scaling,
                max_epochs=4,
            )
            for background in (True, False)
        ]
        assert [run.checkpoint_stats.discarded for run in runs] == [0, 0]
        for name in checkpoints(tmp_path / "True"):
            assert_same_tensors(tmp_path / "True" / name, tmp_path / "False" / name)
        for name in checkpoints(tmp_path / "epochs True"):
            assert_same_tensors(tmp_path / "epochs True" / name, tmp_path / "epochs False" / name)

    def test_is_not_what_validation_makes_of_it(self, tmp_path: Path) -> None:
        """Averages that are exchanged with the weights while validation runs."""

        class Validated(Wide):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", self.loss(batch))

        for background in (True, False):
            torch.manual_seed(3)
            saves = [
                every_step(tmp_path / str(background), background=background),
                ModelCheckpoint(tmp_path / f"best {background}", "{step}", "val_loss", background=background),
            ]
            run = trainer(
                callbacks=[EMAWeightAveraging(decay=0.5), *saves], max_epochs=2, val_check_interval=2
            )
            run.fit(Validated(), batches(), batches(1))
            assert run.checkpoint_stats.discarded == 0
        names = checkpoints(tmp_path / "True")
        assert len(names) == 16
        for name in names:
            assert_same_tensors(tmp_path / "True" / name, tmp_path / "False" / name)
        assert checkpoints(tmp_path / "best True") == checkpoints(tmp_path / "best False")


def _scale(run: pl.Trainer) -> None:
    with torch.no_grad():
        run.lightning_module.net[3].weight.mul_(0.5)


def _load(run: pl.Trainer) -> None:
    weights = run.lightning_module.state_dict()
    run.lightning_module.load_state_dict({name: 0.5 * value for name, value in weights.items()})


CHANGES = {"scaled": _scale, "loaded": _load}
