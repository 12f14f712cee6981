"""What somebody meets who comes with code for Lightning: names, values, hooks and messages, end to end."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast import Callback, ConfigError, Trainer
from holdfast.callbacks import LambdaCallback, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from holdfast.errors import ArgumentError
from holdfast.loggers import Logger
from holdfast.trainer.states import RunningStage, TrainerFn
from tests.training.toys import Toy, rows, trainer


class Validated(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("v", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)


def message(expected: str) -> str:
    return f"^{re.escape(expected)}$"


class TestWhereARunIs:
    def test_stages_say_what_they_are(self) -> None:
        assert [stage.evaluating for stage in RunningStage] == [False, True, True, True, False]
        assert [stage.dataloader_prefix for stage in RunningStage] == [
            "train",
            "val",
            "val",
            "test",
            "predict",
        ]

    @pytest.mark.parametrize(
        ("request_", "flag", "fn"),
        [("fit", "training", TrainerFn.FITTING), ("validate", "validating", TrainerFn.VALIDATING)],
    )
    def test_setup_knows_it_already(self, request_: str, flag: str, fn: TrainerFn) -> None:
        seen: list[Any] = []

        class Asks(Callback):
            def setup(self, trainer: Any, pl_module: Any, stage: Any) -> None:
                seen.append((getattr(trainer, flag), stage is fn, stage == fn.value, f"{stage}"))

        getattr(trainer(callbacks=[Asks()]), request_)(Validated(), rows())
        assert seen == [(True, True, True, fn.value)]

    def test_setup_can_ask_for_the_number_of_steps(self) -> None:
        steps: list[Any] = []

        class Plans(Toy):
            def setup(self, stage: str) -> None:
                steps.append(self.trainer.estimated_stepping_batches)

        trainer(max_epochs=3, accumulate_grad_batches=2).fit(Plans(), rows())
        assert steps == [6]

    def test_a_setup_that_asks_goes_on_exactly(self, tmp_path: Path) -> None:
        class Plans(Toy):
            def setup(self, stage: str) -> None:
                self.steps = self.trainer.estimated_stepping_batches

        def run(name: str, **fit: Any) -> Tensor:
            torch.manual_seed(3)
            saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1)
            model = Plans()
            trainer(max_epochs=2, callbacks=[saver]).fit(model, rows(shuffle=True), **fit)
            return model.layer.weight.detach()

        whole = run("whole")
        for step in range(1, 6):
            epoch = (step - 1) // 3
            path = tmp_path / "whole" / f"epoch={epoch}-step={step}.ckpt"
            assert torch.equal(run(f"from-{step}", ckpt_path=path), whole)

    def test_a_trainer_shows_what_it_was_given(self) -> None:
        assert Trainer(fast_dev_run=True).fast_dev_run is True
        assert Trainer(max_epochs=1).fast_dev_run is False
        assert Trainer(max_epochs=1, num_sanity_val_steps=-1).num_sanity_val_steps == float("inf")
        assert Trainer(max_epochs=1).lightning_module is None
        given = Trainer(max_steps=1e3, max_epochs=np.int64(2), limit_train_batches=3.0)  # type: ignore[arg-type]
        assert [given.max_steps, given.max_epochs, given.limit_train_batches] == [1000, 2, 3]
        assert Trainer(max_epochs=1, max_steps=None).max_steps == -1  # type: ignore[arg-type]

    def test_ckpt_path_is_shown_as_it_was_given(self, tmp_path: Path) -> None:
        run = trainer()
        run.fit(Toy(), rows())
        path = tmp_path / "a.ckpt"
        run.save_checkpoint(path)
        run.validate(Validated(), rows(), ckpt_path=path)
        assert run.ckpt_path is path


class TestLogging:
    def test_numpy_values_are_numbers(self, tmp_path: Path) -> None:
        class Counts(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("mean", np.float32(batch_idx), on_step=True, on_epoch=True)
                self.log("sum", np.uint8(200), on_step=False, on_epoch=True, reduce_fx="sum")
                return super().training_step(batch, batch_idx)

        run = trainer()
        run.fit(Counts(), rows())
        metrics = {name: value.item() for name, value in run.callback_metrics.items()}
        assert metrics == {"mean": 1.0, "mean_step": 2.0, "mean_epoch": 1.0, "sum": 600.0}

    def test_values_of_a_validation_step_are_seen_at_once(self) -> None:
        seen: list[Any] = []

        def look(trainer: Any, *_: Any) -> None:
            seen.append((dict(trainer.progress_bar_metrics), set(trainer.logged_metrics)))

        hooks = LambdaCallback(on_validation_batch_end=look, on_validation_epoch_end=look)
        run = trainer(limit_val_batches=2, callbacks=[hooks])
        run.validate(Validated(), rows(), verbose=False)
        assert seen == [
            ({"v_step": 0.0}, {"v_step"}),
            ({"v_step": 1.0}, {"v_step"}),
            ({"v_step": 1.0, "v_epoch": 0.5}, {"v_step", "v_epoch"}),
        ]

    def test_a_logger_that_writes_in_save_loses_nothing(self) -> None:
        class Buffered(Logger):
            name = "buffered"  # type: ignore[assignment]
            version = 0  # type: ignore[assignment]

            def __init__(self) -> None:
                self.waiting: list[Any] = []
                self.written: list[Any] = []

            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                self.waiting.append(step)

            def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

            def save(self) -> None:
                self.written += self.waiting
                self.waiting = []

        class Logs(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("a", 1.0)
                return super().training_step(batch, batch_idx)

        logger = Buffered()
        trainer(log_every_n_steps=2, logger=logger).fit(Logs(), rows())
        assert (logger.written, logger.waiting) == ([1], [])

    def test_a_callback_can_write_what_others_go_by(self, tmp_path: Path) -> None:
        class Measures(Callback):
            def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                trainer.callback_metrics["cost"] = torch.tensor(2.0)
                trainer.callback_metrics.update(other=3.0)

        saver = ModelCheckpoint(tmp_path, filename="{cost:.0f}", monitor="cost")
        run = trainer(callbacks=[Measures(), saver])
        run.fit(Validated(), rows(), rows())
        assert (Path(saver.best_model_path).name, saver.best_model_score) == ("cost=2.ckpt", 2.0)
        kept = copy.deepcopy(run.callback_metrics)
        assert (type(kept), kept["cost"], kept["other"]) == (dict, 2.0, 3.0)

    def test_prediction_has_no_metrics(self) -> None:
        class Predicts(Toy):
            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("a", 1.0)

        with pytest.raises(
            ConfigError,
            match=message(
                "self.log('a', ...) cannot be called in predict_step: trainer.predict collects no metrics. "
                "Return the value with the prediction, or give it to self.logger.log_metrics."
            ),
        ):
            trainer().predict(Predicts(), rows())


class TestHooks:
    def test_what_a_model_keeps_of_validation_can_be_trained_with(self) -> None:
        class Caches(Toy):
            scale: Any = None

            def score(self, batch: Any) -> Tensor:
                if self.scale is None:
                    self.scale = torch.arange(1.0, 4.0) * 2
                return self.loss([batch[0] * self.scale])

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.score(batch)

            def validation_step(self, batch: Any, batch_idx: int) -> Any:
                self.score(batch)

        run = trainer()
        run.fit(Caches(), rows(), rows())
        assert run.global_step == 3

    @pytest.mark.parametrize("as_dict", [False, True])
    def test_hooks_get_a_batchs_share_of_its_window(self, as_dict: bool) -> None:
        losses: list[Tensor] = []
        shares: list[Tensor] = []

        class Accumulates(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                losses.append(loss.detach())
                return {"loss": loss} if as_dict else loss

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                shares.append(outputs["loss"])

        trainer(accumulate_grad_batches=4).fit(Accumulates(), rows())
        assert shares == [loss / 4 for loss in losses]

    def test_on_load_checkpoint_sees_all_of_the_file(self, tmp_path: Path) -> None:
        seen: list[int] = []

        class Looks(Validated):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                seen.append(len(checkpoint.pop("optimizer_states")))

        run = trainer()
        run.fit(Looks(), rows())
        run.save_checkpoint(tmp_path / "a.ckpt")
        run.validate(Looks(), rows(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        Looks.load_from_checkpoint(tmp_path / "a.ckpt")
        assert seen == [1, 1]


class TestMessages:
    @pytest.mark.parametrize(
        ("hook", "today"),
        [
            ("training_epoch_end", "on_train_epoch_end"),
            ("validation_epoch_end", "on_validation_epoch_end"),
            ("test_epoch_end", "on_test_epoch_end"),
        ],
    )
    def test_hooks_that_got_the_outputs_are_refused(self, hook: str, today: str) -> None:
        old = type("Old", (Validated,), {hook: lambda self, outputs: None})
        for request_ in ("fit", "validate"):
            with pytest.raises(
                ConfigError,
                match=message(
                    f"Old.{hook} is a hook of 1.x, which the trainer does not call: use {today}. What the steps "
                    "return is not collected: keep what you need of it in a list on self."
                ),
            ):
                getattr(trainer(), request_)(old(), rows())

    def test_other_hooks_of_1x_are_named(self) -> None:
        old = type("Old", (Toy,), {"on_epoch_end": lambda self: None})
        with pytest.warns(
            UserWarning,
            match=message(
                "Old.on_epoch_end is a hook of 1.x, which the trainer does not call: use on_train_epoch_end."
            ),
        ):
            trainer().fit(old(), rows())

    @pytest.mark.parametrize(
        ("argument", "rest"),
        [
            (
                "optimizer_idx",
                "was gone with Lightning 2.0: set self.automatic_optimization = False in __init__, and step each "
                "of self.optimizers() in training_step.",
            ),
            (
                "dataloader_iter",
                "is not there: a run that fetches batches by itself could not be resumed exactly. Take batch and "
                "batch_idx.",
            ),
        ],
    )
    def test_arguments_of_a_step_that_are_not_there(self, argument: str, rest: str) -> None:
        space: dict[str, Any] = {}
        exec(f"def training_step(self, batch, batch_idx, {argument}): ...", space)
        odd = type("Odd", (Toy,), {"training_step": space["training_step"]})
        with pytest.raises(ConfigError, match=message(f"Odd.training_step takes {argument}, which {rest}")):
            trainer().fit(odd(), rows())

    def test_a_scheduler_of_another_optimizer(self) -> None:
        class Mixed(Toy):
            def configure_optimizers(self) -> Any:
                other = torch.optim.SGD(self.parameters(), lr=0.1)
                schedule = torch.optim.lr_scheduler.StepLR(other, 1)
                return [torch.optim.SGD(self.parameters(), lr=0.1)], [schedule]

        with pytest.raises(
            ConfigError,
            match=message(
                "configure_optimizers returned a StepLR for an optimizer that it did not return, so it would "
                "change nothing. Make it with the optimizer that is returned."
            ),
        ):
            trainer().fit(Mixed(), rows())

    def test_half_a_validation_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer().fit(Validated(), rows())
        assert capsys.readouterr().err == (
            "Validated has a validation_step, but there is no validation data: nothing is validated\n"
        )
        with pytest.warns(
            UserWarning,
            match=message("There is validation data, but Toy has no validation_step: nothing is validated."),
        ):
            trainer().fit(Toy(), rows(), rows())

    def test_two_progress_bars(self) -> None:
        with pytest.raises(
            ConfigError,
            match=message(
                "Trainer(callbacks=[...]) holds 2 progress bars: TQDMProgressBar, RichProgressBar. Leave one of "
                "them."
            ),
        ):
            Trainer(max_epochs=1, callbacks=[TQDMProgressBar(), RichProgressBar()])

    def test_a_class_where_an_object_belongs(self) -> None:
        with pytest.raises(
            ArgumentError,
            match=message(
                "trainer.fit(model): expected a holdfast.LightningModule, found the class Toy: make an object of "
                "it, Toy(...)."
            ),
        ):
            trainer().fit(Toy, rows())  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError,
            match=message(
                "Trainer(callbacks=[...]): expected holdfast.Callback objects, found the class ModelCheckpoint: "
                "make an object of it, ModelCheckpoint(...)."
            ),
        ):
            Trainer(max_epochs=1, callbacks=[ModelCheckpoint])  # type: ignore[list-item]

    def test_an_object_of_lightnings_is_told_from_ours(self) -> None:
        theirs = pytest.importorskip("lightning.pytorch")

        class Forgotten(theirs.LightningModule):  # type: ignore[name-defined, misc]
            pass

        class Data(theirs.LightningDataModule):  # type: ignore[name-defined, misc]
            pass

        with pytest.raises(
            ArgumentError,
            match=message(
                "trainer.fit(model): expected a holdfast.LightningModule, found Forgotten, which is derived from "
                "lightning.pytorch.core.module.LightningModule: import that from holdfast."
            ),
        ):
            trainer().fit(Forgotten(), rows())
        with pytest.raises(
            ArgumentError,
            match=message(
                "trainer.fit(datamodule=...): expected a holdfast.LightningDataModule, found Data, which is "
                "derived from lightning.pytorch.core.datamodule.LightningDataModule: import that from holdfast."
            ),
        ):
            trainer().fit(Toy(), datamodule=Data())

    def test_a_datamodule_that_is_none(self) -> None:
        with pytest.raises(
            ArgumentError,
            match=message("trainer.fit(datamodule=...): expected a holdfast.LightningDataModule, found str."),
        ):
            trainer().fit(Toy(), datamodule="data")

    def test_hpc_says_what_to_use(self) -> None:
        with pytest.raises(
            ConfigError,
            match=message(
                'ckpt_path="hpc" is not there yet. ckpt_path="auto" goes on from the newest checkpoint of this '
                "run, also after a requeue."
            ),
        ):
            trainer().fit(Toy(), rows(), ckpt_path="hpc")

    def test_no_model_is_a_type_error_too(self) -> None:
        with pytest.raises(
            TypeError,
            match=message(
                "trainer.test(): there is no model. Give it one: only after fit it may be left out, and is that "
                "fit's."
            ),
        ):
            trainer().test()


def test_configurations_can_be_annotated_with_lightnings_names() -> None:
    from holdfast.utilities.types import LRSchedulerConfig, LRSchedulerConfigType, OptimizerLRSchedulerConfig

    class Annotated(Toy):
        def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return OptimizerLRSchedulerConfig(
                optimizer=optimizer,
                lr_scheduler=LRSchedulerConfigType(scheduler=schedule, interval="step", name="lr"),
            )

    run = trainer()
    run.fit(Annotated(), rows())
    (config,) = run.lr_scheduler_configs
    assert isinstance(config, LRSchedulerConfig)
    assert [config.interval, config.frequency, config.name, config.scheduler.last_epoch] == [
        "step",
        1,
        "lr",
        3,
    ]
