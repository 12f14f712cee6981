"""What made a job fail: noted in its store by the rank that failed, and looked up there by the others."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from holdfast.errors import RankFailed

_FIRST = "failures/first"
_A_LONG_TIME = timedelta(days=1)
_NOTE_COMES_WITHIN_S = 1.0
"""A process that was killed is noted by the one that had started it, once that hears of it."""
_ANSWERS_COME_WITHIN_S = 3.0
_TEXTS = ("gloo", "NCCL", "ProcessGroup", "Connection closed", "Connection reset", "Broken pipe")


@dataclass(frozen=True)
class Failure:
    """How a rank ended that the others needed.

    Attributes:
        rank: which.
        what: the sentence's end: "failed with ValueError: no", "was killed by SIGKILL".
        traceback: where, or "".
    """

    rank: int
    what: str
    traceback: str = ""

    def error(self) -> RankFailed:
        """The error for the ranks that cannot go on because of it."""
        message = f"rank {self.rank} {self.what}."
        if self.traceback:
            message += f"\n\nOn rank {self.rank}:\n\n{self.traceback.rstrip()}\n"
        return RankFailed(message, rank=self.rank)


def of_error(rank: int, error: BaseException) -> Failure:
    """A rank's own error, as the others are told of it."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = "".join(traceback.format_exception(error))
    return Failure(rank, f"failed with {said.splitlines()[0].rstrip('.')}", text)


def of_exit_code(rank: int, code: int) -> Failure:
    """How a process ended, as who started it hears of it; minus a signal's number for a signal."""
    if code >= 0:
        return Failure(rank, f"ended with exit code {code}, while the others needed it")
    with suppress(ValueError):
        return Failure(rank, f"was killed by {signal.Signals(-code).name}")
    return Failure(rank, f"was killed by signal {-code}")


def note(store: Any, failure: Failure) -> None:
    """Write it into the job's store, if it is the first: what follows from it is no cause."""
    store.compare_set(_FIRST, "", json.dumps(asdict(failure)))


def look(store: Any) -> Failure | None:
    """What has made the job fail, or None; asks the store once or twice.

    Args:
        store: The job's (`ParallelStrategy.store`) on a connection on which nobody waits.
    """
    if not store.check([_FIRST]):
        return None
    return Failure(**json.loads(store.get(_FIRST)))


def is_of_communication(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that of a connection with other processes."""
    import torch.distributed as dist

    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, dist.DistError):
            return True
        if isinstance(at, RuntimeError) and any(text in str(at) for text in _TEXTS):
            return True
        at = at.__cause__ or at.__context__
    return False


class Watch:
    """A thread that hears at once when the job has failed, and answers when somebody asks who is there.

    While all goes well it sleeps in the store, on a connection of its own.

    Args:
        store: The job's; it is cloned.
        rank: This process.
        world_size: Processes in the job.
        failed: Called by the thread when it hears that the job has failed.
    """

    def __init__(self, store: Any, rank: int, world_size: int, failed: Callable[[Failure], None]) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._connection = store.clone(), store.clone()
        self._failed = failed
        self._heard = threading.Event()
        self.failure: Failure | None = None
        """What has made the job fail, once it is heard of."""
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._listen, name="holdfast-failures", daemon=True)
        self._thread.start()

    # -- on the rank that fails ------------------------------------------------------------------------------

    def tell(self, failure: Failure, *, wait_s: float = 0.0) -> None:
        """Note a failure and wake everybody.

        Blocks: until all have heard of it, for ``wait_s`` at most.
        """
        self.failure = self.failure or failure
        try:
            note(self._store, failure)
            for rank in range(self.world_size):
                self._call(rank, "failed")
            ends = time.monotonic() + wait_s
            heard = [f"failures/heard/{rank}" for rank in range(self.world_size)]
            while time.monotonic() < ends and not self._store.check(heard):
                time.sleep(0.02)
        except Exception:  # the store is gone, since its rank has failed before
            return

    def left(self, why: str) -> None:
        """Note that this process leaves in good order: should somebody need it still, they read why."""
        with suppress(Exception):
            self._store.set(f"failures/left/{self.rank}", why)

    # -- on the others ---------------------------------------------------------------------------------------

    def cause(self) -> Failure | None:
        """Find out what broke a connection; None where every rank is there and none has failed.

        Blocks: for some seconds at most.
        """
        if self._heard.wait(_NOTE_COMES_WITHIN_S):
            return self.failure
        try:
            missing = self._who_is_missing()
        except Exception:
            # The store was rank 0's, or that of the agent that had started it.
            return self.failure or Failure(0, "is gone, and the job's store with it")
        if self._heard.is_set() or not missing:
            return self.failure
        return self._how_it_left(missing)

    def _who_is_missing(self) -> list[int]:
        number = self._store.add("failures/calls", 1)
        answers = {rank: f"failures/call {number}/{rank}" for rank in range(self.world_size)}
        for rank in answers:
            self._call(rank, f"call {number}")
        ends = time.monotonic() + _ANSWERS_COME_WITHIN_S
        while answers and time.monotonic() < ends and not self._heard.wait(0.05):
            answers = {rank: key for rank, key in answers.items() if not self._store.check([key])}
        return sorted(answers)

    def _how_it_left(self, missing: list[int]) -> Failure:
        rank = missing[0]
        with suppress(Exception):
            for one in missing:
                if self._store.check([f"failures/left/{one}"]):
                    return Failure(one, f"has left: {self._store.get(f'failures/left/{one}').decode()}")
        if len(missing) == 1:
            return Failure(rank, "is gone")
        others = " and ".join(map(str, missing[1:]))
        return Failure(rank, f"is gone, and {others} too")

    # -- the thread ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the thread. Blocks: for some seconds at most."""
        if os.getpid() == self._pid:
            with suppress(Exception):
                self._call(self.rank, "end")
                self._thread.join(5)

    def _call(self, rank: int, what: str) -> None:
        number = self._store.add(f"failures/to {rank}", 1)
        self._store.set(f"failures/to {rank}/{number}", what)

    def _listen(self) -> None:
        read = 1
        while True:
            key, began = f"failures/to {self.rank}/{read}", time.monotonic()
            try:
                self._connection.wait([key], _A_LONG_TIME)
                what = self._connection.get(key).decode()
                if what == "end":
                    return
                if what == "failed":
                    self._hear(look(self._connection))
                    self._connection.set(f"failures/heard/{self.rank}", "")
                else:
                    self._connection.set(f"failures/{what}/{self.rank}", "")
            except Exception:
                if time.monotonic() - began < _A_LONG_TIME.total_seconds() / 2:
                    return  # the store is gone; whoever needs another rank finds that out by itself
                continue
            read += 1

    def _hear(self, failure: Failure | None) -> None:
        if failure is not None and not self._heard.is_set():
            self.failure = failure
            self._heard.set()
            self._failed(failure)


def say(line: str) -> None:
    """Say a line from a thread, whatever state Python's own streams are in."""
    with suppress(OSError, ValueError):
        os.write(2, f"{line}\n".encode())


def leave(code: int) -> None:
    """End this process here and now, from any thread; what was printed is not lost."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
