"""Retention decides from values alone, and its decisions hold for every order and any number of NaNs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.retention import (
    Found,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepNewer,
    Policy,
    Ranked,
    best_first,
    best_k,
    first_ranking,
    judge,
    left_behind,
    policy_of,
    rebuild,
)
from holdfast.errors import ConfigError

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


# -- policies that compose -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint as policies see it."""

    path: str
    step: int | None
    metrics: dict[str, float]
    saved_at: float


NOW = 1_000_000.0
HOUR_S = 3600.0


def saved(*losses: float | None, hours: float = 0.0) -> list[Saved]:
    """Steps 0, 1, 2 ..., an hour apart, the last one ``hours`` ago."""
    return [
        Saved(
            path=f"{step}",
            step=step,
            metrics={} if loss is None else {"loss": loss},
            saved_at=NOW - HOUR_S * (len(losses) - 1 - step + hours),
        )
        for step, loss in enumerate(losses)
    ]


histories = st.lists(st.one_of(scores, st.none()), max_size=10).map(lambda losses: saved(*losses))
plain_policies = st.one_of(
    st.integers(1, 4).map(KeepLast),
    st.integers(1, 4).map(KeepEvery),
    st.builds(KeepBest, st.integers(1, 4), st.just("loss"), modes),
    st.floats(0.1, 12).map(lambda hours: KeepNewer(timedelta(hours=hours))),
    st.just(KeepAll()),
)
policies: st.SearchStrategy[Policy] = st.recursive(
    plain_policies,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: two[0] | two[1]),
        st.tuples(inner, inner).map(lambda two: two[0] & two[1]),
    ),
    max_leaves=5,
)


def kept(policy: Policy, history: list[Saved], **more: Any) -> list[str]:
    return [one.path for one in judge(policy, history, now=NOW, **more) if one.kept]


def chosen(policy: Policy, history: list[Saved]) -> set[str]:
    """What the policy itself keeps, the newest not excepted."""
    opinions = policy.opinions(history, NOW)
    return {one.path for one, (stays, _) in zip(history, opinions, strict=True) if stays}


@given(policies, histories, st.sets(st.integers(0, 9).map(str)))
def test_the_newest_and_the_protected_always_stay_and_each_has_one_verdict(
    policy: Policy, history: list[Saved], protected: set[str]
) -> None:
    verdicts = judge(policy, history, now=NOW, protected=protected)
    assert [one.path for one in verdicts] == [one.path for one in history]
    assert all(one.kept for one in verdicts[-1:])
    assert all(one.kept for one in verdicts if one.path in protected)
    assert all(one.reason for one in verdicts)
    others = [one for one in verdicts[:-1] if one.path not in protected]
    assert {one.path for one in others if one.kept} == chosen(policy, history) & {one.path for one in others}


@given(policies, policies, histories)
def test_or_and_and_are_union_and_intersection(one: Policy, other: Policy, history: list[Saved]) -> None:
    assert chosen(one | other, history) == chosen(one, history) | chosen(other, history)
    assert chosen(one & other, history) == chosen(one, history) & chosen(other, history)


@given(policies, policies, policies, histories)
def test_how_policies_are_grouped_makes_no_difference(
    a: Policy, b: Policy, c: Policy, history: list[Saved]
) -> None:
    assert chosen((a | b) | c, history) == chosen(a | (b | c), history)
    assert chosen((a & b) & c, history) == chosen(a & (b & c), history)


@given(st.integers(1, 4), modes, histories)
def test_the_best_are_those_that_the_one_by_one_rule_keeps(k: int, mode: str, history: list[Saved]) -> None:
    numbers = [one for one in history if not math.isnan(one.metrics.get("loss", math.nan))]
    by_score = best_first([Ranked(one.path, one.metrics["loss"]) for one in numbers], mode)[:k]
    assert [one.path for one in KeepBest(k, "loss", mode).best(history)] == [one.path for one in by_score]


@given(st.lists(st.one_of(scores, st.none()), min_size=1, max_size=10), st.integers(1, 3), modes)
def test_deleting_as_they_come_keeps_what_judging_all_at_once_keeps(
    losses: list[float | None], n: int, mode: str
) -> None:
    """For the policies that never want back what they gave up."""
    policy = KeepBest(n, "loss", mode) | KeepEvery(3) | KeepLast(n)
    present: list[Saved] = []
    for one in saved(*losses):
        present.append(one)
        stay = kept(policy, present)
        present = [one for one in present if one.path in stay]
    assert [one.path for one in present] == kept(policy, saved(*losses))


def test_each_policy_keeps_what_it_says() -> None:
    history = saved(3.0, 1.0, math.nan, 1.0, None, 2.0)
    assert chosen(KeepLast(2), history) == {"4", "5"}
    assert chosen(KeepEvery(2), history) == {"0", "2", "4"}
    assert chosen(KeepBest(1, "loss"), history) == {"1"}  # not 3: a tie keeps the older
    assert chosen(KeepBest(9, "loss"), history) == {"0", "1", "3", "5"}
    assert chosen(KeepBest(1, "loss", "max"), history) == {"0"}
    assert chosen(KeepBest(1, "accuracy"), history) == set()
    assert chosen(KeepNewer(timedelta(hours=1.5)), history) == {"4", "5"}
    assert chosen(KeepEvery(3), [Saved("x", None, {}, 0.0)]) == set()
    assert kept(KeepNewer(timedelta(hours=1)), saved(1.0, 2.0, hours=9)) == ["1"]


def test_the_reasons_are_those_that_decided() -> None:
    history = saved(3.0, math.nan, None, 2.0, 5.0)
    policy = KeepBest(1, "loss") | KeepEvery(10) | KeepLast(1)
    assert judge(policy, history, now=NOW, protected={"1"}) == [
        ("0", True, "step divisible by 10"),
        ("1", True, "the run went on from it"),
        ("2", False, "not the best by loss (it has no loss); step not divisible by 10; not the last one"),
        ("3", True, "the best by loss (2)"),
        ("4", True, "the newest"),
    ]
    assert judge(KeepNewer(timedelta(days=2)) & KeepLast(2), history, now=NOW)[0] == (
        "0",
        False,
        "not among the last 2",
    )


def test_what_keep_means() -> None:
    assert policy_of(3) == KeepLast(3)
    assert policy_of(None) == KeepAll()
    policy = KeepLast(1) | KeepBest(2, "loss")
    assert policy_of(policy) is policy
    assert first_ranking(policy & KeepEvery(2)) == KeepBest(2, "loss")
    assert first_ranking(KeepLast(1) | KeepEvery(2)) is None


def test_policies_that_cannot_work() -> None:
    messages = []
    for make in (
        lambda: KeepLast(0),
        lambda: KeepEvery(True),
        lambda: KeepBest(0, "loss"),
        lambda: KeepBest(1, "loss", "lowest"),
        lambda: KeepNewer(timedelta(0)),
        lambda: KeepNewer(3),  # type: ignore[arg-type]
        lambda: KeepLast(1) | 3,  # type: ignore[operator]
        lambda: policy_of("all"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        messages.append(str(caught.value))
    assert messages == [
        "KeepLast(0): give a whole number of at least 1.",
        "KeepEvery(True): give a whole number of at least 1.",
        "KeepBest(0, 'loss'): give a whole number of at least 1.",
        'KeepBest(mode=\'lowest\'): mode is "min" or "max".',
        "KeepNewer(datetime.timedelta(0)): give a positive datetime.timedelta, such as timedelta(days=2).",
        "KeepNewer(3): give a positive datetime.timedelta, such as timedelta(days=2).",
        "3 is not a policy of what to keep, such as KeepLast(3).",
        "keep='all': give a whole number of at least 1, None to keep all, or policies such as "
        'KeepBest(1, "val_loss") | KeepLast(3).',
    ]
