"""Which checkpoints stay and which go: pure decisions, from lists of values to lists of paths.

Nothing here touches a disk. Whoever acts on a decision does so after the newer file is durable. The
policies that a `Checkpointer` takes (`KeepBest`, `KeepLast`, `KeepEvery`, `KeepNewer`) are at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from holdfast.errors import ConfigError


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


# -- policies that compose -----------------------------------------------------------------------------------


class Candidate(Protocol):
    """A checkpoint as a policy sees it; `catalog.Entry` is one."""

    @property
    def path(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def saved_at(self) -> float: ...


C = TypeVar("C", bound=Candidate)


class Verdict(NamedTuple):
    """What becomes of one checkpoint, and why."""

    path: str
    kept: bool
    reason: str


Opinion: TypeAlias = "tuple[bool, str]"
"""Whether a policy keeps a candidate, and the reason in words."""


class Policy:
    """Which checkpoints stay. ``a | b`` keeps what either keeps, ``a & b`` what both keep.

    To write your own, derive from it and write `opinions`.
    """

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        """Say of each candidate whether it stays, and why.

        Args:
            candidates: All there are, oldest first.
            now: Seconds since 1970.
        """
        raise NotImplementedError

    def __or__(self, other: Policy) -> Policy:
        return _Any(_parts(self, _Any) + _parts(other, _Any))

    def __and__(self, other: Policy) -> Policy:
        return _All(_parts(self, _All) + _parts(other, _All))


@dataclass(frozen=True)
class KeepAll(Policy):
    """Keep every checkpoint."""

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        return [(True, "all are kept")] * len(candidates)


@dataclass(frozen=True)
class KeepLast(Policy):
    """Keep the last ``n`` checkpoints.

    Raises:
        ConfigError: ``n`` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count(self.n, f"KeepLast({self.n!r})")

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        first = len(candidates) - self.n
        text = "the last one" if self.n == 1 else f"among the last {self.n}"
        return [
            (True, text) if index >= first else (False, f"not {text}") for index in range(len(candidates))
        ]


@dataclass(frozen=True)
class KeepEvery(Policy):
    """Keep each checkpoint whose step can be divided by ``n``, for ever.

    Raises:
        ConfigError: ``n`` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count(self.n, f"KeepEvery({self.n!r})")

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        kept = [one.step is not None and one.step % self.n == 0 for one in candidates]
        return [(stays, f"step {'' if stays else 'not '}divisible by {self.n}") for stays in kept]


@dataclass(frozen=True)
class KeepBest(Policy):
    """Keep the ``k`` best by a metric. A tie keeps the older; NaN, or no such metric, is never among them.

    Args:
        k: How many.
        metric: A key of what ``save(metrics=)`` was given.
        mode: "min" or "max": which end is better.

    Raises:
        ConfigError: ``k`` is less than 1, or ``mode`` is something else.
    """

    k: int
    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        _check_count(self.k, f"KeepBest({self.k!r}, {self.metric!r})")
        if self.mode not in ("min", "max"):
            raise ConfigError(f'KeepBest(mode={self.mode!r}): mode is "min" or "max".')

    def best(self, candidates: Sequence[C]) -> list[C]:
        """The ``k`` best, the best one first."""
        scores = [(one, one.metrics.get(self.metric, math.nan)) for one in candidates]
        numbers = [(one, score) for one, score in scores if not math.isnan(score)]
        sign = 1 if self.mode == "min" else -1
        return [one for one, _ in sorted(numbers, key=lambda pair: sign * pair[1])][: self.k]

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        best = {id(one) for one in self.best(candidates)}
        text = f"the best by {self.metric}" if self.k == 1 else f"among the {self.k} best by {self.metric}"
        opinions = []
        for one in candidates:
            score = one.metrics.get(self.metric)
            number = f"it has no {self.metric}" if score is None else f"{score:.4g}"
            stays = id(one) in best
            opinions.append((stays, f"{'' if stays else 'not '}{text} ({number})"))
        return opinions


@dataclass(frozen=True)
class KeepNewer(Policy):
    """Keep what was saved less than a time ago.

    Args:
        than: How long ago.

    Raises:
        ConfigError: ``than`` is not a positive `datetime.timedelta`.
    """

    than: timedelta

    def __post_init__(self) -> None:
        if not isinstance(self.than, timedelta) or self.than <= timedelta(0):
            raise ConfigError(
                f"KeepNewer({self.than!r}): give a positive datetime.timedelta, such as timedelta(days=2)."
            )

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        limit = now - self.than.total_seconds()
        return [
            (True, f"newer than {self.than}") if one.saved_at > limit else (False, f"older than {self.than}")
            for one in candidates
        ]


@dataclass(frozen=True)
class _Any(Policy):
    policies: tuple[Policy, ...]

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        return [_joined(any, opinions) for opinions in _of_each(self.policies, candidates, now)]


@dataclass(frozen=True)
class _All(Policy):
    policies: tuple[Policy, ...]

    def opinions(self, candidates: Sequence[Candidate], now: float) -> list[Opinion]:
        return [_joined(all, opinions) for opinions in _of_each(self.policies, candidates, now)]


def _parts(policy: Policy, kind: type[_Any] | type[_All]) -> tuple[Policy, ...]:
    if not isinstance(policy, Policy):
        raise ConfigError(f"{policy!r} is not a policy of what to keep, such as KeepLast(3).")
    return policy.policies if isinstance(policy, kind) else (policy,)


def _of_each(
    policies: tuple[Policy, ...], candidates: Sequence[Candidate], now: float
) -> list[tuple[Opinion, ...]]:
    return list(zip(*(policy.opinions(candidates, now) for policy in policies), strict=True))


def _joined(rule: Callable[[Iterable[bool]], bool], opinions: Sequence[Opinion]) -> Opinion:
    """The verdict of several policies, with the reasons of those that decided it."""
    kept = rule(stays for stays, _ in opinions)
    return kept, "; ".join(reason for stays, reason in opinions if stays is kept)


def _check_count(count: int, said: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"{said}: give a whole number of at least 1.")


def policy_of(keep: int | Policy | None) -> Policy:
    """The policy that ``keep=`` means: 3 is `KeepLast(3) <KeepLast>`, None keeps all.

    Raises:
        ConfigError: it is none of these.
    """
    if keep is None:
        return KeepAll()
    if isinstance(keep, Policy):
        return keep
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return KeepLast(keep)
    raise ConfigError(
        f"keep={keep!r}: give a whole number of at least 1, None to keep all, or policies such as "
        'KeepBest(1, "val_loss") | KeepLast(3).'
    )


def first_ranking(policy: Policy) -> KeepBest | None:
    """The first `KeepBest` in a policy: by what it ranks there is a best checkpoint."""
    if isinstance(policy, KeepBest):
        return policy
    if isinstance(policy, (_Any, _All)):
        found = (first_ranking(one) for one in policy.policies)
        return next((one for one in found if one is not None), None)
    return None


def judge(
    policy: Policy, candidates: Sequence[Candidate], *, now: float, protected: Collection[str] = ()
) -> list[Verdict]:
    """Decide of each checkpoint whether it stays or goes, and say why.

    The newest one stays whatever the policy says.

    Args:
        policy: What to keep.
        candidates: All that are durable, oldest first.
        now: Seconds since 1970.
        protected: Paths that stay.
    """
    verdicts = []
    for index, (one, (kept, reason)) in enumerate(
        zip(candidates, policy.opinions(candidates, now), strict=True)
    ):
        if one.path in protected:
            kept, reason = True, "the run went on from it"
        elif index == len(candidates) - 1:
            kept, reason = True, "the newest"
        verdicts.append(Verdict(one.path, kept, reason))
    return verdicts
