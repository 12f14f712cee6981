"""What ranks agree on without a collective per step: what to do at the same safe point, and who is where."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from holdfast.errors import RankFailed
from holdfast.strategies.chair import END_OF_FIT, SCRIPT_ENDED, Chair
from holdfast.strategies.mailbox import Mailbox
from holdfast.utilities.rank_zero import rank_zero_info


@dataclass(frozen=True)
class Action:
    """Something that all ranks do at the same safe point.

    Attributes:
        name: what.
        value: plain values that belong to it.
        rank: which rank posted it; where several did, the one that was heard first.
    """

    name: str
    value: Any
    rank: int


def _lost() -> RankFailed:
    return RankFailed("rank 0 is gone: the job's store does not answer.", rank=0)


def _nowhere() -> dict[str, Any]:
    return {"order": [], "phase": None, "place": "outside of a fit"}


class Agreement:
    """What any rank wants done at one safe point on all ranks, agreed through the job's store.

    While nothing is wanted no step pays for it: the threads of a `Mailbox` sleep. When some rank posts an
    action, rank 0's thread asks every rank to hold. Each rank's thread registers the hold, so that the loop
    comes to its safe points, and answers with its tick, a count of the safe points of the run. Rank 0's
    decides that the action is due one tick past the furthest (see `Chair`). A loop that gets to its next safe
    point before that is decided waits there, for as long as a few messages take: threads answer, whatever
    their loops are waiting for, so nobody waits for a rank that waits.

    Ticks are counted from the same beginning on every rank and have to grow by at most 1 from one safe point
    to the next.

    Args:
        store: The job's store, with a prefix of this object's own.
        rank: This process.
        world_size: Processes in the job.
        timeout_s: After this time a rank that waits for others in vain gives up.
    """

    say_after_s = 10.0
    """After so many seconds of waiting those who are missing are named, and asked where they are."""
    silent_after_s = 60.0
    """A rank whose thread has not answered for so long, while somebody waits for it, is gone."""

    look: Callable[[], None] | None = None
    """Called every `look_every_s` while this rank waits; raises RankFailed where it sees that one is gone."""
    look_every_s = 1.0

    leave_after_s = 5.0
    """For so many seconds rank 0 waits for the others before it ends its threads."""

    def __init__(self, store: Any, rank: int, world_size: int, *, timeout_s: float = 1800.0) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.operations = 0
        """How many operations that all ranks take part in this one has begun; the strategy counts them."""
        self._changed = threading.Condition()
        self._fit = 0
        self._running, self._in_order = False, True
        self._pid = os.getpid()
        self._tick: Callable[[], int] = lambda: 0
        self._hold: Callable[[], None] = lambda: None
        self._where: Callable[[], dict[str, Any]] = _nowhere
        self._held = 0
        self._early: list[Any] | None = None
        self._due: list[tuple[int, list[Action]]] = []
        self._attended = 0
        self._outcome: list[Any] | None = None
        self._failed: RankFailed | None = None
        self._store_is_lost = False
        self._chair: Chair | None = None
        if rank == 0:
            self._chair = Chair(
                world_size, self._to_all, rank_zero_info, self.say_after_s, self.silent_after_s
            )
        self._mailbox = Mailbox(
            store, rank, world_size, handle=self._handle, late=self._late, lost=self._lost
        )  # fmt: skip
        atexit.register(_close, weakref.ref(self))

    # -- a fit -----------------------------------------------------------------------------------------------

    def begin(
        self,
        tick: Callable[[], int],
        hold: Callable[[], None],
        where: Callable[[], dict[str, Any]] = _nowhere,
    ) -> None:
        """A fit begins: from now on actions can be posted.

        Args:
            tick: Tells the tick that the loop is at; called by another thread. It may be ahead of what has
                happened, never behind.
            hold: Makes the loop call `due` at its next safe point; called by another thread.
            where: Tells the position: "order", numbers that only grow, "phase", and "place" in words.

        Ranks: all, the same number of times.
        """
        with self._changed:
            self._fit += 1
            self._tick, self._hold, self._where = tick, hold, where
            self._held, self._due, self._running, self._in_order = 0, [], True, True
            self._failed = _lost() if self._store_is_lost else None
        self._mailbox.hand_in(["begin", self._fit])

    def end(self, *, in_order: bool = True) -> None:
        """The fit is over: what was agreed and not done yet is void. Does nothing where none is running.

        Args:
            in_order: All ranks have ended it, or will; if not, nobody is waited for when the script ends.
        """
        self._in_order = in_order
        with self._changed:
            if not self._running:
                return
            self._running = False
            self._tick, self._hold = lambda: 0, lambda: None
            self._held, self._due, self._where = 0, [], _nowhere
            self._failed = _lost() if self._store_is_lost else None
            self._changed.notify_all()
        self._mailbox.hand_in(["end", self._fit])

    def fail(self, error: RankFailed) -> None:
        """The job has failed: whoever waits here, or is about to, gets the error. Any thread may call it."""
        with self._changed:
            self._failed = error
            self._changed.notify_all()

    def post(self, name: str, value: Any = None) -> None:
        """Have all ranks do something at the same safe point, soon.

        Returns at once and takes no lock: any thread, and a signal's handler, may call it. What is posted
        with the same name and value before that was decided is done once. What comes after the end of the
        fit was agreed is dropped.
        """
        self._mailbox.hand_in(["post", self._fit, name, value])

    @property
    def pending(self) -> bool:
        """Whether the loop has to call `due` at its next safe point."""
        return bool(self._held or self._due)

    def due(self, tick: int) -> list[Action]:
        """Return what is to be done at this safe point, on every rank the same.

        Blocks: while it is being decided when something is due.

        Raises:
            RankFailed: a rank that takes part in that decision is gone.
        """
        with self._changed:
            self._wait_until(lambda: not self._held, "the decision of when to stop or save")
            ready = [action for at, actions in self._due if at <= tick for action in actions]
            self._due = [one for one in self._due if one[0] > tick]
            return ready

    def finish(self) -> list[Action]:
        """Meet at the end of the fit; return all that was posted and not done. Nothing can be posted after.

        Ranks: all.
        Blocks: until the last one comes.

        Raises:
            RankFailed: a rank is gone, or elsewhere.
        """
        left = self.meet(END_OF_FIT, "Training has ended on some ranks and not on others.")
        with self._changed:
            ready = [action for _, actions in self._due for action in actions]
            self._due = []
        return ready + [Action(*one) for one in left]

    # -- meetings --------------------------------------------------------------------------------------------

    def meet(self, name: str, rule: str) -> list[Any]:
        """Wait until every rank is here.

        After `say_after_s` a line names those who are missing, and they are asked where they are.

        Args:
            name: What this is, the same on every rank.
            rule: What to do so that all ranks come; said to whoever waits in vain.

        Ranks: all.
        Blocks: until the last one comes.

        Raises:
            RankFailed: a rank has gone past this, is at another meeting, is gone, or has not come in time.
        """
        position = self._position()
        with self._changed:
            self._attended += 1
            self._outcome = None
            self._mailbox.hand_in(["arrive", self._attended, name, rule, position])
            try:
                self._wait_until(lambda: self._outcome is not None, name)
            except RankFailed:
                self._attended -= 1
                raise
            outcome = self._outcome
            assert outcome is not None
            if outcome[0] == "apart":
                self._attended -= 1
                raise RankFailed(outcome[2])
            left: list[Any] = outcome[2]
            return left

    def _position(self) -> dict[str, Any]:
        position = self._where()
        fits = 2 * self._fit + (not self._running)
        return {**position, "order": [fits, self.operations, *position["order"]]}

    def _wait_until(self, done: Callable[[], bool], what: str) -> None:
        ends_s = time.monotonic() + self.timeout_s
        while not done():
            if self._failed is not None:
                raise self._failed
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                raise RankFailed(
                    f"{what}: the other ranks have not come within {self.timeout_s:.0f} s. Give the strategy "
                    "a longer timeout= if they are only slow."
                )
            self._changed.wait(min(left_s, self.look_every_s))
            if not done() and self.look is not None:
                self.look()

    def rest(self) -> None:
        """Tell rank 0 that this one takes part in nothing until it next comes to something."""
        self._mailbox.hand_in(["leave"])

    def close(self) -> None:
        """End the threads; the object cannot be used any more.

        Blocks: for some seconds at most. Rank 0, which may have the job's store, is the last to leave.
        """
        chair = self._chair
        if os.getpid() != self._pid:
            return
        if chair is not None and self._failed is None and self._in_order:
            with self._changed:
                self._changed.wait_for(chair.all_others_gone, self.leave_after_s)
        self._mailbox.close(["leave"])

    # -- the handling thread ---------------------------------------------------------------------------------

    def _handle(self, message: list[Any]) -> None:
        _HANDLERS[message[0]](self, *message[1:])

    def _to_all(self, message: list[Any]) -> None:
        self._mailbox.to_all(message)

    def _late(self) -> float | None:
        if self._chair is None:
            return None
        self._chair.say_after_s, self._chair.silent_after_s = self.say_after_s, self.silent_after_s
        return self._chair.late()

    def _lost(self) -> None:
        self._store_is_lost = True
        self.fail(_lost())

    # From this process.

    def _own_begin(self, fit: int) -> None:
        if self._chair is not None:
            self._chair.begin(fit)
        if self._early is not None and self._early[0] == fit:
            early, self._early = self._early, None
            self._all_hold(*early)

    def _own_end(self, fit: int) -> None:
        if self._chair is not None:
            self._chair.end(fit)

    def _own_post(self, fit: int, name: str, value: Any) -> None:
        self._mailbox.to_zero(["posted", fit, [name, value, self.rank]])

    def _own_arrival(self, number: int, name: str, rule: str, position: dict[str, Any]) -> None:
        self._mailbox.to_zero(["arrived", number, self.rank, name, rule, position])

    def _own_leaving(self) -> None:
        self._mailbox.to_zero(["bye", self.rank])

    # To rank 0.

    def _zero_posted(self, fit: int, action: list[Any]) -> None:
        assert self._chair is not None
        self._chair.posted(fit, action)

    def _zero_answered(self, *answer: Any) -> None:
        assert self._chair is not None
        self._chair.answered(*answer)

    def _zero_arrived(self, *arrival: Any) -> None:
        assert self._chair is not None
        self._chair.arrived(*arrival)

    def _zero_here(self, *place: Any) -> None:
        assert self._chair is not None
        self._chair.here(*place)

    def _zero_bye(self, rank: int) -> None:
        assert self._chair is not None
        self._chair.gone(rank, SCRIPT_ENDED)
        with self._changed:
            self._changed.notify_all()

    # To all ranks.

    def _all_hold(self, fit: int, number: int) -> None:
        tick = 0
        with self._changed:
            if fit > self._fit:
                self._early = [fit, number]  # rank 0 has begun it already
                return
            if fit == self._fit and self._running:
                self._held = number
                # First, so that the loop sees the hold at the safe point behind the tick that is read below.
                self._hold()
                tick = self._tick()
        self._mailbox.to_zero(["answered", fit, number, self.rank, tick])

    def _all_due(self, fit: int, tick: int, actions: list[list[Any]]) -> None:
        with self._changed:
            if fit == self._fit and self._running:
                self._due.append((tick, [Action(*action) for action in actions]))
                self._held = 0
                self._changed.notify_all()

    def _all_met(self, *outcome: Any) -> None:
        self._decided(["met", *outcome])

    def _all_apart(self, *outcome: Any) -> None:
        self._decided(["apart", *outcome])

    def _decided(self, outcome: list[Any]) -> None:
        with self._changed:
            if outcome[1] == self._attended:
                self._outcome = outcome
                self._changed.notify_all()

    def _all_where(self) -> None:
        self._mailbox.to_zero(["here", self.rank, self._attended, self._position()])

    def _all_gone(self, rank: int, why: str) -> None:
        if (self._running or rank == 0) and rank != self.rank and self._failed is None:
            self.fail(RankFailed(f"rank {rank} is gone: {why}.", rank=rank))


_HANDLERS: dict[str, Callable[..., None]] = {
    "begin": Agreement._own_begin,
    "end": Agreement._own_end,
    "post": Agreement._own_post,
    "arrive": Agreement._own_arrival,
    "leave": Agreement._own_leaving,
    "posted": Agreement._zero_posted,
    "answered": Agreement._zero_answered,
    "arrived": Agreement._zero_arrived,
    "here": Agreement._zero_here,
    "bye": Agreement._zero_bye,
    "hold": Agreement._all_hold,
    "due": Agreement._all_due,
    "met": Agreement._all_met,
    "apart": Agreement._all_apart,
    "where": Agreement._all_where,
    "gone": Agreement._all_gone,
}


def _close(agreement: weakref.ref[Agreement]) -> None:
    # A thread that is in the store when the interpreter ends would take the process down with it.
    found = agreement()
    if found is not None:
        found.close()


# -- the one of this job -------------------------------------------------------------------------------------

_current: tuple[Any, Agreement] | None = None


def of_job(store: Any, rank: int, world_size: int, timeout_s: float) -> Agreement:
    """Return this process's agreement with the ranks that share the store; made at the first call for it.

    Ranks: all, for each store.
    """
    global _current
    if _current is None or _current[0] is not store:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        before = _current
        _current = store, Agreement(PrefixStore("agreement", store), rank, world_size, timeout_s=timeout_s)
        if before is not None:
            before[1].leave_after_s = 0.0  # its ranks have failed
            before[1].close()
    _current[1].timeout_s = timeout_s
    return _current[1]


def job_failed(error: RankFailed) -> None:
    """Let nobody wait for others any more: the job has failed. Any thread may call it."""
    if _current is not None:
        _current[1].fail(error)
