"""What ranks agree on: the same action at the same safe point, and a name for whoever is missing."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from holdfast.errors import RankFailed
from holdfast.strategies.agreement import Agreement

from .ranks import run_ranks, start_ranks


def connect(**options: Any) -> Agreement:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        "127.0.0.1",
        int(os.environ["MASTER_PORT"]),
        world_size,
        rank == 0,
        timeout=timedelta(seconds=60),
    )
    # The store is rank 0's: it must not go before the others are done with it.
    connect.store = store  # type: ignore[attr-defined]
    return Agreement(PrefixStore("agreement", store), rank, world_size, **options)


class Loop:
    """A loop with safe points, as a fit has: it looks for actions only where a hold has asked it to."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.tick = 0
        self.asked: list[None] = []
        self.done: list[tuple[int, str, Any]] = []

    def begin(self) -> None:
        self.tick = 0
        self.asked.clear()
        self.done.clear()
        self.agreement.begin(lambda: self.tick, lambda: self.asked.append(None), self.where)

    def where(self) -> dict[str, Any]:
        return {"order": [self.tick], "phase": None, "place": f"at tick {self.tick}"}

    def step(self) -> None:
        self.tick += 1
        if self.asked:
            self.asked.clear()
            self.done += [(self.tick, one.name, one.value) for one in self.agreement.due(self.tick)]
            if self.agreement.pending:
                self.asked.append(None)

    def finish(self) -> None:
        self.done += [(-1, one.name, one.value) for one in self.agreement.finish()]
        self.agreement.end()


def race(seed: int, fits: int) -> list[list[tuple[int, str, Any]]]:
    """Loops that drift apart, and posts from everywhere, until the very end of several fits."""
    agreement = connect()
    agreement.say_after_s = 60.0
    rank = int(os.environ["RANK"])
    draw = random.Random(f"{seed}.{rank}")
    loop, found = Loop(agreement), []
    for fit in range(fits):
        length = random.Random(f"{seed}.{fit}").choice([0, 1, 3, 40])
        loop.begin()
        posts = sorted(draw.randrange(length + 1) for _ in range(draw.choice([0, 1, 3])))
        threads = []
        for step in range(length):
            for number in [at for at in posts if at == step]:
                thread = threading.Thread(target=agreement.post, args=(f"from {rank}", number))
                thread.start()
                threads.append(thread)
            if draw.random() < 0.3:
                time.sleep(draw.random() * 0.004)
            loop.step()
        for number in [at for at in posts if at == length]:
            agreement.post(f"from {rank}", number)
        for thread in threads:
            thread.join()
        loop.finish()
        found.append(list(loop.done))
        agreement.post("too late")
    agreement.close()
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_do_the_same_at_the_same_tick_however_they_race(ranks: int) -> None:
    for seed in range(2):
        found = run_ranks(race, seed, 16, ranks=ranks)
        assert all(one == found[0] for one in found), seed
        names = [name for fit in found[0] for _, name, _ in fit]
        assert "too late" not in names


def everything_posted() -> tuple[list[tuple[int, str, Any]], int]:
    agreement = connect()
    loop = Loop(agreement)
    rank = int(os.environ["RANK"])
    loop.begin()
    agreement.post("stop", rank)
    agreement.post("save")
    agreement.post("save")
    agreement.meet("all have posted", "")
    while len(loop.done) < 4:  # one tick after the other, until all of it was due
        loop.step()
        time.sleep(0.001)
    loop.finish()
    agreement.close()
    return sorted(loop.done, key=lambda one: (one[1], str(one[2]))), loop.tick


def test_what_is_posted_by_several_is_done_once_for_each_value() -> None:
    found = run_ranks(everything_posted, ranks=3)
    assert found[0] == found[1] == found[2]
    assert [(name, value) for _, name, value in found[0][0]] == [
        ("save", None),
        ("stop", 0),
        ("stop", 1),
        ("stop", 2),
    ]


def by_signal() -> list[tuple[int, str, Any]]:
    agreement = connect()
    loop = Loop(agreement)
    loop.begin()
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGUSR1, lambda number, frame: agreement.post("stop", number))
        os.kill(os.getpid(), signal.SIGUSR1)
    while not loop.done:
        loop.step()
    loop.finish()
    agreement.close()
    return loop.done


def test_a_signals_handler_on_one_rank_can_post() -> None:
    found = run_ranks(by_signal, ranks=3)
    assert found[0] == found[1] == found[2]
    assert [one[1:] for one in found[0]] == [("stop", signal.SIGUSR1)]


def threads_and_steps() -> tuple[int, bool, list[str]]:
    before = threading.active_count()
    agreement = connect()
    loop = Loop(agreement)
    for _ in range(3):
        loop.begin()
        loop.step()
        asked = bool(loop.asked)
        loop.finish()
    during = threading.active_count() - before
    agreement.close()
    return during, asked, [one.name for one in threading.enumerate() if "agreement" in one.name]


def test_a_step_is_asked_for_nothing_and_the_threads_end() -> None:
    assert run_ranks(threads_and_steps) == [(2, False, [])] * 2


# -- who is missing ------------------------------------------------------------------------------------------

RULE = "Call it on every rank."
LOST = "rank 0 is gone: the job's store does not answer."


def meet_alone(where: str) -> tuple[str, str]:
    """Rank 0 meets; rank 1 does something else."""
    agreement = connect()
    agreement.say_after_s = 0.1
    loop = Loop(agreement)
    loop.begin()
    agreement.meet("the start", RULE)
    error = ""
    if agreement.rank == 0:
        if where == "failed":
            failure = RankFailed("rank 1 failed with ValueError: no.", rank=1)
            threading.Timer(0.01, agreement.fail, [failure]).start()
        try:
            agreement.meet("saving", RULE)
        except RankFailed as problem:
            error = str(problem)
    elif where == "gone on":
        loop.tick = 7
    elif where == "elsewhere":
        try:
            agreement.meet("validating", RULE)
        except RankFailed as problem:
            error = str(problem)
    elif where == "another operation":
        agreement.operations += 1
    elif where == "late":
        time.sleep(0.35)
        agreement.meet("saving", RULE)
    if agreement.rank == 0 or where != "ended":
        hold_on(agreement)
    agreement.close()
    return error, where


def hold_on(agreement: Agreement) -> None:
    """Until rank 0 has its answer."""
    store = connect.store  # type: ignore[attr-defined]
    if agreement.rank == 0:
        store.set("answered", "")
    store.wait(["answered"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("gone on", "saving: rank 0 is there, and rank 1 has gone past it: it is at tick 7. " + RULE),
        (
            "another operation",
            "saving: rank 0 is there, and rank 1 has gone past it: it is at tick 0. " + RULE,
        ),
        ("elsewhere", "Ranks have come apart: rank 0 is at saving, rank 1 is at validating. " + RULE),
        ("failed", "rank 1 failed with ValueError: no."),
        ("ended", "saving: rank 1 is gone: its script has ended. " + RULE),
        ("late", ""),
    ],
)
def test_who_waits_in_vain_hears_why_in_time(where: str, message: str) -> None:
    ended = start_ranks(meet_alone, where).wait(60)
    assert [one.error for one in ended] == ["", ""]
    assert ended[0].value[0] == message
    assert ended[1].value[0] == (message if where == "elsewhere" else "")
    said = re.findall("(?m)^saving: rank 0 has waited .*$", ended[0].output)
    waits = where in ("gone on", "another operation", "late")
    if waits:
        assert said == ["saving: rank 0 has waited 0 s for rank 1. " + RULE]


def one_is_killed(waits_for: str) -> str:
    agreement = connect()
    agreement.say_after_s, agreement.silent_after_s = 0.1, 0.5
    loop = Loop(agreement)
    loop.begin()
    agreement.meet("the start", RULE)
    if agreement.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if waits_for == "a decision":
            agreement.post("save")
            while True:
                loop.step()
        agreement.finish()
    except RankFailed as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("waits_for", ["a decision", "the end of the fit"])
def test_a_rank_that_was_killed_keeps_nobody_waiting(waits_for: str) -> None:
    ended = start_ranks(one_is_killed, waits_for, ranks=3).wait(60)
    gone = "rank 1 is gone: it has not answered for 0 s."
    assert ended[1].code == -signal.SIGKILL
    # The end of the fit is a meeting, which its message names.
    assert ended[0].value in ((gone,) if waits_for == "a decision" else (gone, f"the end of the fit: {gone}"))
    assert ended[2].value.endswith((gone, LOST))


def rank_zero_is_killed() -> str:
    agreement = connect()
    agreement.begin(lambda: 0, lambda: None)
    try:
        agreement.meet("the start", RULE)
        if agreement.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        agreement.finish()
    except RankFailed as problem:
        return str(problem)
    return ""


def test_without_rank_zero_the_others_do_not_wait() -> None:
    ended = start_ranks(rank_zero_is_killed).wait(60)
    assert ended[0].code == -signal.SIGKILL
    assert ended[1].value == LOST


def wait_too_long() -> str:
    agreement = connect(timeout_s=0.2)
    error = ""
    if agreement.rank == 0:
        try:
            agreement.meet("saving", RULE)
        except RankFailed as problem:
            error = str(problem)
    hold_on(agreement)
    agreement.close()
    return error


def test_nobody_waits_for_longer_than_the_timeout() -> None:
    assert run_ranks(wait_too_long)[0] == (
        "saving: the other ranks have not come within 0 s. Give the strategy a longer timeout= if they are "
        "only slow."
    )
