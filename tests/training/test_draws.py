"""The numbers that an order alone is drawn from: whatever else draws in between, and nothing else notices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from holdfast.training import rng
from holdfast.training.draws import Draws, at_once


def numbers(*generators: Any) -> Iterator[list[float]]:
    """From every global generator, and from these, one number at a time."""
    while True:
        found = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        for one in generators:
            own = torch.rand((), generator=one).item() if isinstance(one, torch.Generator) else one.random()
            found.append(own)
        yield found


def own_generators() -> list[Any]:
    return [torch.Generator().manual_seed(3), random.Random(3), np.random.default_rng(3)]


def draw(seed: int, count: int, between: int) -> list[list[float]]:
    own = own_generators()
    items = Draws(seed, own).each(numbers(*own), lazily=True)
    found = []
    for _ in range(count):
        found.append(next(items))
        for _ in range(between):
            next(numbers(*own))
    return found


def test_what_is_drawn_in_between_does_not_matter() -> None:
    assert draw(5, 4, between=0) == draw(5, 4, between=3)
    assert draw(5, 4, between=0) != draw(6, 4, between=0)
    assert len({tuple(one) for one in draw(5, 4, between=0)}) == 4


def test_everybody_elses_numbers_are_as_if_nothing_had_been_drawn() -> None:
    own = own_generators()
    rng.seed_generators(2)
    expected = [next(numbers(*own)) for _ in range(3)]
    own = own_generators()
    rng.seed_generators(2)
    items = Draws(5, own).each(numbers(*own), lazily=True)
    found = []
    for _ in range(3):
        next(items)
        found.append(next(numbers(*own)))
    assert found == expected


def test_without_drawing_lazily_only_the_first_item_is_drawn_apart() -> None:
    rng.seed_generators(2)
    expected = [next(numbers()), next(numbers())]
    rng.seed_generators(2)
    items = Draws(5).each(numbers(), lazily=False)
    assert next(items) not in expected
    assert [next(items), next(items)] == expected


def test_an_error_while_drawing_leaves_the_generators_in_place() -> None:
    rng.seed_generators(2)
    expected = next(numbers())
    rng.seed_generators(2)
    with pytest.raises(ZeroDivisionError), Draws(5):
        raise ZeroDivisionError
    assert next(numbers()) == expected


def test_an_older_kind_of_generator_is_seeded_too() -> None:
    old = np.random.RandomState(7)
    before = float(np.random.RandomState(7).rand())
    with Draws(5, [old]):
        first = float(old.rand())
    old.rand()
    with Draws(5, [old]):
        assert float(old.rand()) == first
    assert first != before


def test_orders_that_can_be_had_at_once() -> None:
    assert at_once(SequentialSampler(range(5)), 1) == range(5)
    assert at_once([4, 2], 1) == [4, 2]
    order = at_once(RandomSampler(range(50)), 1)
    assert order is not None and sorted(order.tolist()) == list(range(50))  # type: ignore[attr-defined]
    assert at_once(RandomSampler(range(5), replacement=True), 1) is None
    assert at_once(RandomSampler(range(5), num_samples=9), 1) is None
