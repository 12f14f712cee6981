"""Rank 0's part in what ranks agree on: it hears from all of them and decides. No threads, and no I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

END_OF_FIT = "the end of the fit"
SCRIPT_ENDED = "its script has ended"
"""The meeting at which all that is still to be done is due."""


@dataclass
class _Hold:
    """A question under way: where is everybody?"""

    number: int
    actions: list[list[Any]]
    ticks: dict[int, int] = field(default_factory=dict)


@dataclass
class _Meeting:
    """Who has come to a meeting, where from, and since when it is waited for the others."""

    name: str
    rule: str
    since_s: float
    came: dict[int, dict[str, Any]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    said: bool = False


class Chair:
    """Decides when what was posted is due, and when a meeting is complete, or never will be.

    What is posted is due at one tick on all ranks: 1 past the furthest of them. To find that out each rank is
    asked to hold: from its answer on it does not go past its next tick before the decision is there. So no
    rank can be beyond the tick that is decided, and nobody has to guess how far ranks may be apart.

    Args:
        world_size: Processes in the job.
        to_all: Sends every rank a message.
        say: Says a line.
        say_after_s: After so many seconds of waiting those who are missing are named and asked for.
        silent_after_s: A rank that has not answered for so long is gone.
    """

    def __init__(
        self,
        world_size: int,
        to_all: Callable[[list[Any]], None],
        say: Callable[[str], None],
        say_after_s: float,
        silent_after_s: float,
    ) -> None:
        self.world_size, self._to_all, self._say = world_size, to_all, say
        self.say_after_s, self.silent_after_s = say_after_s, silent_after_s
        self.fit = 0
        self._over = True
        self._posts: list[tuple[int, list[Any]]] = []
        self._hold: _Hold | None = None
        self._holds = 0
        self._meetings: dict[int, _Meeting] = {}
        self._gone: dict[int, str] = {}
        self._silent: dict[int, float] = {}
        self._ask_at_s: float | None = None

    # -- actions ---------------------------------------------------------------------------------------------

    def begin(self, fit: int) -> None:
        """Rank 0 has begun a fit: what was posted for earlier ones is void."""
        self.fit, self._over, self._hold = fit, False, None
        self._posts = [one for one in self._posts if one[0] >= fit]
        self._propose()

    def end(self, fit: int) -> None:
        """Rank 0 has ended a fit, by an error or because there was nothing to train."""
        if fit == self.fit:
            self._over, self._hold = True, None

    def posted(self, fit: int, action: list[Any]) -> None:
        """Take in what some rank wants done; what is wanted already is not done twice.

        Args:
            fit: The fit that it is for.
            action: The name, the value, and the rank that posted it.
        """
        if fit < self.fit or (fit == self.fit and self._over):
            return
        held = self._hold.actions if self._hold is not None and fit == self.fit else []
        if all(one[:2] != action[:2] for one in [*held, *(kept for at, kept in self._posts if at == fit)]):
            self._posts.append((fit, action))
        self._propose()

    def answered(self, fit: int, number: int, rank: int, tick: int) -> None:
        """Take in where a rank is that holds."""
        hold = self._hold
        if hold is None or fit != self.fit or number != hold.number:
            return
        self._gone.pop(rank, None)
        hold.ticks[rank] = tick
        if len(hold.ticks) == self.world_size:
            self._hold = None
            self._to_all(["due", fit, max(hold.ticks.values()) + 1, hold.actions])
            self._propose()
            self._complete()

    def _propose(self) -> None:
        actions = [action for at, action in self._posts if at == self.fit]
        if self._over or self._hold is not None or not actions:
            return
        self._posts = [one for one in self._posts if one[0] != self.fit]
        self._holds += 1
        self._hold = _Hold(self._holds, actions)
        self._to_all(["hold", self.fit, self._holds])

    # -- meetings --------------------------------------------------------------------------------------------

    def arrived(self, number: int, rank: int, name: str, rule: str, position: dict[str, Any]) -> None:
        """Take in that a rank is at its ``number``-th meeting, which it calls ``name``."""
        meeting = self._meetings.setdefault(number, _Meeting(name, rule, time.monotonic()))
        self._gone.pop(rank, None)  # it has gone on after all
        meeting.came[rank] = position
        meeting.names[rank] = name
        self._complete()

    def _complete(self) -> None:
        for number, meeting in list(self._meetings.items()):
            if len(set(meeting.names.values())) > 1:
                self._apart(number, _elsewhere(meeting))
            elif len(meeting.came) == self.world_size:
                if meeting.name == END_OF_FIT:
                    if self._hold is not None:
                        continue  # what it decides is due here
                    self._over = True
                del self._meetings[number]
                self._to_all(["met", number, self._left_over() if meeting.name == END_OF_FIT else []])
            elif gone := [rank for rank in self._gone if rank not in meeting.came]:
                why = self._gone[gone[0]]
                rule = f" {meeting.rule}" if why == SCRIPT_ENDED else ""
                self._apart(number, f"{meeting.name}: {_ranks(gone)} {_is(gone)} gone: {why}.{rule}")

    def _left_over(self) -> list[list[Any]]:
        found = [action for at, action in self._posts if at == self.fit]
        self._posts = [one for one in self._posts if one[0] != self.fit]
        return found

    def _apart(self, number: int, why: str) -> None:
        del self._meetings[number]
        self._to_all(["apart", number, why])

    # -- who is missing --------------------------------------------------------------------------------------

    def here(self, rank: int, attended: int, position: dict[str, Any]) -> None:
        """Take in where a rank is that was asked; it cannot come any more to a meeting that it is past."""
        self._silent.pop(rank, None)
        for number, meeting in list(self._meetings.items()):
            if rank in meeting.came or attended >= number:
                continue
            if any(is_beyond(position, theirs) for theirs in meeting.came.values()):
                came = sorted(meeting.came)
                self._apart(
                    number,
                    f"{meeting.name}: {_ranks(came)} {_is(came)} there, and rank {rank} has gone past it: "
                    f"it is {position['place']}. {meeting.rule}",
                )

    def all_others_gone(self) -> bool:
        """Whether nobody is left to decide for."""
        return len(set(self._gone) - {0}) == self.world_size - 1

    def gone(self, rank: int, why: str) -> None:
        """Take in that a rank has ended, or does not answer."""
        self._gone[rank] = why
        self._complete()
        self._to_all(["gone", rank, why])

    def late(self) -> float | None:
        """Name who is missing and ask where they are, if it is time for that; return the next time for it."""
        hold = self._hold
        waited_for = [set(range(self.world_size)) - set(one.came) for one in self._meetings.values()]
        if hold is not None:
            waited_for.append(set(range(self.world_size)) - set(hold.ticks))
        missing = set[int]().union(*waited_for) - set(self._gone)
        if not missing:
            self._ask_at_s = None
            self._silent.clear()
            return None
        now_s = time.monotonic()
        if self._ask_at_s is None:
            self._ask_at_s = now_s + self.say_after_s
        if now_s < self._ask_at_s:
            return self._ask_at_s
        self._ask_at_s = now_s + self.say_after_s
        for meeting in self._meetings.values():
            absent = sorted(set(range(self.world_size)) - set(meeting.came) - set(self._gone))
            waited_s = now_s - meeting.since_s
            if absent and not meeting.said and waited_s >= self.say_after_s:
                meeting.said = True
                self._say(
                    f"{meeting.name}: {_ranks(meeting.came)} {_has(meeting.came)} waited {waited_s:.0f} s "
                    f"for {_ranks(absent)}. {meeting.rule}"
                )
        for rank in sorted(missing):
            if now_s - self._silent.setdefault(rank, now_s) >= self.silent_after_s:
                self.gone(rank, f"it has not answered for {self.silent_after_s:.0f} s")
        self._to_all(["where"])
        return self._ask_at_s


def is_beyond(position: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a position lies behind another one in the order of the program.

    Each number of ``order`` only ever grows as a run goes on; so does ``phase`` within a batch, where known.
    """
    mine, theirs = position["order"], other["order"]
    if mine == theirs:
        phase, their_phase = position.get("phase"), other.get("phase")
        return phase is not None and their_phase is not None and phase > their_phase
    return any(a > b for a, b in zip(mine, theirs, strict=False))


def _elsewhere(meeting: _Meeting) -> str:
    places: dict[str, list[int]] = {}
    for rank, name in sorted(meeting.names.items()):
        places.setdefault(name, []).append(rank)
    told = ", ".join(f"{_ranks(ranks)} {_is(ranks)} at {name}" for name, ranks in places.items())
    return f"Ranks have come apart: {told}. {meeting.rule}"


def _ranks(ranks: Iterable[int]) -> str:
    """Name ranks: "rank 1", "ranks 1 and 2", "ranks 1, 2, 3 and 12 more"."""
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3} more"]
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _is(ranks: Iterable[int]) -> str:
    return "is" if len(list(ranks)) == 1 else "are"


def _has(ranks: Iterable[int]) -> str:
    return "has" if len(list(ranks)) == 1 else "have"
