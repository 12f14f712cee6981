"""Retention decides from values alone, and its decisions hold for every order and any number of NaNs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.retention import Found, Ranked, best_first, best_k, left_behind, ranks_above, rebuild

scores = st.one_of(st.integers(-3, 3).map(float), st.just(math.nan), st.just(math.inf), st.just(-math.inf))
modes = st.sampled_from(["min", "max"])


def run_all(values: list[float], k: int, mode: str) -> tuple[list[Ranked], list[str]]:
    kept: list[Ranked] = []
    gone: list[str] = []
    for number, value in enumerate(values):
        new = Ranked(f"{number}", value)
        decision = best_k(kept, new, k, mode)
        kept = list(decision.keep)
        gone += [one.path for one in decision.evict] + ([] if decision.entered else [new.path])
        assert decision.entered == (new in kept)
    return kept, gone


@given(st.lists(scores, max_size=12), st.integers(0, 5), modes)
def test_one_by_one_keeps_what_sorting_all_at_once_would(values: list[float], k: int, mode: str) -> None:
    kept, gone = run_all(values, k, mode)
    everyone = [Ranked(f"{number}", value) for number, value in enumerate(values)]
    assert {one.path for one in kept} == {one.path for one in best_first(everyone, mode)[:k]}
    assert sorted([one.path for one in kept] + gone) == sorted(one.path for one in everyone)


@given(st.lists(scores, max_size=12), modes)
def test_minus_one_keeps_all_in_order(values: list[float], mode: str) -> None:
    kept, gone = run_all(values, -1, mode)
    assert [one.path for one in kept] == [f"{number}" for number in range(len(values))]
    assert gone == []


@given(st.lists(scores, min_size=1, max_size=12), st.integers(1, 5), modes)
def test_nan_never_has_a_place_that_a_number_could_have(values: list[float], k: int, mode: str) -> None:
    kept, _ = run_all(values, k, mode)
    numbers = sum(not math.isnan(value) for value in values)
    assert sum(not math.isnan(one.score) for one in kept) == min(k, numbers)
    if numbers:
        assert not math.isnan(best_first(kept, mode)[0].score)


@given(scores, scores, modes)
def test_ranking_is_strict(one: float, other: float, mode: str) -> None:
    assert not (ranks_above(one, other, mode) and ranks_above(other, one, mode))
    assert not ranks_above(one, one, mode)
    assert not ranks_above(math.nan, other, mode)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_tie_keeps_the_older(mode: str) -> None:
    kept, gone = run_all([1.0, 1.0, 1.0], 2, mode)
    assert [one.path for one in kept] == ["0", "1"]
    assert gone == ["2"]


def test_fewer_places_than_before_evict_the_worst() -> None:
    present = [Ranked("a", 1.0), Ranked("b", 3.0), Ranked("c", 2.0)]
    decision = best_k(present, Ranked("d", 0.5), 2, "min")
    assert [one.path for one in decision.keep] == ["a", "d"]
    assert [one.path for one in decision.evict] == ["b", "c"]


def test_rebuilding_counts_own_files_up_to_the_resumed_step_only() -> None:
    found = [
        Found("mine-late", 30, "r", 0.1),
        Found("mine-2", 20, "r", 0.3),
        Found("mine-1", 10, "r", 0.2),
        Found("never-ranked", 15, "r", None),
        Found("other-run", 10, "q", 0.0),
        Found("nobody's", 10, None, 0.0),
    ]
    again = rebuild([Ranked("kept", 0.5)], found, run="r", step=20, k=2, mode="min")
    assert [one.path for one in again] == ["mine-1", "mine-2"]
    everything = rebuild([Ranked("kept", 0.5)], found, run="r", step=20, k=-1, mode="min")
    assert [one.path for one in everything] == ["kept", "mine-1", "mine-2"]


def test_left_behind_spares_the_future_other_runs_and_what_is_in_use() -> None:
    found = [
        Found("old", 6, "r"),
        Found("in use", 12, "r"),
        Found("future", 24, "r"),
        Found("other run", 6, "q"),
        Found("nobody's", 6),
    ]
    assert left_behind(found, run="r", before_step=19, keep={"in use"}) == ["old"]
    assert left_behind(found, run="r", before_step=25, keep={"in use"}) == ["old", "future"]
