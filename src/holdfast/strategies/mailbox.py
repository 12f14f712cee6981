"""Messages between ranks through the job's store: each rank has a box, which a thread of its own empties."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

_A_LONG_TIME = timedelta(days=1)
_ENDING_S = 5.0


class Mailbox:
    """What a rank sends to rank 0, and rank 0 to all ranks; handled one message at a time.

    Two daemon threads: one waits in the store for what comes, the other handles it, and what this process
    itself hands in (`hand_in`, which takes no lock and does no I/O: a signal's handler may call it). Each has
    a connection of its own, since a wait holds a connection's lock. While nothing comes both sleep.

    Args:
        store: The job's store, with a prefix that nobody else uses; it is cloned.
        rank: This process.
        world_size: Processes in the job.
        handle: Called by the handling thread with each message, a list of plain values.
        late: Called by it when the time that it returned last is over; returns the next one, in seconds of
            `time.monotonic`, or None for never. Asked again after each message.
        lost: Called by it once the store does not answer any more.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        handle: Callable[[list[Any]], None],
        late: Callable[[], float | None],
        lost: Callable[[], None],
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._handle, self._late, self._lost = handle, late, lost
        self._queue: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._receiving, self._sending = _connection_of_its_own(store), _connection_of_its_own(store)
        self._read = 0
        self._sent = [0] * world_size
        self._closing = False
        self._pid = os.getpid()
        self._threads = [
            threading.Thread(target=run, name=f"holdfast-agreement-{what}", daemon=True)
            for what, run in (("reads", self._receive), ("handles", self._work))
        ]
        for thread in self._threads:
            thread.start()

    def hand_in(self, message: list[Any]) -> None:
        """Have this process's own thread handle a message; any thread, or a signal's handler, may call it."""
        self._queue.put(message)

    # -- called by the handling thread -----------------------------------------------------------------------

    def to_zero(self, message: list[Any]) -> None:
        """Send a message to rank 0, which may be this one."""
        if self.rank == 0:
            self._handle(message)
            return
        try:
            number = self._sending.add("0", 1)
            self._sending.set(f"0/{number}", json.dumps(message))
        except Exception:
            self._queue.put(["lost"])

    def to_all(self, message: list[Any]) -> None:
        """Send a message of rank 0's to every rank; its own comes last."""
        text = json.dumps(message)
        try:
            for rank in range(1, self.world_size):
                self._sent[rank] += 1
                self._sending.set(f"{rank}/{self._sent[rank]}", text)
        except Exception:
            self._queue.put(["lost"])
        self._handle(json.loads(text))

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self, last: list[Any] | None = None) -> None:
        """Handle ``last``, end both threads and wait for them; a forked child has none to end.

        Blocks: for some seconds at most.
        """
        if self._closing or os.getpid() != self._pid:
            return
        if last is not None:
            self.hand_in(last)
        self._queue.put(None)
        self._threads[1].join(_ENDING_S)
        self._closing = True
        # The reader waits for this name, whoever else may be about to use it.
        with suppress(Exception):
            self._sending.set(f"{self.rank}/{self._read + 1}", "[]")
        self._threads[0].join(_ENDING_S)

    # -- the threads -----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        while not self._closing:
            name = f"{self.rank}/{self._read + 1}"
            began = time.monotonic()
            try:
                self._receiving.wait([name], _A_LONG_TIME)
                text = self._receiving.get(name)
            except Exception:
                if time.monotonic() - began > _A_LONG_TIME.total_seconds() / 2:
                    continue  # only nobody has sent anything
                self._queue.put(["lost"])
                return
            self._read += 1
            with suppress(Exception):  # some stores cannot delete
                self._receiving.delete_key(name)
            if not self._closing:
                self._queue.put(json.loads(text))

    def _work(self) -> None:
        at = None
        while True:
            try:
                message = self._queue.get(timeout=None if at is None else max(at - time.monotonic(), 0.0))
            except Empty:
                at = self._late()
                continue
            if message is None:
                return
            if message == ["lost"]:
                self._lost()
            else:
                self._handle(message)
            at = self._late()


def _connection_of_its_own(store: Any) -> Any:
    """A store with the same content, and a connection that nobody else uses."""
    if hasattr(store, "clone"):
        return store.clone()
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    # An older torch. What was wrapped around the store cannot be asked for its prefix, which tells apart the
    # restarts of a job whose store lives on.
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    own: Any = TCPStore(store.host, store.port, is_master=False, timeout=store.timeout)
    return PrefixStore(f"holdfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", own)
