"""validate, test and predict: what they return, what they load, and that they leave training as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.callbacks.prediction_writer import BasePredictionWriter
from tests.training.toys import Toy, rows, trainer


class Evaluated(Toy):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("rows", float(len(batch[0])), reduce_fx="sum")

    def test_step(self, batch: Any) -> None:
        self.log("mean_id", batch[1].float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[1].tolist()


def test_one_loader() -> None:
    assert trainer().validate(Evaluated(), rows(), verbose=False) == [{"rows": 12.0}]
    assert trainer().test(Evaluated(), rows(), verbose=False) == [{"mean_id": 5.5}]


def test_several_loaders_have_names_of_their_own() -> None:
    assert trainer().validate(Evaluated(), [rows(), rows(count=8)], verbose=False) == [
        {"rows/dataloader_idx_0": 12.0},
        {"rows/dataloader_idx_1": 8.0},
    ]


def test_predictions() -> None:
    run = trainer()
    expected = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert run.predict(Evaluated(), rows(count=8)) == expected
    assert run.predictions == expected
    assert run.predict(Evaluated(), [rows(count=4), rows(count=8)]) == [[[0, 1, 2, 3]], expected]
    assert run.predict(Evaluated(), rows(), return_predictions=False) is None


def test_a_writer_gets_the_rows_of_each_batch() -> None:
    written: list[Any] = []

    class Writer(BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *others: Any
        ) -> None:
            written.append((prediction, batch_indices))

        def write_on_epoch_end(
            self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
        ) -> None:
            written.append((list(predictions), [list(rows) for rows in batch_indices]))

    for workers in (0, 2):
        written.clear()
        run = trainer(callbacks=Writer("batch_and_epoch"))
        loader = rows(count=5, batch_size=2, shuffle=True, num_workers=workers, drop_last=True)
        run.predict(Evaluated(), loader, return_predictions=False)
        assert sorted(row for _, indices in written[:-1] for row in indices) == [0, 1, 2, 3, 4]
        assert all(prediction == indices for prediction, indices in written[:-1])
        everything = [prediction for prediction, _ in written[:-1]]
        assert written[-1] == (everything, [everything])
        assert run.predict_loop.current_batch_indices == everything[-1]
        assert run.predict_loop.predictions == []


def test_data_without_rows_has_no_indices() -> None:
    class Writer(BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *others: Any
        ) -> None:
            assert batch_indices == []

    batches = [(torch.zeros(1, 3), torch.tensor([7])), (torch.zeros(1, 3), torch.tensor([8]))]
    assert trainer(callbacks=Writer()).predict(Evaluated(), batches) == [[7], [8]]


def test_predictions_are_there_when_the_epoch_ends() -> None:
    seen: list[Any] = []

    class Looking(pl.Callback):
        def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen.append(trainer.predict_loop.predictions)

    class Silent(Evaluated):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return None if batch_idx else batch[1].tolist()

    run = trainer(callbacks=Looking())
    assert run.predict(Silent(), rows(8)) == [[0, 1, 2, 3], None]
    assert run.predict(Silent(), {"a": rows(4), "b": rows(8)}) == [[[0, 1, 2, 3]], [[0, 1, 2, 3], None]]
    assert seen == [[[0, 1, 2, 3], None], [[[0, 1, 2, 3]], [[0, 1, 2, 3], None]]]


def test_hooks_and_steps_take_what_they_name() -> None:
    called: list[Any] = []

    class Few(Toy):
        def validation_step(self, batch: Any) -> None: ...
        def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
            called.append(batch_idx)

    class Insisting(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            called.append((batch_idx, dataloader_idx))

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, *rest: Any) -> None:
            called.append(rest)

    trainer().validate(Few(), rows(8), verbose=False)
    trainer().validate(Few(), [rows(4), rows(4)], verbose=False)
    assert called == [0, 1, 0, 0]
    called.clear()
    trainer().validate(Insisting(), rows(4), verbose=False)
    trainer().validate(Insisting(), [rows(4), rows(4)], verbose=False)
    assert called == [(0, 0), (), (0, 0), (0,), (0, 1), (1,)]


@pytest.mark.parametrize("loaders", [rows(0), [rows(0), rows(0)]])
def test_nothing_happens_without_a_batch(loaders: Any) -> None:
    class Refusing(Evaluated):
        def on_validation_start(self) -> None:
            raise AssertionError

        on_predict_start = on_validation_start

    assert trainer().validate(Refusing(), loaders, verbose=False) == []
    assert trainer().predict(Refusing(), loaders) == []
    assert trainer(limit_val_batches=0).validate(Refusing(), rows(), verbose=False) == []


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    trainer().validate(Evaluated(), [rows(), rows(count=8)])
    assert capsys.readouterr().out == (
        "validate  rows/dataloader_idx_0  12  \nvalidate  rows/dataloader_idx_1    8\n"
    )


@pytest.mark.parametrize(("limit", "rows_seen"), [(1, 4.0), (0.7, 8.0), (1.0, 12.0), (50, 12.0)])
def test_limits(limit: float, rows_seen: float) -> None:
    assert trainer(limit_val_batches=limit).validate(Evaluated(), rows(), verbose=False) == [
        {"rows": rows_seen}
    ]


def test_a_fraction_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(pl.ConfigError) as refused:
        trainer(limit_val_batches=0.1).validate(Evaluated(), rows(), verbose=False)
    assert str(refused.value) == (
        "Trainer(limit_val_batches=0.1) leaves 0 of 3 batches. The least that keeps one is 0.333."
    )


def test_after_fit_without_a_model_the_best_weights_are_tested(tmp_path: Path) -> None:
    class Growing(Toy):
        """Its weight is the number of steps done, and the first epoch's is called the best."""

        def __init__(self) -> None:
            super().__init__()
            torch.nn.init.zeros_(self.layer.weight)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return -self.layer.weight.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_train_epoch_end(self) -> None:
            self.log("score", float(self.current_epoch))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("weight", self.layer.weight.mean())

    run = trainer(max_epochs=2, callbacks=ModelCheckpoint(tmp_path, monitor="score"))
    model = Growing()
    run.fit(model, rows())
    assert run.test(model, rows(), verbose=False) == [{"weight": 6.0}]
    assert run.test(dataloaders=rows(), verbose=False) == [{"weight": 3.0}]
    assert run.test(model, rows(), ckpt_path=run.checkpoint_callback.best_model_path, verbose=False) == [
        {"weight": 3.0}
    ]


def test_validation_inside_fit_leaves_modes_gradients_and_generators_alone() -> None:
    class Watching(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout()
            self.frozen = torch.nn.BatchNorm1d(3).eval()
            self.draws: list[float] = []
            self.modes: list[tuple[bool, bool]] = []

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert not self.drop.training
            assert not torch.is_grad_enabled()
            torch.rand(100)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.modes.append((self.drop.training, self.frozen.training))
            self.draws.append(torch.rand(()).item())
            return self.loss(batch)

    draws = []
    for limit in (0, 1.0):
        torch.manual_seed(0)
        model = Watching()
        trainer(limit_val_batches=limit, val_check_interval=1, max_epochs=2).fit(
            model, rows(), rows(shuffle=True)
        )
        assert model.modes == [(True, False)] * 6
        draws.append(model.draws)
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer().validate(Toy(), rows()), "Toy has no validation_step. trainer.validate needs it."),
        (
            lambda: trainer().test(Evaluated()),
            "There is no data for trainer.test: give dataloaders=, a datamodule, or define Evaluated.test_dataloader.",
        ),
        (
            lambda: trainer().test(),
            "trainer.test(): there is no model. Give it one: only after fit it may be left out, and is that fit's.",
        ),
    ],
)
def test_what_is_missing_is_named(call: Any, message: str) -> None:
    with pytest.raises(pl.ConfigError) as refused:
        call()
    assert str(refused.value) == message


def test_torchmetrics_objects_begin_anew_in_each_validation() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    counts = []

    class Counting(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.count = torchmetrics.SumMetric()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.count.update(len(batch[0]))
            self.log("count", self.count)

        def on_validation_end(self) -> None:
            counts.append(self.trainer.callback_metrics["count"].item())

    trainer(max_epochs=3).fit(Counting(), rows(), rows())
    assert counts == [8.0, 12.0, 12.0, 12.0]


def test_values_of_each_batch_count_by_loader() -> None:
    from holdfast.loggers import Logger

    class Kept(Logger):
        name = version = "kept"

        def __init__(self) -> None:
            self.rows: list[Any] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None: ...

    class Each(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("id", batch[1][0].float(), on_step=True, on_epoch=False)

    logger = Kept()
    trainer(logger=logger, max_epochs=2, num_sanity_val_steps=0).fit(Each(), rows(), [rows(8), rows(8)])
    names = [f"id/dataloader_idx_{index}" for index in (0, 0, 1, 1)]
    expected = [
        (step, {name: value}) for step, name, value in zip([0, 1, 0, 1], names, [0.0, 4.0] * 2, strict=True)
    ]
    assert logger.rows == [*expected, *((step + 2, values) for step, values in expected)]


class Inferring(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.inference = torch.is_inference_mode_enabled()


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_inside_fit_makes_no_inference_tensors(sanity: int) -> None:
    model = Inferring()
    trainer(num_sanity_val_steps=sanity).fit(model, rows(), rows())
    assert model.inference is False


def test_what_validation_made_first_can_be_trained_with() -> None:
    class Cached(Inferring):
        table: Any = None

        def loss(self, batch: Any) -> Any:
            if self.table is None:
                self.table = torch.full((1,), 2.0)
            return (self.layer(batch[0]) * self.table).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    trainer().fit(Cached(), rows(), rows())


def test_validation_inside_fit_may_take_gradients() -> None:
    class Forces(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                self.log("force", torch.autograd.grad(self.layer(x).sum(), x)[0].norm())

    trainer().fit(Forces(), rows(), rows())
