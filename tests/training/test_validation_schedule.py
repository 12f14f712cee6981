"""When validation is due: what may be asked for, and that a clock goes on over a resume."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.training.validation_schedule import Stopwatch, batches_between, check_interval
from tests.training.toys import Toy, rows, trainer


class Validated(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.validated_at: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated_at.append(self.trainer.global_step)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, 1.0),
        (0.25, 0.25),
        (7, 7),
        (timedelta(minutes=1), timedelta(minutes=1)),
        ({"hours": 1, "minutes": 2}, timedelta(hours=1, minutes=2)),
        ("01:02:03:04", timedelta(days=1, hours=2, minutes=3, seconds=4)),
    ],
)
def test_what_an_interval_may_be(value: Any, expected: Any) -> None:
    found = check_interval(value, 1)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "every", "message"),
    [
        (
            -1,
            1,
            "Trainer(val_check_interval=-1): expected a number of batches, a fraction between 0.0 and 1.0, or a "
            "time such as '00:00:30:00'.",
        ),
        (
            1.5,
            1,
            "Trainer(val_check_interval=1.5): a fraction is at most 1.0; for a number of batches give an int.",
        ),
        (
            0,
            1,
            "Trainer(val_check_interval=0): the least is 1. Trainer(limit_val_batches=0) never validates.",
        ),
        (
            0.5,
            None,
            "Trainer(check_val_every_n_epoch=None) counts batches across epochs: give val_check_interval as an "
            "int.",
        ),
        (
            "1 hour",
            1,
            "Trainer(val_check_interval='1 hour'): expected a time as 'DD:HH:MM:SS', such as '00:12:00:00' for "
            "twelve hours, a datetime.timedelta, or a dict of its arguments such as {'hours': 12}.",
        ),
    ],
)
def test_what_it_may_not_be(value: Any, every: int | None, message: str) -> None:
    with pytest.raises(pl.ConfigError) as refused:
        check_interval(value, every)
    assert str(refused.value) == message


def test_batches_between() -> None:
    assert batches_between(0.3, 10, False) == 3
    assert batches_between(0.01, 10, False) == 1
    assert batches_between(20, 10, True) == 20
    assert batches_between(1.0, math.inf, False) == math.inf


@pytest.mark.parametrize(("interval", "steps"), [(timedelta(0), [1, 2, 3, 4, 5, 6]), (timedelta(days=1), [])])
def test_a_time_is_looked_at_after_each_batch(interval: timedelta, steps: list[int]) -> None:
    run, model = trainer(max_epochs=2, num_sanity_val_steps=0), Validated()
    run.val_check_interval = interval
    run.fit(model, rows(), rows())
    assert model.validated_at == steps


@pytest.mark.filterwarnings("ignore:Once resumed, this run is not bit for bit the one that never stopped")
def test_the_clock_goes_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"

    def fitted(ckpt_path: Path | None) -> float:
        saving = ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=2)
        run = trainer(num_sanity_val_steps=0, callbacks=saving, max_steps=3 if ckpt_path else 2)
        run.val_check_interval = timedelta(days=1)
        run.fit(Validated(), rows(), rows(), ckpt_path=ckpt_path)
        return run.progress.since_validation_s

    fitted(None)
    saved: float = torch.load(path)["holdfast"]["progress"]["since_validation_s"]
    assert fitted(path) > saved > 0


def test_a_stopwatch_that_was_told_of_a_life_before() -> None:
    watch = Stopwatch(timedelta(hours=1), elapsed_s=3700)
    assert watch.due()
    watch.restart()
    assert not watch.due()
    assert Stopwatch(timedelta(hours=1), elapsed_s=3000).elapsed_s() >= 3000
