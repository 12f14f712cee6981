"""Profilers: what they are told in a run, what they report and where, and that none costs nothing."""

from __future__ import annotations

import pstats
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback
from holdfast.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from tests.training.toys import Toy, rows, trainer


class Busy(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch

    def on_train_start(self) -> None: ...

    def on_after_backward(self) -> None: ...


class Watches(Callback):
    def on_train_batch_start(self, *args: Any) -> None: ...


def weights(profiler: Any) -> tuple[torch.Tensor, pl.Trainer]:
    torch.manual_seed(1)
    model, run = Busy(), trainer(profiler=profiler, max_epochs=2, gradient_clip_val=1.0)
    run.fit(model, rows(shuffle=True), rows(4))
    return model.layer.weight.detach(), run


def text_of(capsys: pytest.CaptureFixture[str], start: str) -> str:
    return capsys.readouterr().err.partition(start)[2]


class TestSimple:
    def test_the_actions_of_a_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        run = trainer(profiler="simple", max_epochs=2, callbacks=[Watches()], num_sanity_val_steps=0)
        run.fit(Busy(), rows(8), rows(4))
        durations = run.profiler.recorded_durations
        counts = {action: len(seconds) for action, seconds in durations.items() if "Checkpoint" not in action}
        assert {
            "run_training_epoch": 2,
            "run_training_batch": 4,
            "save_checkpoint": 2,
            "[Strategy]SingleDeviceStrategy.training_step": 4,
            "[Strategy]SingleDeviceStrategy.backward": 4,
            "[Strategy]SingleDeviceStrategy.validation_step": 2,
            "[LightningModule]Busy.optimizer_step": 4,
            "[LightningModule]Busy.optimizer_zero_grad": 4,
            "[LightningModule]Busy.configure_optimizers": 1,
            "[LightningModule]Busy.on_train_start": 1,
            "[LightningModule]Busy.on_after_backward": 4,
            "[LightningModule]Busy.on_validation_model_eval": 2,
            "[Callback]Watches.on_train_batch_start": 4,
        }.items() <= counts.items()
        assert durations["[_TrainingEpochLoop].train_dataloader_next"]
        assert durations["[_EvaluationLoop].val_next"]
        assert all(seconds >= 0 for each in durations.values() for seconds in each)
        report = text_of(capsys, "FIT Profiler Report\n").splitlines()
        assert report[0].split() == [
            "Action",
            "|",
            "Mean",
            "(s)",
            "|",
            "Calls",
            "|",
            "Total",
            "(s)",
            "|",
            "Share",
        ]
        assert report[2].split("|")[0].strip() == "Total"
        assert len(report) == len(durations) + 3

    @pytest.mark.parametrize(
        ("verb", "actions"),
        [
            ("validate", ["[Strategy]SingleDeviceStrategy.validation_step", "[_EvaluationLoop].val_next"]),
            ("test", ["[Strategy]SingleDeviceStrategy.test_step", "[_EvaluationLoop].test_next"]),
            ("predict", ["[Strategy]SingleDeviceStrategy.predict_step", "[_PredictionLoop].predict_next"]),
        ],
    )
    def test_evaluation(self, verb: str, actions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        run = trainer(profiler=SimpleProfiler(extended=False))
        getattr(run, verb)(Busy(), rows(4))
        assert set(actions) <= set(run.profiler.recorded_durations)
        assert "Calls" not in text_of(capsys, f"{verb.upper()} Profiler Report\n")

    def test_into_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = trainer(profiler=SimpleProfiler(tmp_path / "deep", "times"))
        run.fit(Busy(), rows(4))
        run.test(Busy(), rows(4))
        assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [
            "fit-times.txt", "test-times.txt",
        ]  # fmt: skip
        assert (tmp_path / "deep" / "fit-times.txt").read_text().startswith("FIT Profiler Report\nAction")
        assert "Profiler Report" not in capsys.readouterr().err

    def test_actions_of_ones_own(self) -> None:
        profiler = SimpleProfiler()
        with profiler.profile("outer"), profiler.profile("inner"):
            pass
        assert list(profiler.recorded_durations) == ["inner", "outer"]
        with pytest.raises(ValueError) as refused:
            profiler.stop("outer")
        assert str(refused.value) == "The profiler was told to stop 'outer', which is not running."
        profiler.start("outer")
        with pytest.raises(ValueError) as refused:
            profiler.start("outer")
        assert str(refused.value) == "The profiler was told to start 'outer', which is running already."

    def test_an_action_that_raises_has_stopped(self) -> None:
        profiler = SimpleProfiler()
        with pytest.raises(RuntimeError), profiler.profile("falls"):
            raise RuntimeError
        assert profiler.current_actions == {}


class TestAdvanced:
    def test_functions_of_each_action(self, tmp_path: Path) -> None:
        profiler = AdvancedProfiler(tmp_path, "profile", line_count_restriction=5, dump_stats=True)
        run = trainer(profiler=profiler)
        run.fit(Busy(), rows(8))
        report = (tmp_path / "fit-profile.txt").read_text()
        assert "Profile of [Strategy]SingleDeviceStrategy.training_step\n" in report
        step = pstats.Stats(str(next(tmp_path.glob("*SingleDeviceStrategy.training_step.prof"))))
        found = {name: calls for (_, _, name), (calls, *_) in step.stats.items()}  # type: ignore[attr-defined]
        assert found["loss"] == 2
        (source,) = {file for file, _, name in step.stats if name == "loss"}  # type: ignore[attr-defined]
        assert Path(source).is_file(), "a viewer opens it"
        around = pstats.Stats(str(next(tmp_path.glob("*run_training_epoch.prof"))))
        found = {name: calls for (_, _, name), (calls, *_) in around.stats.items()}  # type: ignore[attr-defined]
        assert found["loss"] == 2, "what ran in an action inside counts for the one around it"

    def test_stopping_out_of_turn(self) -> None:
        profiler = AdvancedProfiler()
        profiler.start("one")
        with pytest.raises(ValueError) as refused:
            profiler.stop("two")
        profiler.teardown(None)
        assert str(refused.value) == "The profiler was told to stop 'two', which is not running."


class TestPyTorch:
    def test_operations_and_a_trace(self, tmp_path: Path) -> None:
        run = trainer(profiler=PyTorchProfiler(tmp_path, "ops", row_limit=-1))
        run.fit(Busy(), rows(8))
        report = (tmp_path / "fit-ops.txt").read_text()
        for name in ("aten::addmm", "[Strategy]SingleDeviceStrategy.training_step", "[Module]Linear"):
            assert name[:50] in report
        traces = list(tmp_path.glob("fit-ops-*.pt.trace.json"))
        assert len(traces) == 1
        assert '"aten::addmm"' in traces[0].read_text()
        assert run.profiler.profiler is None

    def test_a_run_that_is_over_before_its_schedule_begins(self, tmp_path: Path) -> None:
        profiler = PyTorchProfiler(tmp_path, schedule=torch.profiler.schedule(wait=100, warmup=1, active=1))
        run, model = trainer(profiler=profiler), Busy()
        message = (
            r"^PyTorchProfiler recorded nothing: the run was over before its schedule= came to a step that is "
            r"recorded\.$"
        )
        with pytest.warns(UserWarning, match=message):
            run.fit(model, rows(8))
        assert run.state.finished and list(tmp_path.iterdir()) == []

    def test_labels_for_a_gpu_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(pl.ConfigError) as refused:
            trainer(profiler=PyTorchProfiler(emit_nvtx=True)).fit(Busy(), rows(8))
        assert str(refused.value) == (
            "PyTorchProfiler(emit_nvtx=True) labels what a GPU does: torch sees none here."
        )

    def test_a_column_that_there_is_not(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            PyTorchProfiler(sort_by_key="speed")
        assert str(refused.value).startswith("PyTorchProfiler(sort_by_key='speed'): expected one of count, ")


class TestChoice:
    @pytest.mark.parametrize(
        ("given", "kind"),
        [
            (None, PassThroughProfiler),
            ("simple", SimpleProfiler),
            ("Advanced", AdvancedProfiler),
            ("pytorch", PyTorchProfiler),
        ],
    )
    def test_by_name(self, given: Any, kind: type[Profiler]) -> None:
        assert type(trainer(profiler=given).profiler) is kind

    @pytest.mark.parametrize("given", ["fast", 3])
    def test_what_there_is_not(self, given: Any) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(profiler=given)
        assert str(refused.value) == (
            f"Trainer(profiler={given!r}): expected one of 'simple', 'advanced', 'pytorch', or a Profiler."
        )

    @pytest.mark.parametrize("given", ["simple", "advanced", "pytorch"])
    def test_the_weights_are_those_without_one(self, given: str) -> None:
        assert torch.equal(weights(given)[0], weights(None)[0])

    def test_without_one_nothing_is_wrapped(self) -> None:
        class Looks(Busy):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                optimization = self.trainer.optimization
                assert optimization.training_step == self.training_step
                assert optimization.run.__func__ is type(optimization).run
                seen.append(batch_idx)

        seen: list[int] = []
        trainer().fit(Looks(), rows(8))
        assert seen == [0, 1]

    def test_one_of_ones_own(self) -> None:
        calls: list[tuple[str, str]] = []

        class Own(Profiler):
            def setup(self, stage: str, local_rank: Any = None, log_dir: Any = None) -> None:
                super().setup(stage, local_rank, log_dir)
                calls.append(("setup", stage))

            def start(self, action_name: str) -> None:
                calls.append(("start", action_name))

            def stop(self, action_name: str) -> None:
                calls.append(("stop", action_name))

            def summary(self) -> str:
                calls.append(("summary", ""))
                return ""

            def teardown(self, stage: str | None) -> None:
                calls.append(("teardown", str(stage)))

        class Uses(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                with self.trainer.profiler.profile("mine"):
                    return self.loss(batch)

        trainer(profiler=Own()).fit(Uses(), rows(4))
        assert calls[0] == ("setup", "fit")
        assert calls[-2:] == [("summary", ""), ("teardown", "fit")]
        at = calls.index(("start", "[Strategy]SingleDeviceStrategy.training_step"))
        assert calls[at + 1 : at + 4] == [
            ("start", "mine"),
            ("stop", "mine"),
            ("stop", "[Strategy]SingleDeviceStrategy.training_step"),
        ]
