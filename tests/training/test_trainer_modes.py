"""Ways to run that a single argument of `Trainer` switches on, and what a trainer answers about itself."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback, GradientAccumulationScheduler, OnExceptionCheckpoint, Timer
from holdfast.loggers import CSVLogger
from tests.training.toys import Toy, checkpoints, rows, trainer


class TestBarebones:
    def test_leaves_everything_out_but_the_steps(self, tmp_path: Path) -> None:
        run = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
        assert (run.callbacks, run.loggers, run.num_sanity_val_steps, run.log_every_n_steps) == ([], [], 0, 0)
        model = Toy()
        run.fit(model, rows())
        assert len(model.seen) == 12
        assert list(tmp_path.iterdir()) == []

    def test_what_is_logged_is_not_kept_and_that_is_said_once(self) -> None:
        class Logging(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("loss", self.loss(batch))
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", self.loss(batch))

        from holdfast.utilities import rank_zero

        rank_zero._said.discard(("not logged", True))
        run = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
        with pytest.warns(UserWarning, match="barebones") as caught:
            run.fit(Logging(), rows(), rows())
        assert [str(one.message) for one in caught] == [
            "self.log('loss', ...) was called under Trainer(barebones=True); the value is not kept."
        ]
        assert run.callback_metrics == {}

    @pytest.mark.parametrize(
        "asked", ["logger", "enable_checkpointing", "fast_dev_run", "profiler", "detect_anomaly"]
    )
    def test_refuses_what_it_leaves_out(self, asked: str) -> None:
        value = "simple" if asked == "profiler" else True
        with pytest.raises(pl.ConfigError) as refused:
            pl.Trainer(barebones=True, max_epochs=1, **{asked: value})
        assert str(refused.value) == (
            f"Trainer(barebones=True, {asked}={value!r}): barebones leaves that out, to show what a step costs "
            "without anything. Leave one of the two out."
        )


class TestMaxTime:
    @pytest.mark.parametrize(
        "given", ["00:00:00:00", timedelta(0), {"seconds": 0}], ids=["text", "delta", "dict"]
    )
    def test_ends_the_run_in_any_spelling(self, given: Any) -> None:
        run = trainer(max_time=given, max_epochs=50)
        run.fit(Toy(), rows())
        assert run.state.finished
        assert run.global_step < 150

    def test_is_the_only_limit_where_no_other_is_given(self) -> None:
        run = trainer(max_time="00:00:00:00", max_epochs=None)
        assert run.max_epochs is None
        run.fit(Toy(), rows())
        assert run.state.finished

    def test_what_is_no_time_is_refused_by_its_own_name(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(max_time="an hour")
        assert str(refused.value) == (
            "Trainer(max_time='an hour'): expected a time as 'DD:HH:MM:SS', such as '00:12:00:00' for twelve "
            "hours, a datetime.timedelta, or a dict of its arguments such as {'hours': 12}."
        )

    def test_a_timer_among_the_callbacks_wins(self) -> None:
        timer = Timer("00:00:01:00")
        with pytest.warns(UserWarning, match="max_time") as caught:
            run = trainer(max_time="00:00:00:00", callbacks=[timer])
        assert [str(one.message) for one in caught] == [
            "Trainer(max_time=...) is left out: the Timer among callbacks= says how long."
        ]
        assert [one for one in run.callbacks if isinstance(one, Timer)] == [timer]


def test_steps_are_estimated_under_a_schedule_of_accumulation() -> None:
    class Estimating(Toy):
        def configure_optimizers(self) -> Any:
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    model = Estimating()
    run = trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})])
    run.fit(model, rows())
    assert model.estimate == run.global_step == 3 + 2 + 2


def test_saving_on_exceptions_alone_does_not_stop_saving(tmp_path: Path) -> None:
    run = trainer(callbacks=[OnExceptionCheckpoint(tmp_path)], default_root_dir=tmp_path)
    run.fit(Toy(), rows())
    assert checkpoints(tmp_path) == ["epoch=0-step=3.ckpt"]
    assert run.checkpoint_callback.best_model_path.endswith("epoch=0-step=3.ckpt")


def test_no_steps_are_logged_with_log_every_n_steps_0(tmp_path: Path) -> None:
    class Logging(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.loss(batch), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=0)
    run.fit(Logging(), rows())
    header, *lines = (Path(str(run.log_dir)) / "metrics.csv").read_text().splitlines()
    assert "loss_epoch" in header
    assert "loss_step" not in header
    assert len(lines) == 1


class TestWhatIsFit:
    def test_a_compiled_module_is_the_module(self, tmp_path: Path) -> None:
        calls: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            calls.append(len(inputs))
            return graph.forward

        class Forward(Toy):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x)

            def loss(self, batch: Any) -> torch.Tensor:
                return self(batch[0]).square().mean()

        torch.manual_seed(3)
        plain = Forward()
        trainer().fit(plain, rows())
        torch.manual_seed(3)
        module = Forward()
        run = trainer()
        run.fit(torch.compile(module, backend=backend), rows())
        assert run.lightning_module is module
        assert calls != []
        run.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt")["state_dict"]
        assert saved.keys() == plain.state_dict().keys()
        assert all(torch.equal(saved[name], value) for name, value in plain.state_dict().items())

    @pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
    def test_anything_else_is_a_type_error(self, method: str) -> None:
        with pytest.raises(TypeError) as refused:
            getattr(trainer(), method)(torch.nn.Linear(1, 1), rows())
        assert str(refused.value) == (
            f"trainer.{method}(model): expected a holdfast.LightningModule, found Linear."
        )

    def test_a_datamodule_and_loaders(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(Toy(), rows(), datamodule=pl.LightningDataModule())
        assert str(refused.value) == (
            "trainer.fit was given a datamodule and loaders as well. Leave out one of the two."
        )

    def test_the_old_name_of_configure_model(self) -> None:
        class Sharded(Toy):
            def configure_sharded_model(self) -> None:
                self.built = True

        model = Sharded()
        with pytest.warns(DeprecationWarning, match="old name") as caught:
            trainer().fit(model, rows())
        assert model.built
        assert [str(one.message) for one in caught] == [
            "Sharded.configure_sharded_model is the old name of configure_model: rename it."
        ]


class TestWhatATrainerTells:
    def test_the_logger_can_be_replaced(self, tmp_path: Path) -> None:
        run = trainer()
        assert run.logger is None
        run.logger = logger = CSVLogger(tmp_path)
        assert run.loggers == [logger]
        run.logger = None
        assert run.loggers == []

    def test_the_last_batch(self) -> None:
        class Watching(Callback):
            def __init__(self) -> None:
                self.last: list[bool] = []

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                self.last.append(trainer.is_last_batch)

        watching = Watching()
        trainer(callbacks=[watching]).fit(Toy(), rows())
        assert watching.last == [False, False, True]

    def test_print_is_once_per_job(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer().print("hello", "there", sep="-")
        assert capsys.readouterr().out == "hello-there\n"

    def test_init_module_builds_in_the_runs_number_format(self) -> None:
        run = trainer(precision="64-true")
        with run.init_module(empty_init=True):
            layer = torch.nn.Linear(3, 1)
        assert layer.weight.dtype is torch.float64
        assert torch.nn.Linear(3, 1).weight.dtype is torch.float32
