"""A store of its own for each attempt of a job that torchrun starts again.

torchrun's agent keeps one store for all attempts, and torch's process groups look for each other's addresses
under the same keys in each of them: those of a process that is dead by now are found, and connecting to it
fails or never ends. The agent's count of restarts does not tell attempts apart: each machine has its own.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistStoreError

_A_MOMENT = timedelta(seconds=1)  # between two of them Python's signal handlers run


def attempt_store(rank: int, world_size: int, timeout: timedelta) -> Any:
    """A store that only the processes of this attempt use; None where nobody but these has used it before.

    Ranks: all. Blocks: until every process is there, or for ``timeout``.

    Args:
        rank: this process's.
        world_size: processes in the job.
        timeout: how long to wait for the others.

    Raises:
        TimeoutError: they did not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, False, timeout=timeout
    )
    meeting = PrefixStore("holdfast/attempts", store)
    name = _lead(meeting, world_size, timeout) if rank == 0 else _join(meeting, rank, world_size, timeout)
    return PrefixStore(f"holdfast/{name}", store)


def _lead(meeting: Any, world_size: int, timeout: timedelta) -> str:
    """Name the attempt, and tell the name to whoever asks, until all have heard it.

    Those that asked in earlier attempts are told too: nobody listens there any more.
    """
    name = uuid.uuid4().hex
    ends = time.monotonic() + timeout.total_seconds()
    at = meeting.add("answered", 0) + 1
    while True:
        heard = meeting.add(f"{name}/heard", 0)
        if heard == world_size - 1:
            return name
        if _comes(meeting, f"asks/{at}", ends, f"{world_size - 1 - heard} of {world_size} processes"):
            meeting.set(f"told/{meeting.get(f'asks/{at}').decode()}", name)
        elif meeting.add("asked", 0) <= at:
            continue  # otherwise whoever was to ask here has died at it
        at = meeting.add("answered", 1) + 1


def _join(meeting: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """Ask under a name that nobody had before, so that no earlier answer can be meant."""
    ends = time.monotonic() + timeout.total_seconds()
    mine = f"{rank}-{uuid.uuid4().hex}"
    asks_again, patience_s = 0.0, 1.0
    while True:
        if time.monotonic() >= asks_again:
            _ask(meeting, mine)
            patience_s *= 2
            asks_again = time.monotonic() + patience_s
        if _comes(meeting, f"told/{mine}", ends, "rank 0"):
            break
    name: str = meeting.get(f"told/{mine}").decode()
    if meeting.add(f"{name}/heard", 1) == world_size - 1:
        _ask(meeting, "nobody")  # so that rank 0 wakes up and sees that all have heard
    return name


def _ask(meeting: Any, who: str) -> None:
    meeting.set(f"asks/{meeting.add('asked', 1)}", who)


def _comes(meeting: Any, key: str, ends: float, whom: str) -> bool:
    """Whether a key is there within a moment; raises once it is too late for it.

    Raises:
        TimeoutError: it is.
    """
    try:
        meeting.wait([key], _A_MOMENT)
    except DistStoreError:
        if time.monotonic() > ends:
            raise TimeoutError(
                f"{whom} did not come within the strategy's timeout. All processes of the job have to reach "
                f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}. See what "
                "they have said."
            ) from None
        return False
    return True
