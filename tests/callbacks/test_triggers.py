"""When a save is due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.callbacks.triggers import (
    due_at_epoch,
    due_at_step,
    due_at_time,
    resolve_intervals,
    saves_on_train_epoch_end,
)
from holdfast.errors import ConfigError


@pytest.mark.parametrize(
    ("given_intervals", "resolved"),
    [
        ((None, None, None), (0, 1)),
        ((5, None, None), (5, 0)),
        ((None, 2, None), (0, 2)),
        ((None, None, 3.0), (0, 0)),
        ((0, None, None), (0, 0)),
        ((0, 2, None), (0, 2)),
    ],
)
def test_intervals(
    given_intervals: tuple[int | None, int | None, float | None], resolved: tuple[int, int]
) -> None:
    assert resolve_intervals(*given_intervals) == resolved


def test_a_time_is_not_negative() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_intervals(None, None, -1.0)
    assert str(caught.value) == (
        "ModelCheckpoint(train_time_interval=...) is negative: give a positive timedelta."
    )


def test_intervals_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_intervals(1, 1, None)
    assert str(caught.value) == (
        "ModelCheckpoint takes one of every_n_train_steps, every_n_epochs and train_time_interval, not "
        "several. Use one ModelCheckpoint for each interval."
    )


@pytest.mark.parametrize("name", ["every_n_train_steps", "every_n_epochs"])
def test_negative_intervals(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_intervals(
            **{"every_n_train_steps": None, "every_n_epochs": None, name: -1}, train_time_interval_s=None
        )
    assert str(caught.value) == (
        f"ModelCheckpoint({name}=-1) is not an interval: give 1 or more, or 0 for never."
    )


@given(st.integers(1, 7), st.integers(1, 4))
def test_a_step_is_due_once_however_many_batches_end_at_it(n: int, window: int) -> None:
    last, saved = 0, []
    for batch in range(1, 60):
        step = batch // window
        if due_at_step(step, last, n):
            last = step
            saved.append(step)
    assert saved == list(range(n, 59 // window + 1, n))


def test_time_and_epochs() -> None:
    assert not due_at_time(10.0, 8.0, None)
    assert due_at_time(10.0, 8.0, 2.0)
    assert not due_at_time(9.9, 8.0, 2.0)
    assert [epoch for epoch in range(6) if due_at_epoch(epoch, 2)] == [1, 3, 5]
    assert not due_at_epoch(0, 0)


@pytest.mark.parametrize(
    ("asked", "validates", "interval", "every", "answer"),
    [
        (None, True, 1.0, 1, True),
        (None, True, 1.0, 2, False),
        (None, True, 0.5, 1, False),
        (None, True, 1, 1, False),  # one batch, not one epoch
        (None, True, 10, None, False),
        (None, False, 0.5, 2, True),
        (True, True, 0.5, 1, True),
        (False, False, 1.0, 1, False),
    ],
)
def test_where_epochs_are_judged(
    asked: bool | None, validates: bool, interval: int | float, every: int | None, answer: bool
) -> None:
    found = saves_on_train_epoch_end(
        asked, validates=validates, val_check_interval=interval, check_val_every_n_epoch=every
    )
    assert found is answer
