"""What LearningRateMonitor logs beside Lightning's is in test_beside_lightning.py; here is the rest."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from holdfast.callbacks import ModelCheckpoint
from holdfast.callbacks.lr_monitor import LearningRateMonitor
from holdfast.errors import ConfigError
from holdfast.loggers import CSVLogger
from tests.training.toys import Toy, rows, trainer


class Scheduled(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        each_step = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}
        return [optimizer], [StepLR(optimizer, 1), each_step]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


def logged(directory: str) -> list[dict[str, str]]:
    with open(Path(directory) / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_logs_the_same_rows(tmp_path: Path) -> None:
    def fit(place: str, stops_after: int, **how: Any) -> list[dict[str, str]]:
        run = trainer(
            logger=CSVLogger(tmp_path / place),
            default_root_dir=tmp_path / place,
            callbacks=[LearningRateMonitor(), ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)],
            log_every_n_steps=2,
            max_epochs=3,
            max_steps=stops_after,
        )
        torch.manual_seed(3)
        run.fit(Scheduled(), rows(), **how)
        return logged(str(run.log_dir))

    straight = fit("straight", -1)
    assert sum(bool(row["lr-SGD"]) for row in straight) == 3
    assert sum(bool(row["lr-SGD-1"]) for row in straight) == 4
    for step in range(1, 9):
        place = f"stopped after {step}"
        fit(place, step)
        # The end of the epoch that the limit cut short comes a second time; the rates must not.
        rates = [(row["step"], row["lr-SGD"], row["lr-SGD-1"]) for row in fit(place, -1, ckpt_path="auto")]
        assert [row for row in rates if row[1] or row[2]] == [
            (row["step"], row["lr-SGD"], row["lr-SGD-1"])
            for row in straight
            if row["lr-SGD"] or row["lr-SGD-1"]
        ]


@pytest.mark.parametrize(
    ("interval", "module", "in_steps"),
    [(None, Scheduled, True), (None, Toy, True), ("epoch", Toy, False), ("step", Toy, True)],
)
def test_a_step_that_logs_no_rate_costs_nothing(
    interval: Any, module: Any, in_steps: bool, tmp_path: Path
) -> None:
    monitor = LearningRateMonitor(interval)
    trainer(logger=CSVLogger(tmp_path), callbacks=monitor).fit(module(), rows())
    assert monitor.uses_hook("on_train_batch_start") is in_steps


def test_schedulers_of_epochs_alone_cost_a_step_nothing(tmp_path: Path) -> None:
    class EachEpoch(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [StepLR(optimizer, 1)]

    monitor = LearningRateMonitor()
    trainer(logger=CSVLogger(tmp_path), callbacks=monitor, max_epochs=2).fit(EachEpoch(), rows())
    assert not monitor.uses_hook("on_train_batch_start")
    assert monitor.lrs == {"lr-SGD": [0.1, 0.010000000000000002]}


def test_every_logger_gets_the_exact_value(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")]
    monitor = LearningRateMonitor("epoch")
    run = trainer(logger=loggers, callbacks=monitor, max_epochs=2)
    run.fit(Scheduled(), rows())
    assert [row["lr-SGD"] for row in logged(loggers[0].log_dir) if row["lr-SGD"]] == [
        str(rate) for rate in monitor.lrs["lr-SGD"]
    ]
    assert logged(loggers[0].log_dir) == logged(loggers[1].log_dir)
    assert run.callback_metrics["lr-SGD"] == torch.tensor(monitor.lrs["lr-SGD"][-1])


def test_an_optimizer_without_momentum_or_decay_logs_zeros(tmp_path: Path) -> None:
    class Rprop(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.Rprop(self.parameters(), lr=0.1)

    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    trainer(logger=CSVLogger(tmp_path), callbacks=monitor).fit(Rprop(), rows())
    assert monitor.last_momentum_values == {"lr-Rprop-momentum": 0}
    assert monitor.last_weight_decay_values == {"lr-Rprop-weight_decay": 0}


def test_nowhere_to_log_to_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(callbacks=LearningRateMonitor()).fit(Toy(), rows())
    assert str(caught.value) == (
        "LearningRateMonitor has nowhere to log to: the trainer has no logger. Give it one, such as "
        "Trainer(logger=CSVLogger(...)), or leave the callback out."
    )


def test_another_interval_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        LearningRateMonitor("batch")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "LearningRateMonitor(logging_interval='batch') must be 'step', 'epoch' or None."
    )


def test_groups_of_the_same_name_are_refused(tmp_path: Path) -> None:
    class Twice(Toy):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [parameter], "name": "x"} for parameter in self.parameters()]
            return torch.optim.SGD(groups, lr=0.1)

    with pytest.raises(ConfigError) as caught:
        trainer(logger=CSVLogger(tmp_path), callbacks=LearningRateMonitor()).fit(Twice(), rows())
    assert str(caught.value) == (
        "LearningRateMonitor: lr-SGD has several param groups named 'x', so their values would be logged over "
        'each other. Give each group a "name" of its own.'
    )
