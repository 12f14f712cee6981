"""Which checkpoints stay and which go: pure decisions, from lists of values to lists of paths.

Nothing here touches a disk. Whoever acts on a decision does so after the newer file is durable.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranked:
    """A checkpoint and the score that it is ranked on."""

    path: str
    score: float


@dataclass(frozen=True)
class Decision:
    """What `best_k` decided: whether the new one stays, what stays in all, and what goes."""

    entered: bool
    keep: tuple[Ranked, ...]
    evict: tuple[Ranked, ...]


@dataclass(frozen=True)
class Found:
    """A checkpoint that lies in a run's directory, as its summary describes it.

    Args:
        path: Where it is.
        step: The global step that it was written at.
        run: The id of the run that wrote it; None when the file doesn't say.
        score: The value that it was ranked on; None when it never was.
    """

    path: str
    step: int
    run: str | None = None
    score: float | None = None


def ranks_above(score: float, other: float, mode: str) -> bool:
    """Tell whether ``score`` is strictly better than ``other``; a number is better than NaN.

    Args:
        score: The value in question.
        other: The value to beat.
        mode: "min" or "max": which end is better.
    """
    if math.isnan(score):
        return False
    if math.isnan(other):
        return True
    return score < other if mode == "min" else score > other


def best_first(candidates: Iterable[Ranked], mode: str) -> list[Ranked]:
    """Sort from best to worst; of equals the one that came first is better, and NaN comes last."""

    def place(candidate: Ranked) -> tuple[bool, float]:
        if math.isnan(candidate.score):
            return True, 0.0
        return False, candidate.score if mode == "min" else -candidate.score

    return sorted(candidates, key=place)


def best_k(candidates: Sequence[Ranked], new: Ranked, k: int, mode: str) -> Decision:
    """Decide whether ``new`` enters the best ``k`` and what leaves them for it.

    A tie keeps the older. NaN ranks below every number: it takes a free place, never one that a number
    could have, and the next number takes it back.

    Args:
        candidates: The present ones, oldest first.
        new: The newcomer.
        k: How many places there are; -1 for no end of them, 0 for none.
        mode: "min" or "max": which end is better.
    """
    everyone = [*candidates, new]
    stay = everyone if k == -1 else best_first(everyone, mode)[:k]
    return Decision(
        entered=any(one is new for one in stay),
        keep=tuple(one for one in everyone if any(one is other for other in stay)),
        evict=tuple(one for one in candidates if not any(one is other for other in stay)),
    )


def rebuild(
    remembered: Sequence[Ranked], found: Iterable[Found], *, run: str, step: int, k: int, mode: str
) -> tuple[Ranked, ...]:
    """Make the best ``k`` again from the files, for a run that goes on at ``step``.

    Args:
        remembered: What the checkpoint says is there and really is, oldest first.
        found: What the directory holds.
        run: The id of the run that goes on; files of other runs are none of its business.
        step: Files of later steps are from a future that this run has yet to reach: they don't count.
        k: How many places there are; -1 for no end of them.
        mode: "min" or "max": which end is better.
    """
    known = {one.path for one in remembered}
    mine = sorted(
        (one for one in found if one.run == run and one.step <= step and one.path not in known),
        key=lambda one: one.step,
    )
    everyone = [*remembered, *(Ranked(one.path, one.score) for one in mine if one.score is not None)]
    if k == -1:
        return tuple(everyone)
    stay = best_first(everyone, mode)[:k]
    return tuple(one for one in everyone if one in stay)


def left_behind(found: Iterable[Found], *, run: str, before_step: int, keep: Collection[str]) -> list[str]:
    """Name the files of this run's earlier lives, of steps before ``before_step``, that it has no use for.

    They are those that a kill kept from being deleted, and those of a future that the run has by now
    caught up with and named otherwise. What lies beyond is left alone: until the run has got there itself
    it may be the newest state there is.

    Args:
        found: What the directory held when the run went on.
        run: The id of the run; files of other runs, or of nobody, are never named.
        before_step: The run has durable state of this step's predecessor or later.
        keep: Paths that are in use.
    """
    return [one.path for one in found if one.run == run and one.step < before_step and one.path not in keep]
