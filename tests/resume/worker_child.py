"""Reads data with workers as a fit does, in a process of its own, which a test then sends signals to.

Usage: worker_child.py METHOD MODE. It prints a line for each thing that a test waits for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

from torch.utils.data import DataLoader, Dataset

from holdfast.training import workers
from holdfast.training.data import BatchStream

SIGNALS = tuple(int(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))


class Rows(Dataset[int]):
    """Rows that are there at once, or as slow as a worker that hangs."""

    def __init__(self, hangs_at: int = -1) -> None:
        self.hangs_at = hangs_at

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> int:
        while index == self.hangs_at:
            time.sleep(1)
        return index


def say(*words: Any) -> None:
    print(*words, flush=True)


def stream_of(method: str, dataset: Rows, **arguments: Any) -> BatchStream:
    loader = DataLoader(dataset, batch_size=1, num_workers=2, multiprocessing_context=method, **arguments)
    return BatchStream(loader, stage="train", index=0, seed=1, shield=SIGNALS)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def another(method: str) -> Any:
    """How a process ends that is no worker, and started in the same way, when it is told to end."""
    process: Any = multiprocessing.get_context(method).Process(target=time.sleep, args=(1e6,))
    process.start()
    if method == "fork":  # it has the handlers that this process has
        process.kill()
    process.terminate()
    process.join()
    return process.exitcode


def main(method: str, mode: str) -> None:
    got: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: got.append(number))
    hangs = 3 if mode in ("closes", "leaves") else -1
    stream = stream_of(method, Rows(hangs), persistent_workers=mode == "leaves")
    say("starting")
    batches = stream.start(0)
    pids = [process.pid for process in stream._running._workers]
    first = next(batches).item()
    say("workers", *pids)
    if mode == "reads":
        # Until the test says that the signals are sent.
        sys.stdin.readline()
        rest = [batch.item() for batch in batches]
        say("read", [first, *rest] == list(range(200)), sorted(set(got)) == sorted(SIGNALS))
        stream.close()
        say("left", len(alive(pids)))
        say("another", another(method))
    elif mode == "closes":
        workers.GRACE_S = 0.1
        stream.close()
        say("left", len(alive(pids)))
    elif mode == "dies":
        sys.stdin.readline()  # and is killed while it waits
    elif mode == "leaves":
        say("leaving")  # with a worker that hangs, and without closing anything


if __name__ == "__main__":
    main(*sys.argv[1:])
