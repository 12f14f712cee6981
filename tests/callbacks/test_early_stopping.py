"""EarlyStopping judges as Lightning's does."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.callbacks import EarlyStopping, EarlyStoppingReason
from holdfast.callbacks.early_stopping import judge
from holdfast.errors import ConfigError
from tests.callbacks.resumes import resume_everywhere
from tests.training.toys import Toy, rows


class Run:
    """As much of a trainer as EarlyStopping sees."""

    def __init__(self, callback: Any, **attributes: Any) -> None:
        self.callback = callback
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.current_epoch = 0
        self.should_stop = False
        self.state = SimpleNamespace(fn="fit")
        self.sanity_checking = False
        self.fast_dev_run = 0
        self.global_step = 0
        self.min_epochs: int | None = None
        self.min_steps: int | None = None
        self.enable_validation = True
        self.val_check_interval: int | float = 1.0
        self.check_val_every_n_epoch = 1
        self.world_size = 1
        self.strategy = SimpleNamespace(reduce_boolean_decision=lambda stop, all=True: stop)
        self.judged_at: list[str] = []
        self.__dict__.update(attributes)

    def epoch(self, **values: float) -> None:
        self.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for hook in (self.callback.on_validation_end, self.callback.on_train_epoch_end):
            before = self.callback.state_dict()
            hook(self, None)
            if repr(self.callback.state_dict()) != repr(before):
                self.judged_at.append(hook.__name__)
        self.current_epoch += 1

    def until_it_stops(self, values: list[float], name: str = "val") -> int:
        for value in values:
            self.epoch(**{name: value})
            if self.should_stop:
                break
        return self.current_epoch


@functools.cache
def lightnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning.pytorch.callbacks").EarlyStopping


class LightningRun(Run):
    """The little more that Lightning's own callback looks at."""

    def __init__(self, callback: Any) -> None:
        super().__init__(callback, world_size=1)
        self.state.fn = pytest.importorskip("lightning.pytorch.trainer.states").TrainerFn.FITTING
        callback._check_on_train_epoch_end = True


values = st.lists(
    st.one_of(st.floats(0, 2, width=32), st.sampled_from([1.0, 1.0, 0.9, 1.1, math.nan, math.inf])),
    min_size=1,
    max_size=8,
)
thresholds = st.one_of(st.none(), st.sampled_from([0.5, 0.9, 1.1, 1.5]))


@settings(max_examples=80, deadline=None)
@given(
    values=values,
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 0.1, -0.1]),
    patience=st.integers(0, 3),
    check_finite=st.booleans(),
    stopping_threshold=thresholds,
    divergence_threshold=thresholds,
)
def test_same_verdicts_as_lightning(values: list[float], **arguments: Any) -> None:
    ours = Run(EarlyStopping("val", **arguments))
    theirs = LightningRun(lightnings()("val", **arguments))
    assert ours.until_it_stops(values) == theirs.until_it_stops(values)
    assert ours.should_stop == theirs.should_stop
    one, other = ours.callback.state_dict(), theirs.callback.state_dict()
    one.pop("stopping_reason_message"), other.pop("stopping_reason_message")
    assert {key: repr(value) for key, value in one.items()} == {
        key: repr(value) for key, value in other.items()
    }
    assert ours.callback.state_key == theirs.callback.state_key


@pytest.mark.parametrize(
    ("arguments", "scores", "reason", "message"),
    [
        (
            {"patience": 2},
            [1.0, 1.0, 1.0],
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
            "val did not improve 2 times in a row. The best was 1.",
        ),
        (
            {"patience": 1},
            [0.5, 1.0],
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
            "val did not improve once. The best was 0.5.",
        ),
        (
            {"stopping_threshold": 0.5},
            [1.0, 0.25],
            EarlyStoppingReason.STOPPING_THRESHOLD,
            "val has reached the goal: 0.25 < 0.5.",
        ),
        (
            {"divergence_threshold": 0.5, "mode": "max"},
            [1.0, 0.25],
            EarlyStoppingReason.DIVERGENCE_THRESHOLD,
            "val has diverged: 0.25 < 0.5.",
        ),
        (
            {"min_delta": -0.1, "patience": 1},
            [1.0, 1.05, 1.2],
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
            "val did not improve once. The best was 1.05.",
        ),
        (
            {},
            [1.0, math.nan],
            EarlyStoppingReason.NON_FINITE_METRIC,
            "val is nan, not a finite number. The best was 1.",
        ),
    ],
)
def test_why_it_stopped(
    arguments: dict[str, Any], scores: list[float], reason: EarlyStoppingReason, message: str
) -> None:
    callback = EarlyStopping("val", **arguments)
    assert Run(callback).until_it_stops(scores) == len(scores)
    assert callback.stopping_reason is reason
    assert callback.stopping_reason_message == message
    assert callback.stopped_epoch == len(scores) - 1


@pytest.mark.parametrize(
    ("arguments", "attributes", "hook"),
    [
        ({}, {}, "on_train_epoch_end"),
        ({}, {"val_check_interval": 0.5}, "on_validation_end"),
        ({}, {"check_val_every_n_epoch": 2}, "on_validation_end"),
        ({}, {"check_val_every_n_epoch": 2, "enable_validation": False}, "on_train_epoch_end"),
        ({"check_on_train_epoch_end": False}, {}, "on_validation_end"),
    ],
)
def test_where_it_is_judged(arguments: dict[str, Any], attributes: dict[str, Any], hook: str) -> None:
    run = Run(EarlyStopping("val", **arguments), **attributes)
    run.epoch(val=1.0)
    assert run.judged_at == [hook]


@pytest.mark.parametrize(
    "attributes", [{"sanity_checking": True}, {"fast_dev_run": 1}, {"state": SimpleNamespace(fn="validate")}]
)
def test_where_it_is_not_judged(attributes: dict[str, Any]) -> None:
    run = Run(EarlyStopping("val"), **attributes)
    run.epoch(val=math.nan)
    assert run.judged_at == []
    assert not run.should_stop


def test_a_monitor_that_was_not_logged() -> None:
    with pytest.raises(ConfigError) as caught:
        Run(EarlyStopping("vall")).epoch(val=1.0)
    message = (
        "EarlyStopping(monitor='vall') has nothing to go by: no such value was logged. Did you mean 'val'? "
        "Logged so far: val."
    )
    assert str(caught.value) == message
    run = Run(EarlyStopping("vall", strict=False))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.epoch(val=1.0)
        run.epoch(val=1.0)
    assert [str(one.message) for one in warned] == [message]
    assert not run.should_stop


def test_a_mode_that_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        EarlyStopping("val", mode="auto")
    assert str(caught.value) == "EarlyStopping(mode='auto') must be 'min' or 'max'."


def test_its_state_goes_on_where_it_was() -> None:
    straight, broken = Run(EarlyStopping("val")), Run(EarlyStopping("val"))
    for value in (1.0, 2.0, 2.0):
        straight.epoch(val=value)
        broken.epoch(val=value)
    again = EarlyStopping("val")
    again.load_state_dict(broken.callback.state_dict())
    resumed = Run(again, current_epoch=3)
    straight.epoch(val=2.0)
    resumed.epoch(val=2.0)
    assert straight.should_stop
    assert resumed.should_stop
    assert again.state_dict() == straight.callback.state_dict()


@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.integers(0, 5), st.integers(1, 5))
def test_a_verdict_improves_or_counts(current: float, best: float, wait_count: int, patience: int) -> None:
    verdict = judge(
        torch.tensor(current),
        torch.tensor(best),
        wait_count,
        monitor="val",
        mode="min",
        min_delta=0.0,
        patience=patience,
        check_finite=True,
        stopping_threshold=None,
        divergence_threshold=None,
    )
    assert verdict.improved == (current < best)
    assert verdict.wait_count == (0 if verdict.improved else wait_count + 1)
    assert verdict.stops == (not verdict.improved and wait_count + 1 >= patience)


@pytest.mark.parametrize(
    ("minimum", "held_by"), [({"min_epochs": 4}, "min_epochs=4"), ({"min_steps": 9}, "min_steps=9")]
)
def test_a_minimum_keeps_the_run_going_and_is_said_once(
    capsys: pytest.CaptureFixture[str], minimum: dict[str, int], held_by: str
) -> None:
    run = Run(EarlyStopping("val", patience=1), **minimum)
    for value in (1.0, 1.0, 1.0, 1.0):
        run.epoch(val=value)
        run.global_step += 3
    assert run.should_stop
    assert capsys.readouterr().err.splitlines() == [
        f"val did not improve once. The best was 1. The run stops once {held_by} is reached.",
        "stopping early: val did not improve 3 times in a row. The best was 1.",
    ]


class Falling(Toy):
    """Its ``level`` falls for three epochs and then stands still."""

    def on_train_epoch_end(self) -> None:
        self.log("level", float(max(0, 3 - self.current_epoch)))


def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path: Path) -> None:
    made: list[EarlyStopping] = []

    def callbacks() -> list[Any]:
        made.append(EarlyStopping("level", patience=2))
        return [made[-1]]

    runs = resume_everywhere(tmp_path, Falling, callbacks, lambda: rows(8, shuffle=True), max_epochs=9)
    assert {run.current_epoch for run in runs} == {6}
    assert len({repr(one.state_dict()) for one in made}) == 1
    assert made[-1].stopped_epoch == 5
