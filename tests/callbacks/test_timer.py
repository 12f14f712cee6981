"""Time that training takes is counted over all lives of a run, and ends it when it is up."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.callbacks.timer import Timer
from holdfast.errors import ConfigError
from tests.training.toys import Toy, rows, trainer

from .resumes import end_of, resume_everywhere


class Clock:
    """Stands for the timer's clock: one second passes with every training batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("holdfast.callbacks.timer.monotonic", lambda: self.now_s)

    def ticking(self) -> pl.Callback:
        clock = self

        class Tick(pl.Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                clock.now_s += 1

        return Tick()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Validated(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...


def fit(
    clock: Clock, timer: Timer, ckpt_path: Path | None = None, *more: pl.Callback, **arguments: Any
) -> pl.Trainer:
    callbacks = [clock.ticking(), timer, *more]
    run = trainer(callbacks=callbacks, enable_checkpointing=bool(more), **arguments)
    torch.manual_seed(3)
    run.fit(Toy(), rows(shuffle=True), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (None, None),
        ("01:02:03:04", 93784.0),
        (" 1:02:03:04", 93784.0),
        ("00:00:00:00", 0.0),
        (timedelta(minutes=2), 120.0),
        ({"days": 1, "hours": 12}, 129600.0),
    ],
)
def test_a_duration_in_any_form(duration: Any, seconds: float | None) -> None:
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("duration", ["00:10:00", "twelve hours", 5, {"fortnights": 1}])
def test_what_is_no_duration_is_refused(duration: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Timer(duration)
    assert str(caught.value) == (
        f"Timer(duration={duration!r}): expected a time as 'DD:HH:MM:SS', such as '00:12:00:00' for twelve "
        "hours, a datetime.timedelta, or a dict of its arguments such as {'hours': 12}."
    )


def test_other_intervals_and_stages_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Timer(interval="hour")
    assert str(caught.value) == "Timer(interval='hour') must be 'step' or 'epoch'."
    with pytest.raises(ConfigError) as caught:
        Timer().time_elapsed("lunch")
    assert str(caught.value) == (
        "Timer knows no stage 'lunch': expected one of train, sanity_check, validate, test, predict."
    )


def test_stops_after_the_step_or_the_epoch_in_which_the_time_is_up(clock: Clock) -> None:
    assert fit(clock, Timer({"seconds": 5}), max_epochs=4).global_step == 5
    assert fit(clock, Timer({"seconds": 4}, interval="epoch"), max_epochs=4).global_step == 6


def test_says_it_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit(clock, Timer({"seconds": 1}), min_epochs=2, max_epochs=4)
    said = [line for line in capsys.readouterr().err.splitlines() if "time" in line]
    assert said == ["the time for training is up: 0:00:01 of 0:00:01; training stops"]
    fit(clock, Timer({"seconds": 1}, verbose=False), max_epochs=4)
    assert "time" not in capsys.readouterr().err


def test_every_stage_is_measured(clock: Clock) -> None:
    timer = Timer()
    run = trainer(callbacks=[clock.ticking(), timer], enable_checkpointing=False)
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed()) == (None, None, 0.0)
    run.fit(Validated(), rows(), rows())
    clock.now_s += 60
    run.test(Validated(), rows(), verbose=False)
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed()) == (1000.0, 1003.0, 3.0)
    assert (timer.start_time("validate"), timer.time_elapsed("validate")) == (1003.0, 0.0)
    assert timer.end_time("test") == 1063.0
    assert timer.time_elapsed("predict") == 0.0


def test_without_a_duration_a_step_costs_nothing() -> None:
    assert not Timer().uses_hook("on_train_batch_end")
    assert not Timer("00:01:00:00", interval="epoch").uses_hook("on_train_batch_end")
    assert Timer("00:01:00:00").uses_hook("on_train_batch_end")


def test_moves_no_bits(tmp_path: Path) -> None:
    runs = resume_everywhere(
        tmp_path, Toy, lambda: [Timer("01:00:00:00")], lambda: rows(shuffle=True), max_epochs=2
    )
    plain = trainer(max_epochs=2, enable_checkpointing=False)
    torch.manual_seed(3)
    plain.fit(Toy(), rows(shuffle=True))
    assert end_of(runs[0]) == end_of(plain)


@pytest.mark.filterwarnings("ignore:Once resumed, this run is not bit for bit the one that never stopped")
def test_the_time_before_counts_after_a_resume(clock: Clock, tmp_path: Path) -> None:
    fit(clock, Timer({"seconds": 7}), max_steps=4, max_epochs=9).save_checkpoint(tmp_path / "a.ckpt")
    clock.now_s += 10_000
    timer = Timer({"seconds": 7})
    run = fit(clock, timer, tmp_path / "a.ckpt", max_steps=100, max_epochs=9)
    assert (run.global_step, timer.time_elapsed()) == (7, 7.0)


def test_a_run_whose_time_is_up_trains_nothing_more(clock: Clock, tmp_path: Path) -> None:
    fit(clock, Timer({"seconds": 4}), max_epochs=9).save_checkpoint(tmp_path / "a.ckpt")
    run = fit(clock, Timer({"seconds": 4}), tmp_path / "a.ckpt", max_epochs=9)
    assert run.global_step == 4


@pytest.mark.filterwarnings("ignore:Once resumed, this run is not bit for bit the one that never stopped")
def test_more_time_goes_on_where_it_was_up(clock: Clock, tmp_path: Path) -> None:
    first = fit(clock, Timer({"seconds": 4}), None, ModelCheckpoint(tmp_path, "a"), max_epochs=3)
    saves = ModelCheckpoint(tmp_path / "later")
    run = fit(clock, Timer({"seconds": 400}), tmp_path / "a.ckpt", saves, max_epochs=3)
    assert (first.global_step, run.global_step) == (4, 9)
    assert end_of(run) == end_of(fit(clock, Timer(), max_epochs=3))


def test_a_second_fit_has_all_the_time_again(clock: Clock) -> None:
    timer = Timer({"seconds": 4})
    assert fit(clock, timer, max_epochs=9).global_step == 4
    assert fit(clock, timer, max_epochs=9).global_step == 4
