"""Accumulators of one number of processes, shared out among another."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from holdfast.training import metric_objects
from holdfast.training.merged_metrics import merge
from holdfast.training.metrics import MetricStore


def store_of(values: list[Any], reduce: str, **sizes: int) -> MetricStore:
    store = MetricStore()
    store.train.fx = "training_step"
    for value in values:
        store.train.log("x", value, (False, True, True, True, reduce, True), sizes.get("size", 1))
    return store


def shares(stores: list[MetricStore], ranks: int) -> list[Any]:
    module = nn.Module()
    states = [store.state_dict(module) for store in stores]
    found = []
    for rank in range(ranks):
        store = MetricStore()
        store.load_state_dict(merge(states, {}, rank, ranks), torch.device("cpu"), module)
        found.append(next(iter(store.train.entries.values())))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_mean_is_the_mean_of_all_ranks_on_each_and_together_has_their_weight(ranks: int) -> None:
    stores = [
        store_of([torch.tensor(1.0), torch.tensor(2.0)], "mean", size=4),
        store_of([6.0], "mean", size=8),
    ]
    found = shares(stores, ranks)
    assert sum(entry.weight for entry in found) == 16
    assert [float(entry.epoch_value()) for entry in found] == pytest.approx([60 / 16] * ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("values", [[1.5, 2.5], [3, 4], [torch.tensor(3), torch.tensor(4)]])
def test_sums_add_up_to_what_there_was(ranks: int, values: list[Any]) -> None:
    found = shares([store_of(values, "sum"), store_of(values[:1], "sum")], ranks)
    expected = sum(float(value) for value in [*values, values[0]])
    assert sum(float(entry.total) for entry in found) == pytest.approx(expected)


@pytest.mark.parametrize(("reduce", "expected"), [("min", -2.0), ("max", 9.0)])
def test_extremes_are_everybodys(reduce: str, expected: float) -> None:
    found = shares([store_of([1.0, 9.0], reduce), store_of([torch.tensor(-2.0)], reduce)], 2)
    assert [float(entry.epoch_value()) for entry in found] == [expected, expected]


class Metrics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = torchmetrics.SumMetric()
        self.mean = torchmetrics.MeanMetric()
        self.largest = torchmetrics.MaxMetric()
        self.least = torchmetrics.MinMetric()
        self.all = torchmetrics.CatMetric()

    def update(self, values: list[float]) -> Metrics:
        for metric in self.children():
            metric.update(torch.tensor(values))  # type: ignore[operator]
        return self


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_torchmetrics_are_merged_by_their_own_reductions(ranks: int) -> None:
    of_ranks = [Metrics().update([1.0, 5.0]), Metrics().update([-3.0])]
    states = [{"train": [], **metric_objects.capture(one, metric_objects.found_in(one))} for one in of_ranks]
    made = []
    for rank in range(ranks):
        one = Metrics()
        merged = merge(states, metric_objects.found_in(one), rank, ranks)
        metric_objects.restore(one, merged, torch.device("cpu"))
        made.append(one)
    assert sum(float(one.total.sum_value) for one in made) == 3.0
    weighed = [(float(one.mean.mean_value), float(one.mean.weight)) for one in made]
    assert [sum(parts) for parts in zip(*weighed, strict=True)] == [3.0, 3.0]
    assert [float(one.largest.max_value) for one in made] == [5.0] * ranks
    assert [float(one.least.min_value) for one in made] == [-3.0] * ranks
    gathered = [
        torch.cat(list(map(torch.atleast_1d, one.all.value))).tolist() for one in made if len(one.all.value)
    ]
    assert sorted(functools.reduce(lambda a, b: a + b, gathered)) == [-3.0, 1.0, 5.0]


class Odd(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.tensor(0.0), dist_reduce_fx=None)

    def update(self, value: float) -> None:
        self.seen = torch.tensor(value)

    def compute(self) -> torch.Tensor:
        return self.seen  # type: ignore[no-any-return]


def test_a_state_that_nothing_can_merge_stays_rank_zeros_and_that_is_said() -> None:
    module = nn.Module()
    module.odd = Odd()
    states = []
    for value in (4.0, 5.0):
        module.odd.update(value)
        states.append({"train": [], **metric_objects.capture(module, metric_objects.found_in(module))})
    with pytest.warns(UserWarning, match="^The processes were 2") as said:
        merged = merge(states, metric_objects.found_in(module), 0, 3)
    assert float(merged["objects"]["odd"]["states"]["seen"]) == 4.0
    assert [str(one.message) for one in said] == [
        "The processes were 2 and are 3 now, and nothing tells how to merge what each had gathered in odd.seen. "
        "What rank 0 had is kept; what others had is left out of this epoch. Give add_state a dist_reduce_fx."
    ]
