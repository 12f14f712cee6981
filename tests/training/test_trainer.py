"""Arguments, limits and the flow of fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tests.training.toys import Toy, checkpoints, rows, trainer


class Validated(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.validated_at: list[tuple[int, int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append((self.current_epoch, self.trainer.batch_idx))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"profiler": "fast"},
                "Trainer(profiler='fast'): expected one of 'simple', 'advanced', 'pytorch', or a Profiler.",
            ),
            ({"fast_dev_run": -1}, "Trainer(fast_dev_run=-1): expected True, False or a number of batches."),
            (
                {"reload_dataloaders_every_n_epochs": -1},
                "Trainer(reload_dataloaders_every_n_epochs=-1): expected an int of at least 0.",
            ),
            (
                {"gradient_clip_val": "x"},
                "Trainer(gradient_clip_val='x'): expected a number, found str.",
            ),
            (
                {"model_registry": "mine"},
                "Trainer(model_registry='mine') is not there. Upload checkpoints in a logger's "
                "after_save_checkpoint.",
            ),
            (
                {"limit_train_batches": 1.5},
                "Trainer(limit_train_batches=1.5): a fraction is at most 1.0; for a number of batches give an int.",
            ),
            (
                {"limit_val_batches": -1},
                "Trainer(limit_val_batches=-1): expected a number of batches, or a fraction between 0.0 and 1.0.",
            ),
            ({"max_steps": 1.5}, "Trainer(max_steps=1.5): expected an int of at least -1."),
            (
                {"accumulate_grad_batches": 0},
                "Trainer(accumulate_grad_batches=0): expected an int of at least 1.",
            ),
            (
                {"gradient_clip_algorithm": "median"},
                "Trainer(gradient_clip_algorithm='median'): expected 'norm' or 'value'.",
            ),
            (
                {"check_val_every_n_epoch": None, "val_check_interval": 0.5},
                "Trainer(check_val_every_n_epoch=None) counts batches across epochs: give val_check_interval as an int.",
            ),
            (
                {"callbacks": ["bar"]},
                "Trainer(callbacks=[...]): expected holdfast.Callback objects, found str.",
            ),
        ],
    )
    def test_each_is_refused_with_its_fix(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(**arguments)
        assert str(refused.value) == message

    def test_two_callbacks_with_one_state_key(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(callbacks=[EarlyStopping("a"), EarlyStopping("a")])
        assert str(refused.value) == (
            "Two callbacks have the state key \"EarlyStopping{'monitor': 'a', 'mode': 'min'}\", so a checkpoint could "
            "hold the state of one only. Give them different arguments, or override the property state_key."
        )

    def test_checkpointing_switched_off_and_asked_for(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            pl.Trainer(enable_checkpointing=False, callbacks=ModelCheckpoint(), max_epochs=1)
        assert str(refused.value) == (
            "Trainer(enable_checkpointing=False) contradicts the checkpoint callback among callbacks=. Leave one out."
        )

    def test_no_limit_at_all_is_said(self) -> None:
        from holdfast.utilities import rank_zero

        rank_zero._said.discard("max_epochs")
        with pytest.warns(UserWarning, match="training stops after 1000 epochs"):
            assert trainer(max_epochs=None).max_epochs == 1000

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (torch.nn.Linear(1, 1), "trainer.fit(model): expected a holdfast.LightningModule, found Linear."),
            (
                pl.LightningModule(),
                "LightningModule has no training_step. trainer.fit needs it: define training_step, which computes "
                "the loss.",
            ),
        ],
    )
    def test_what_fit_needs(self, model: Any, message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(model, rows())
        assert str(refused.value) == message


class TestLimits:
    @pytest.mark.parametrize(
        ("arguments", "steps", "epochs"),
        [
            ({"max_epochs": 2}, 6, 2),
            ({"max_steps": 4, "max_epochs": None}, 4, 2),
            ({"max_steps": 4, "max_epochs": 1}, 3, 1),
            ({"max_epochs": 2, "limit_train_batches": 2}, 4, 2),
            ({"max_epochs": 2, "limit_train_batches": 0.34}, 2, 2),
            ({"max_epochs": 0}, 0, 0),
            ({"limit_train_batches": 0}, 0, 0),
        ],
    )
    def test_steps_and_epochs(self, arguments: dict[str, Any], steps: int, epochs: int) -> None:
        run = trainer(**arguments)
        run.fit(Toy(), rows())
        assert (run.global_step, run.current_epoch) == (steps, epochs)
        assert run.state.finished

    def test_a_second_fit_trains_on(self) -> None:
        run, model = trainer(max_epochs=1), Toy()
        run.fit(model, rows())
        run.max_epochs = 3
        run.fit(model, rows())
        assert (run.global_step, run.current_epoch) == (9, 3)

    def test_stopping_early_waits_for_the_least(self) -> None:
        class Stops(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.trainer.should_stop = True
                return self.loss(batch)

        run = trainer(max_epochs=10, min_epochs=2)
        run.fit(Stops(), rows())
        assert run.current_epoch == 2
        run = trainer(max_epochs=10)
        run.fit(Stops(), rows())
        assert run.global_step == 1

    def test_the_rest_of_an_epoch_can_be_skipped(self) -> None:
        class Skips(Toy):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
                return -1 if batch_idx == 1 else None

        run = trainer(max_epochs=2)
        run.fit(Skips(), rows())
        assert (run.global_step, run.current_epoch) == (2, 2)

    def test_data_without_a_length(self) -> None:
        model, run = Validated(), trainer(max_epochs=2)
        run.fit(model, iter_rows(), rows())
        assert run.global_step == 6
        assert model.validated_at == [(0, 2), (1, 2)]

    def test_estimated_steps(self) -> None:
        class Cycle(Toy):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                self.total = self.trainer.estimated_stepping_batches
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        model = Cycle()
        trainer(max_epochs=3, accumulate_grad_batches=2).fit(model, rows())
        assert model.total == 6


def iter_rows() -> Any:
    class Stream:
        def __iter__(self) -> Any:
            return iter(rows())

    return Stream()


class TestValidationPlaces:
    @pytest.mark.parametrize(
        ("arguments", "places"),
        [
            ({}, [(0, 2), (1, 2)]),
            ({"val_check_interval": 2}, [(0, 1), (1, 1)]),
            ({"val_check_interval": 0.34}, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
            ({"check_val_every_n_epoch": 2}, [(1, 2)]),
            ({"check_val_every_n_epoch": None, "val_check_interval": 4}, [(1, 0)]),
            ({"limit_val_batches": 0}, []),
        ],
    )
    def test_of_each_setting(self, arguments: dict[str, Any], places: list[tuple[int, int]]) -> None:
        model = Validated()
        trainer(max_epochs=2, **arguments).fit(model, rows(), rows())
        assert model.validated_at == places

    def test_an_interval_longer_than_the_epoch_is_refused(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(val_check_interval=5).fit(Validated(), rows(), rows())
        assert str(refused.value) == (
            "Trainer(val_check_interval=5) is more than the 3 batches of an epoch. With check_val_every_n_epoch=None "
            "it counts batches across epochs."
        )

    def test_the_sanity_check_leaves_no_metric_behind(self) -> None:
        class Looks(Validated):
            def on_train_start(self) -> None:
                assert self.trainer.callback_metrics == {}

        run = trainer(num_sanity_val_steps=-1)
        run.fit(Looks(), rows(), rows())
        assert set(run.callback_metrics) == {"val_loss"}


class TestParts:
    def test_fast_dev_run_touches_everything_and_writes_nothing(self, tmp_path: Path) -> None:
        run = pl.Trainer(
            fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path
        )
        model = Validated()
        run.fit(model, rows(), rows())
        assert run.global_step == 1
        assert model.validated_at == [(0, 0)]
        assert list(tmp_path.iterdir()) == []

    def test_everything_goes_below_the_root(self, tmp_path: Path) -> None:
        run = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        run.fit(Toy(), rows())
        version = tmp_path / "lightning_logs" / "version_0"
        assert checkpoints(tmp_path) == ["epoch=1-step=6.ckpt"]
        assert (version / "checkpoints" / "epoch=1-step=6.ckpt").exists()
        assert (version / "hparams.yaml").read_text() == "lr: 0.1\nwidth: 1\n"
        assert run.log_dir == str(version)

    def test_a_datamodule_gives_loaders_and_batches(self) -> None:
        class Data(pl.LightningDataModule):
            calls: list[str]

            def __init__(self) -> None:
                super().__init__()
                self.calls = []

            def prepare_data(self) -> None:
                self.calls.append("prepare")

            def setup(self, stage: str) -> None:
                self.calls.append(stage)

            def train_dataloader(self) -> Any:
                return rows()

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return [batch[0], batch[1] + 100]

            def teardown(self, stage: str) -> None:
                self.calls.append(f"end of {stage}")

        data, model = Data(), Toy()
        trainer().fit(model, datamodule=data)
        assert data.calls == ["prepare", "fit", "end of fit"]
        assert model.seen == list(range(100, 112))

    def test_the_models_callbacks_replace_the_trainers_of_the_same_type(self) -> None:
        class Own(Toy):
            def configure_callbacks(self) -> Any:
                return EarlyStopping("b", check_on_train_epoch_end=True, strict=False)

        run = trainer(callbacks=[EarlyStopping("a")], enable_checkpointing=False)
        model = Own()
        model.log_zero = True
        run.callbacks = [c for c in run.callbacks if isinstance(c, EarlyStopping)]

        class Logs(Own):
            def on_train_epoch_end(self) -> None:
                self.log("b", 1.0)

        run.fit(Logs(), rows())
        assert [callback.monitor for callback in run.early_stopping_callbacks] == ["b"]

    def test_an_exception_is_told_to_everybody_and_raised(self) -> None:
        class Listens(Callback):
            def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
                self.heard = exception

        class Breaks(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                raise RuntimeError("no such luck")

        callback = Listens()
        run = trainer(callbacks=callback, enable_checkpointing=False)
        with pytest.raises(RuntimeError, match="no such luck") as raised:
            run.fit(Breaks(), rows())
        assert callback.heard is raised.value
        assert run.interrupted

    def test_a_copy_of_the_model_does_not_bring_the_trainer(self) -> None:
        import copy

        model, run = Toy(), trainer()
        run.fit(model, rows())
        with pytest.raises(RuntimeError, match="Toy is not attached to a `Trainer`"):
            _ = copy.deepcopy(model).trainer
