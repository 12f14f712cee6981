"""Where a run is stopped."""

from __future__ import annotations

import random
from collections.abc import Sequence

from holdfast.errors import ConfigError
from holdfast.testing.events import BATCH_END, EPOCH_END, FIT_END, VALIDATION_END, Event, Key


def choose(events: list[Event], at: Sequence[int] | None, stops: int, seed: int) -> list[Key]:
    """What to stop behind, in the order in which it comes.

    Args:
        events: What the run that is never stopped did.
        at: The batches, counted from 1; None chooses.
        stops: How many are chosen, where there are as many.
        seed: Decides which.

    Raises:
        ConfigError: the run has no such batch.
    """
    ends = {event.key.fit: index for index, event in enumerate(events) if event.key.kind == EPOCH_END}
    # Behind the last epoch of a fit nothing is left to train.
    places = [
        index
        for index, event in enumerate(events)
        if event.key.kind != FIT_END and ends.get(event.key.fit) != index
    ]
    chosen = _telling(events, places, stops, seed) if at is None else _named(events, places, at)
    return [events[index].key for index in sorted(chosen)]


def _named(events: list[Event], places: list[int], at: Sequence[int]) -> set[int]:
    """Behind each of the batches, and behind what follows it until the next one."""
    batches = [index for index, event in enumerate(events) if event.key.kind == BATCH_END]
    chosen: set[int] = set()
    for number in at:
        if not 1 <= number <= len(batches):
            raise ConfigError(
                f"assert_exact_resume(at={list(at)}): there is no batch {number}. The run has {len(batches)} "
                "of them, counted from 1 over all epochs and fits."
            )
        following = batches[number] if number < len(batches) else len(events)
        chosen |= set(range(batches[number - 1], following)) & set(places)
    return chosen


def _telling(events: list[Event], places: list[int], stops: int, seed: int) -> set[int]:
    """One of each kind of place first, then any."""
    draw = random.Random(seed)
    batches = [index for index in places if events[index].key.kind == BATCH_END]

    def followed_by(kind: str) -> list[int]:
        return [index for index in batches if events[index + 1].key.kind == kind]

    def behind(kind: str) -> list[int]:
        return [index for index in places if events[index].key.kind == kind]

    kinds = [
        followed_by(BATCH_END),
        followed_by(VALIDATION_END),
        behind(EPOCH_END),
        followed_by(EPOCH_END),
        behind(VALIDATION_END),
    ]
    chosen = [draw.choice(kind) for kind in kinds if kind]
    others = [index for index in places if index not in chosen]
    draw.shuffle(others)
    return set((chosen + others)[:stops])
