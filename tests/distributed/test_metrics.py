"""TorchMetrics objects in several processes: they sync themselves, where every rank computes them."""

from __future__ import annotations

from typing import Any

import pytest

import holdfast as pl
from holdfast.callbacks import Callback

from .ranks import run_ranks
from .test_logging import Net, loader, make_trainer, numbers

torchmetrics = pytest.importorskip("torchmetrics")


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.cat = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection(
            {"least": torchmetrics.MinMetric(), "most": torchmetrics.MaxMetric()}
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rows = batch[0].squeeze(1)
        self.mean.update(rows)
        self.both.update(rows)
        self.log("mean", self.mean)
        self.log_dict(self.both)
        self.cat.update(rows)

    def on_validation_epoch_end(self) -> None:
        self.log("rows", float(self.cat.compute().numel()))
        self.cat.reset()


def counting() -> Any:
    trainer, model = make_trainer(limit_val_batches=1.0), Counting()
    rank = trainer.global_rank
    found = [trainer.validate(model, loader(rank, 2 + rank), verbose=False)[0] for _ in range(2)]
    return found[0] == found[1], {name: round(value, 4) for name, value in found[1].items()}


def test_a_metric_is_of_all_the_data_each_time() -> None:
    expected = {"least": 1.0, "mean": round(115 / 9, 4), "most": 40.0, "rows": 9.0}
    assert run_ranks(counting) == [(True, expected)] * 2


class LooksAlone(Callback):
    """A bar, as it were: only rank 0 looks, whenever it likes."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def look(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            self.seen.append(sorted(trainer.progress_bar_metrics))
            assert sorted({**trainer.logged_metrics, **trainer.callback_metrics}) == self.seen[-1]

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.look(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)
        # What is logged now is not computed yet.
        pl_module.log("late", pl_module.late, prog_bar=True)
        self.look(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)


class ForRankZero(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sum, self.late = torchmetrics.SumMetric(), torchmetrics.SumMetric()

    def note(self, batch: Any, batch_idx: int) -> None:
        self.sum.update(batch[0])
        self.late.update(batch[0])
        self.log("sum", self.sum, on_step=False, on_epoch=True, prog_bar=True, rank_zero_only=True)


def for_rank_zero() -> Any:
    watching = LooksAlone()
    trainer = make_trainer(callbacks=[watching])
    trainer.fit(ForRankZero(), loader(trainer.global_rank))
    return watching.seen, numbers(trainer.callback_metrics)


def test_a_rank_that_looks_alone_waits_for_nobody_and_a_metric_of_rank_zeros_needs_all() -> None:
    first, second = run_ranks(for_rank_zero)
    assert first == ([[], [], ["sum"], ["sum"], ["late", "sum"]], {"late": 110.0, "sum": 110.0})
    assert second == ([], {"late": 110.0})


class OnOneRank(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean.update(batch[0])
        if self.global_rank == 0:
            self.log("mean", self.mean)


def on_one_rank() -> str:
    trainer = make_trainer()
    with pytest.raises(pl.ConfigError) as caught:
        trainer.validate(OnOneRank(), loader(trainer.global_rank), verbose=False)
    return str(caught.value)


def test_a_metric_that_only_one_rank_logs_is_an_error_on_all() -> None:
    message = (
        "self.log(..., sync_dist=True): at the end of the validation, the ranks have not logged the same "
        "values, so there is nothing to reduce over them:\n"
        "  'mean' in validation_step (mean, on_epoch), a metric: by rank 0, not by rank 1\n"
        "Log each on every rank, with the same arguments, or say rank_zero_only=True of rank 0's own. "
        "A TorchMetrics object always has to be logged on every rank."
    )
    assert run_ranks(on_one_rank) == [message] * 2
