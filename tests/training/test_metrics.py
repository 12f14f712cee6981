"""self.log: what callbacks, loggers and the progress bar see of it, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import holdfast as pl
from holdfast.training.results import Results
from tests.training.toys import Toy, rows, trainer


class Logging(Toy):
    """Logs the batch's index, and whatever ``arguments`` say."""

    def __init__(self, **arguments: Any) -> None:
        pl.LightningModule.__init__(self)
        self.layer = torch.nn.Linear(3, 1)
        self.seen = []
        self.arguments = arguments

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("value", float(batch_idx), **self.arguments)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def logged(model: pl.LightningModule, **arguments: Any) -> dict[str, float]:
    run = trainer(**arguments)
    run.fit(model, rows(count=10))
    return {name: value.item() for name, value in run.callback_metrics.items()}


class TestViews:
    def test_on_step_by_default(self) -> None:
        assert logged(Logging()) == {"value": 2.0}

    def test_the_mean_over_the_epoch_is_weighted_by_the_batch_size(self) -> None:
        # Batches of 4, 4 and 2 rows with the values 0, 1 and 2.
        assert logged(Logging(on_step=False, on_epoch=True)) == {"value": pytest.approx(0.8)}
        assert logged(Logging(on_step=False, on_epoch=True, batch_size=1)) == {"value": pytest.approx(1.0)}

    def test_step_and_epoch_have_names_of_their_own(self) -> None:
        assert logged(Logging(on_step=True, on_epoch=True)) == {
            "value": pytest.approx(0.8),
            "value_step": 2.0,
            "value_epoch": pytest.approx(0.8),
        }

    @pytest.mark.parametrize(("reduce_fx", "expected"), [("sum", 3), ("min", 0), ("max", 2), (torch.max, 2)])
    def test_reductions(self, reduce_fx: Any, expected: float) -> None:
        assert logged(Logging(on_step=False, on_epoch=True, reduce_fx=reduce_fx)) == {"value": expected}

    def test_the_progress_bar_shows_what_it_was_given(self) -> None:
        run = trainer()
        run.fit(Logging(prog_bar=True), rows())
        assert run.progress_bar_metrics == {"value": 2.0}
        assert run.logged_metrics == {"value": torch.tensor(2.0)}

    def test_a_logged_buffer_is_copied(self) -> None:
        class Buffer(Toy):
            def on_train_start(self) -> None:
                self.count = torch.zeros(())

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.count.add_(1)
                if batch_idx == 0:
                    self.log("count", self.count)
                return self.loss(batch)

        assert logged(Buffer()) == {"count": 1.0}

    def test_half_precision_is_added_up_in_full(self) -> None:
        class Half(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("value", torch.tensor(1 / 3, dtype=torch.bfloat16), on_step=False, on_epoch=True)
                return self.loss(batch)

        run = trainer()
        run.fit(Half(), rows(count=3000, batch_size=1))
        assert run.callback_metrics["value"].dtype == torch.float32
        assert run.callback_metrics["value"].item() == pytest.approx(0.333984375, abs=1e-6)

    def test_a_torchmetrics_object_is_reset_with_its_epoch(self) -> None:
        torchmetrics = pytest.importorskip("torchmetrics")

        class Measured(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.mean = torchmetrics.MeanMetric()

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.mean(float(batch_idx + 10 * self.current_epoch))
                self.log("mean", self.mean, on_step=False, on_epoch=True)
                return self.loss(batch)

        assert logged(Measured(), max_epochs=2) == {"mean": 11.0}

    @pytest.mark.parametrize(
        ("arguments", "expected", "warnings"),
        [
            ({"on_epoch": True}, {"mean": 1.0, "mean_epoch": 1.0}, []),
            (
                {},
                {},
                [
                    "self.log('mean', metric): the metric was given its values by update(), so there is none of "
                    "this step. Log it with on_epoch=True, or call the metric instead."
                ],
            ),
        ],
    )
    def test_a_torchmetrics_object_that_is_updated_is_not_computed_at_every_step(
        self, arguments: dict[str, Any], expected: dict[str, float], warnings: list[str], recwarn: Any
    ) -> None:
        torchmetrics = pytest.importorskip("torchmetrics")
        computed: list[int] = []

        class Mean(torchmetrics.MeanMetric):  # type: ignore[misc, name-defined]
            def compute(self) -> Tensor:
                computed.append(1)
                return super().compute()

        class Measured(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.mean = Mean()

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.mean.update(float(batch_idx))
                self.log("mean", self.mean, **arguments)
                return self.loss(batch)

        assert logged(Measured()) == expected
        assert len(computed) == len(expected) // 2
        assert [str(one.message) for one in recwarn] == warnings

    def test_whole_numbers_and_truth_are_seen_as_floating_numbers(self, tmp_path: Path) -> None:
        class Kinds(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                kinds = {"yes": True, "int": 2, "double": torch.tensor(0.5, dtype=torch.float64)}
                self.log_dict({name: torch.as_tensor(value) for name, value in kinds.items()})
                return self.loss(batch)

        run = trainer(logger=pl.loggers.CSVLogger(tmp_path, name="", version=""), log_every_n_steps=3)
        run.fit(Kinds(), rows())
        assert {name: value.dtype for name, value in run.callback_metrics.items()} == {
            "yes": torch.float32,
            "int": torch.float32,
            "double": torch.float64,
        }
        header, row = (tmp_path / "metrics.csv").read_text().splitlines()
        assert dict(zip(header.split(","), row.split(","), strict=True)) == {
            "yes": "1.0", "int": "2.0", "double": "0.5", "epoch": "0", "step": "2",
        }  # fmt: skip

    def test_log_dict_and_versions_that_tell_new_values_from_old(self) -> None:
        versions = []

        class Many(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log_dict({"a": 1.0, "b": self.loss(batch)}, on_step=False, on_epoch=True)
                return self.loss(batch)

            def on_train_epoch_start(self) -> None:
                versions.append(self.trainer.metric_versions.get("a", 0))

        assert set(logged(Many(), max_epochs=3)) == {"a", "b"}
        assert versions == [0, 1, 2]


class TestBeforeTheFirstBatch:
    def test_what_is_logged_when_training_starts_is_there_from_then_on(self) -> None:
        seen: list[Any] = []

        class Starts(Toy):
            def on_train_start(self) -> None:
                self.log("size", 5.0, prog_bar=True)
                self.log("hidden", 6.0, logger=False)

            def on_train_epoch_start(self) -> None:
                run = self.trainer
                seen.append((dict(run.callback_metrics), dict(run.logged_metrics), run.progress_bar_metrics))
                seen.append(run.metric_versions)

        run = trainer()
        run.fit(Starts(), rows())
        # Nothing is new about them before the epoch ends: a value is ranked once.
        assert seen == [({"size": 5.0, "hidden": 6.0}, {"size": 5.0}, {"size": 5.0}), {}]
        assert run.callback_metrics == {"size": 5.0, "hidden": 6.0}
        assert run.metric_versions == {"size": 1, "hidden": 1}

    def test_a_resume_counts_them_once(self, tmp_path: Path) -> None:
        class Starts(Toy):
            def on_train_start(self) -> None:
                self.log("size", 5.0, reduce_fx="sum")

        saves = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2)
        trainer(callbacks=[saves]).fit(Starts(), rows())
        run = trainer(callbacks=[saves])
        run.fit(Starts(), rows(), ckpt_path=tmp_path / "epoch=0-step=2.ckpt")
        assert run.callback_metrics == {"size": 5.0}

    def test_the_sanity_check_shows_its_values_until_it_ends(self) -> None:
        seen: list[Any] = []

        class Asks(pl.Callback):
            def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
                seen.append(
                    (set(trainer.callback_metrics), set(trainer.logged_metrics), trainer.progress_bar_metrics)
                )

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                views = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
                seen.append((*views, trainer.metric_versions))

        class Validated(Toy):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("v", 1.0, prog_bar=True, on_step=True, on_epoch=True)

        trainer(callbacks=[Asks()]).fit(Validated(), rows(), rows())
        both = {"v_step": 1.0, "v_epoch": 1.0}
        assert seen == [({"v", "v_epoch"}, set(both), both), ({}, {}, {}, {})]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"on_step": False, "on_epoch": False},
                "self.log('value', on_step=False, on_epoch=False) would log nothing.",
            ),
            (
                {"reduce_fx": "median"},
                "self.log('value', reduce_fx='median'): expected 'mean', 'sum', 'min' or 'max'. "
                "For anything else log a TorchMetrics object.",
            ),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            logged(Logging(**arguments))
        assert str(refused.value) == message

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                "high",
                "self.log('value', value): expected a number, a tensor of one element or a TorchMetrics object, "
                "found str.",
            ),
            (
                torch.zeros(2, 3),
                "self.log('value', value): value must be a single number, found a tensor of shape (2, 3). "
                "Reduce it first, for example value.mean().",
            ),
        ],
    )
    def test_values(self, value: Any, message: str) -> None:
        class Wrong(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.log("value", value)
                return self.loss(batch)

        with pytest.raises(pl.ConfigError) as refused:
            logged(Wrong())
        assert str(refused.value) == message

    def test_places(self) -> None:
        class Early(Toy):
            def on_fit_start(self) -> None:
                self.log("value", 1.0)

        with pytest.raises(pl.ConfigError) as refused:
            logged(Early())
        assert str(refused.value) == (
            "self.log('value', ...) cannot be called in on_fit_start. "
            "Call it in a step, or in a hook of a batch or an epoch."
        )

    def test_other_arguments_at_a_later_call(self) -> None:
        class Changing(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.log("value", 1.0, prog_bar=batch_idx == 1)
                return self.loss(batch)

        with pytest.raises(pl.ConfigError) as refused:
            logged(Changing())
        assert str(refused.value) == (
            "self.log('value', ...) was called in training_step with other arguments than before. "
            "Give one name the same arguments at every call."
        )

    def test_without_a_trainer_the_value_is_dropped_and_that_is_said(self) -> None:
        from holdfast.utilities import rank_zero

        rank_zero._said.discard("log without trainer")
        with pytest.warns(UserWarning, match="was called outside of a Trainer's run; the value is not kept"):
            Toy().log("value", 1.0)


def test_accumulators_go_on_from_their_state() -> None:
    whole, first = Results(training=True), Results(training=True)
    asked = (False, None, False, True, "mean", True)
    for results in (whole, first):
        results.fx = "training_step"
    for index in range(6):
        whole.log("a", torch.tensor(index / 7), asked, 3)
        if index < 4:
            first.log("a", torch.tensor(index / 7), asked, 3)
    second = Results(training=True)
    second.load_state_dict(first.state_dict({}), torch.device("cpu"), {})
    second.fx = "training_step"
    for index in range(4, 6):
        second.log("a", torch.tensor(index / 7), asked, 3)
    values = [results.epoch_metrics(lambda entry: True)["a"] for results in (whole, second)]
    assert torch.equal(values[0], values[1])


def test_a_callback_logs_by_itself() -> None:
    class Logging(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            self.log("a", 1.0)

        def on_train_epoch_end(self, *args: Any) -> None:
            self.log_dict({"b": 2.0})

    run = trainer(callbacks=[Logging()], enable_checkpointing=False)
    run.fit(Toy(), rows())
    assert run.callback_metrics == {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}


def test_one_name_for_two_loaders_is_refused() -> None:
    class Same(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("v", float(dataloader_idx), add_dataloader_idx=False)

    with pytest.raises(pl.ConfigError) as refused:
        trainer().validate(Same(), [rows(), rows()])
    assert str(refused.value) == (
        "self.log('v', add_dataloader_idx=False) was called for several loaders, whose values would hide each "
        "other. Leave add_dataloader_idx out, or give each loader's value a name."
    )
