"""``python train.py`` is rank 0: it starts the others, which run the same command up to the same call."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from holdfast.errors import ConfigError, RankFailed
from holdfast.strategies.environments import ClusterEnvironment
from holdfast.strategies.failures import leave, of_exit_code, say
from holdfast.utilities import started

PIPE = "HOLDFAST_RANK_ZERO"
"""The environment variable with the end of a pipe on which a started process hears of the one that did."""
_LEAVES_WITHIN_S = 5.0
"""So long a process goes on whose rank 0 is gone, to end by itself, with an error that says why."""
_HEAD = struct.Struct("<Q")


class Launcher:
    """The processes that this one has started: ranks of its machine, which it keeps for all its requests.

    They are in a session of their own: Ctrl-C in the terminal reaches this process alone, which has all of
    them stop at the same safe point.
    """

    def __init__(self) -> None:
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        """By rank."""
        self.outcomes: deque[Any] = deque(maxlen=10_000)
        """How requests of trainers with one process ended that the others have not heard of."""
        self.busy = False
        """Whether a request runs that all processes take part in."""
        self.was_alone = False
        """Whether there were any of those before it."""
        self._lines: list[int] = []
        self._closing = False
        self._pid = os.getpid()

    def start(
        self,
        environment: ClusterEnvironment,
        processes: int,
        address: str,
        port: int,
        ended: Callable[[int, int], None],
    ) -> None:
        """Start ranks 1 and up of this machine; they end when this process does.

        Args:
            environment: Tells this process's rank.
            processes: This machine's, this one included.
            address: Where rank 0 answers.
            port: On which port.
            ended: Called with a rank and its exit code, by a thread, when one has ended by itself.

        Raises:
            ConfigError: there is no command to run again.
        """
        command = [sys.executable, *command_to_run_again(processes)]
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_threads(processes))}
        # Where rank 0 is gone its store is, which torch warns of with a hundred lines of its own stack.
        quiet = {} if "TORCH_CPP_LOG_LEVEL" in os.environ else {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        first = environment.global_rank()
        for local_rank in range(1, processes):
            reading, writing = os.pipe()
            variables = {
                "RANK": str(first + local_rank), "LOCAL_RANK": str(local_rank),
                "NODE_RANK": str(environment.node_rank()), "WORLD_SIZE": str(environment.world_size()),
                "MASTER_ADDR": address, "MASTER_PORT": str(port), PIPE: str(reading), **threads, **quiet,
            }  # fmt: skip
            child = subprocess.Popen(
                command, env={**os.environ, **variables}, cwd=started.directory, pass_fds=(reading,),
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            os.close(reading)
            self._lines.append(writing)
            self.children[first + local_rank] = child
        atexit.register(self.close)
        for rank, child in self.children.items():
            threading.Thread(
                target=self._watch, args=(rank, child, ended), name=f"holdfast-rank-{rank}", daemon=True
            ).start()
        if threads:
            import torch

            torch.set_num_threads(_threads(processes))

    def go_on(self) -> None:
        """Have the started processes go on to the request that begins here, and tell them of those before it.

        Raises:
            RankFailed: one of them has ended.
        """
        self.busy, self.was_alone = True, bool(self.outcomes)
        if not self.children:
            return
        told = pickle.dumps(list(self.outcomes))
        self.outcomes.clear()
        for rank, line in zip(self.children, self._lines, strict=True):
            code = self.children[rank].poll()
            try:
                if code is not None:
                    raise BrokenPipeError
                _write(line, _HEAD.pack(len(told)) + told)
            except BrokenPipeError:
                with suppress(subprocess.TimeoutExpired):
                    code = self.children[rank].wait(5)
                raise of_exit_code(rank, 0 if code is None else code).error() from None

    def serve(self, request: Any) -> None:
        """Have the started processes, which wait behind a request, take part in something, and wait on."""
        told = pickle.dumps(("serve", request))
        for line in self._lines:
            _write(line, _HEAD.pack(len(told)) + told)

    def close(self) -> None:
        """Let the started processes end. Blocks: until they have; what does not end in time is killed."""
        if os.getpid() != self._pid or self._closing:
            return
        self._closing = True
        for line in self._lines:
            os.close(line)
        ends = time.monotonic() + _LEAVES_WITHIN_S + 5
        for rank, child in self.children.items():
            try:
                child.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"rank {rank} (process {child.pid}) does not end and is killed")
                child.kill()
                child.wait()

    def _watch(self, rank: int, child: subprocess.Popen[bytes], ended: Callable[[int, int], None]) -> None:
        code = child.wait()
        if not self._closing:
            ended(rank, code)


def command_to_run_again(processes: int) -> list[str]:
    """The arguments of this process's own command, after the interpreter.

    Raises:
        ConfigError: it would not get to the same call again.
    """
    main: Any = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    where = None
    if multiprocessing.parent_process() is not None:
        where = "a process that multiprocessing has started"
    elif _in_ipython():
        where = "a notebook"
    elif hasattr(sys, "ps1"):
        where = "the interactive interpreter"
    elif "-c" not in sys.orig_argv if file is None else file.startswith(("<", "/dev/", "/proc/self/")):
        where = "a script that is read from standard input"
    if where is None:
        return sys.orig_argv[1:]
    others = "1 further process" if processes == 2 else f"{processes - 1} further processes"
    raise ConfigError(
        f"Trainer(devices={processes}) starts {others} by running the command of this one again, which does "
        f"not work in {where}. Put the code into a file, and run `python FILE`, or `torchrun "
        f"--nproc-per-node {processes} FILE`. With devices=1 it trains here."
    )


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _threads(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)


def _write(line: int, data: bytes) -> None:
    while data:
        data = data[os.write(line, data) :]


class Line:
    """In a started process: its line to rank 0, without which it ends.

    Args:
        reading: The end of the pipe.
    """

    def __init__(self, reading: int) -> None:
        os.set_inheritable(reading, False)
        self._reading = reading
        self._messages: SimpleQueue[list[Any] | tuple[str, Any] | None] = SimpleQueue()
        self._serve: Callable[[Any], None] | None = None
        self._outcomes: deque[Any] | None = None
        self.was_alone = False
        """Whether rank 0 has run requests alone before the one that runs."""
        self._parent = os.getppid()
        self._pid = os.getpid()
        self.state = "on the way"
        """To a request, "busy" with one, or "waiting" behind one."""
        threading.Thread(target=self._listen, name="holdfast-rank-zero", daemon=True).start()

    def begin(self) -> None:
        """A request begins that all processes take part in."""
        if self._outcomes is None:
            self._hear()
        self._outcomes = None
        self.state = "busy"

    def failed(self) -> None:
        """The request ended with an error, which takes this process further, or ends it."""
        self.state = "on the way"

    def wait_for_more(self, serve: Callable[[Any], None]) -> None:
        """Wait until rank 0 runs a further request; when it ends, this process ends here.

        What follows the request in the script so runs once.

        Args:
            serve: Takes part, meanwhile, in what rank 0 asks for.
        """
        self._serve = serve
        self._hear()

    def outcome(self) -> Any:
        """How the next request ended that rank 0 has run alone.

        Blocks: until the processes that wait are needed again; this process ends here if they are not.
        """
        if self._outcomes is None:
            self._hear()
        if not self._outcomes:
            raise RankFailed(
                "rank 0 has not come here: this process was started to run the same script, and runs a "
                "request to a trainer with one process that rank 0 has not run.",
                rank=0,
            )
        return self._outcomes.popleft()

    def _hear(self) -> None:
        self.state = "waiting"
        message = self._messages.get()
        while isinstance(message, tuple):
            assert self._serve is not None
            self.state = "busy"
            self._serve(message[1])
            self.state = "waiting"
            message = self._messages.get()
        if message is None:
            leave(0)
        self.state = "on the way"
        self._outcomes = deque(message or [])
        self.was_alone = bool(self._outcomes)

    def _listen(self) -> None:
        while (head := self._read(_HEAD.size)) and (body := self._read(*_HEAD.unpack(head))):
            self._messages.put(pickle.loads(body))
        self._messages.put(None)
        ends = time.monotonic() + _LEAVES_WITHIN_S
        while self.state != "on the way" and time.monotonic() < ends:
            time.sleep(0.05)  # one that waits ends by itself, and so does one whose request fails now
        if self.state == "busy":
            say(f"rank {os.environ.get('RANK')} ends: rank 0, which has started it, is gone")
        leave(1 if self.state == "busy" else 0)

    def _read(self, size: int) -> bytes | None:
        found = b""
        while len(found) < size:
            # Processes that rank 0 has forked may hold the pipe's other end when rank 0 is gone.
            ready, _, _ = select.select([self._reading], [], [], 1.0)
            if ready:
                part = os.read(self._reading, size - len(found))
                if not part:
                    return None
                found += part
            elif os.getppid() != self._parent:
                return None
        return found


def _open_line() -> Line | None:
    reading = os.environ.pop(PIPE, None)
    return None if reading is None else Line(int(reading))


_line = _open_line()


def line_to_rank_zero() -> Line | None:
    """This process's line to the one that has started it; None in any other."""
    return _line if _line is not None and _line._pid == os.getpid() else None


launcher = Launcher()
"""What this process has started, for all its trainers."""
