"""Real processes that are the ranks of a job, started as torchrun would start them, but from a warm server.

A fork of a process that has imported torch already is there at once, where a new interpreter takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo.utils",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "holdfast.strategies.ddp",
        "holdfast.testing",
        "holdfast.training.trainer",
    ]
)


@dataclass
class Ended:
    """How one rank ended.

    Attributes:
        rank: which one.
        value: what its function returned; None if it did not.
        error: the traceback that ended it, or "".
        code: its exit code; minus the number of the signal that killed it.
        output: what it wrote to stdout and stderr.
    """

    rank: int
    value: Any
    error: str
    code: int
    output: str


class Ranks:
    """The processes of a job under way."""

    def __init__(self, processes: list[Any], place: tempfile.TemporaryDirectory[str]) -> None:
        self.processes = processes
        self._place = place

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one."""
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout_s: float = 120) -> list[Ended]:
        """How each ended; what has not by then is killed, and told to have hung."""
        ends = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, ends - time.monotonic()))
        hung = [process.is_alive() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        ended = []
        for rank, process in enumerate(self.processes):
            place = Path(self._place.name)
            said = place / f"said{rank}"
            told = place / f"told{rank}"
            value, error = pickle.loads(told.read_bytes()) if told.exists() else (None, "")
            error = f"rank {rank} hung for {timeout_s} s and was killed" if hung[rank] else error
            output = said.read_text(errors="replace") if said.exists() else ""
            ended.append(Ended(rank, value, error, process.exitcode, output))
        self._place.cleanup()
        return ended


def start_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, env: Mapping[str, str] | None = None
) -> Ranks:
    """Start a job whose every rank calls ``function(*args)``, which a module of the tests has at its top level.

    Args:
        function: What each rank runs.
        args: Its arguments; they are pickled.
        ranks: How many processes.
        env: More environment variables.
    """
    place = tempfile.TemporaryDirectory(prefix="ranks-")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    job = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **(env or {}),
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        own = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _CONTEXT.Process(target=_one, args=(function, args, own, place.name, rank))
        process.start()
        processes.append(process)
    return Ranks(processes, place)


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> list[Any]:
    """What ``function(*args)`` returns on each rank, in the order of ranks.

    Raises:
        AssertionError: a rank failed; the message has each one's traceback and output.
    """
    ended = start_ranks(function, *args, ranks=ranks, env=env).wait(timeout_s)
    failed = [one for one in ended if one.error or one.code]
    if failed:
        told = "\n".join(f"rank {one.rank}, code {one.code}:\n{one.error}\n{one.output}" for one in failed)
        raise AssertionError(f"{len(failed)} of {ranks} ranks failed:\n{told}")
    return [one.value for one in ended]


def _one(
    function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], place: str, rank: int
) -> None:
    said = os.open(os.path.join(place, f"said{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(env)
    import torch

    from holdfast.utilities.rank_zero import rank_zero_only

    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    value, error, code = None, "", 0
    try:
        value = function(*args)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        error, code = traceback.format_exc(), 1
    with open(os.path.join(place, f"told{rank}"), "wb") as told:
        pickle.dump((value, error), told)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
