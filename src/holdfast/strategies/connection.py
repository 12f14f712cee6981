"""This process's connection with the others of its job: the store, the groups, and failing together."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from holdfast.errors import ConfigError, RankFailed
from holdfast.strategies.agreement import job_failed
from holdfast.strategies.attempts import attempt_store
from holdfast.strategies.environments import ClusterEnvironment
from holdfast.strategies.failures import (
    Failure,
    Watch,
    is_of_communication,
    leave,
    of_error,
    of_exit_code,
    say,
)
from holdfast.strategies.launch import launcher, line_to_rank_zero
from holdfast.strategies.sockets import Sockets, open_sockets, shut
from holdfast.utilities.rank_zero import rank_zero_info

_SAYS_AFTER_S = 10.0
_GRACE_S = 60.0
"""So long after a rank has failed another one may go on by itself, before its process is ended."""
_CUT_AFTER_S = 2.0
"""Where a rank's failure has not closed its connections, the others close theirs."""
_ACKNOWLEDGED_WITHIN_S = 3.0
_LAST_ONE_WAITS_S = 5.0


class Connection:
    """What joins this process with the others; made at the first request, and kept for all trainers.

    Attributes:
        store: The job's store, with a prefix of its own for each time that the processes have joined.
        coordination: A gloo group of all processes, on which they agree.
    """

    def __init__(self) -> None:
        self.store: Any = None
        self.coordination: Any = None
        self._saving: Any = None
        self._groups: list[Any] = []
        """Those of before, for as long as something else may hold them."""
        self._raw: Any = None
        self._last: Any = None
        self._watch: Watch | None = None
        self._rank, self._world_size = 0, 1
        self._backend = ""
        self._sockets: Sockets = frozenset()
        self._times = 0
        self._joined = self._busy = self._owns_groups = self._hosts = False

    # -- a request -------------------------------------------------------------------------------------------

    def join(
        self,
        environment: ClusterEnvironment,
        processes: int,
        *,
        backend: str,
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        """Start the other processes where nobody else does, and connect with them, if that is yet to be done.

        Args:
            environment: What the launcher says about this process.
            processes: This machine's.
            backend: What gradients are exchanged with.
            device: This process's.
            timeout: After this time a process that waits for others in vain gives up.

        Ranks: all. Blocks: until all are here.

        Raises:
            ConfigError: the processes cannot be started, or were started for another number.
            RankFailed: one has failed before, or does not come.
        """
        line = line_to_rank_zero()
        if line is not None:
            line.begin()
        world_size = environment.world_size()
        if self._raw is not None and world_size != self._world_size:
            raise ConfigError(
                f"Trainer(devices=, num_nodes=) mean {world_size} processes, but an earlier trainer of this "
                f"script runs with {self._world_size}, which cannot change. Make them equal, or use a "
                "script of its own."
            )
        launcher.go_on()
        if self._joined and backend == self._backend:
            self._raise_if_failed()
            self._busy = True
            return
        self._let_go()
        self._groups = []
        if self._raw is None:
            self._rank, self._world_size = environment.global_rank(), world_size
            self._open(environment, processes, timeout)
        self.store = PrefixStore(f"holdfast/{self._times}", self._raw)
        self._times += 1
        if self._watch is not None:
            self._watch.close()
        self._watch = Watch(self.store, self._rank, self._world_size, self._failed_elsewhere)
        self._busy = True
        self._assemble(timeout)
        self._make_groups(backend, device, timeout)
        self._joined = True

    def saving_group(self, timeout: timedelta) -> Any:
        """A gloo group for threads that save, in nobody's way. Ranks: all. Blocks: the first time."""
        if self._saving is None:
            before = open_sockets()
            self._saving = dist.new_group(backend="gloo", timeout=timeout)
            self._sockets |= open_sockets() - before
        return self._saving

    def done(self, of: Any, serve: Callable[[Any], None]) -> None:
        """A request is over, and went well. In a process that rank 0 has started: wait for more, or end.

        Args:
            of: Whose request it was.
            serve: Takes part in what rank 0 calls the others for while they wait.
        """
        self._busy = launcher.busy = False
        self._last = of
        line = line_to_rank_zero()
        if line is not None:
            line.wait_for_more(partial(self._served, serve))

    def _served(self, serve: Callable[[Any], None], request: Any) -> None:
        self._busy = True
        try:
            serve(request)
        except Exception as error:
            self._raise_explained(error)
        self._busy = False

    @contextmanager
    def call_others(self, caller: Any, request: Any) -> Iterator[bool]:
        """A context in which the processes that wait behind the last request do what rank 0 does.

        Ranks: rank 0, where it has started the others; anywhere else, and if that request was not the
        caller's, False is what the context gives.
        """
        waiting = launcher.children and self._joined and not self._busy and self._last is caller
        if not waiting or self.failure is not None:
            yield False
            return
        launcher.serve(request)
        self._busy = launcher.busy = True
        try:
            yield True
        except Exception as error:
            if is_of_communication(error):
                self._raise_explained(error)
            raise
        finally:
            self._busy = launcher.busy = False

    def explain(self, error: BaseException) -> BaseException:
        """What really ended a request: the error itself, or another rank's failure. The others are told.

        From then on nothing can be exchanged until the processes join again.

        Blocks: for some seconds at most.
        """
        try:
            return self._explained(error)
        finally:
            # Until here those who watch processes tell of them.
            self._busy = launcher.busy = False
            line = line_to_rank_zero()
            if line is not None:
                line.failed()

    def _explained(self, error: BaseException) -> BaseException:
        watch = self._watch
        if watch is None:
            return error
        if isinstance(error, SystemExit):
            watch.left(f"{type(error).__name__}: {error}")
            return error
        theirs = None
        if is_of_communication(error):
            theirs = watch.cause()
        elif isinstance(error, RankFailed):
            theirs = watch.failure
        if theirs is not None and theirs.rank == self._rank:
            theirs = None
        # Whoever reads it there needs the store, which is gone with the process that has it.
        wait_s = _ACKNOWLEDGED_WITHIN_S if self._hosts else 0.0
        watch.tell(theirs or of_error(self._rank, error), wait_s=wait_s)
        self._let_go(failed=True)
        told = error if theirs is None else theirs.error()
        # What says the same already needs no second traceback above it.
        return error if type(error) is type(told) and str(error) == str(told) else told

    @property
    def between_requests(self) -> bool:
        """Whether what runs is code of the script that rank 0's own processes come to later, or never."""
        return not self._busy and (bool(launcher.children) or line_to_rank_zero() is not None)

    @property
    def was_alone(self) -> bool:
        """Whether rank 0 has run requests before this one that the processes it has started have not run."""
        return (line_to_rank_zero() or launcher).was_alone

    @property
    def failure(self) -> Failure | None:
        """What has made the job fail, as far as this process has heard; asks nobody."""
        return None if self._watch is None else self._watch.failure

    def look(self) -> None:
        """Look whether a process is gone: what it was connected with here is closed at once.

        Blocks: where a connection has closed, for some seconds, until the others say that they are there.

        Raises:
            RankFailed: one is gone.
        """
        closed = self._sockets - open_sockets()
        self._sockets -= closed
        if closed and self._watch is not None:
            failure = self._watch.cause()
            if failure is not None and failure.rank != self._rank:
                self._watch.tell(failure)
                raise failure.error()

    def _raise_explained(self, error: Exception) -> NoReturn:
        told = self.explain(error)
        if told is error:
            raise error
        raise told from error

    # -- joining ---------------------------------------------------------------------------------------------

    def _open(self, environment: ClusterEnvironment, processes: int, timeout: timedelta) -> None:
        """Connect with the job's store, and start this machine's other processes where nobody else does."""
        atexit.register(self._close)
        starts = not environment.creates_processes_externally and processes > 1
        address, port = environment.main_address, environment.main_port
        if dist.is_initialized():
            self._raw = dist.distributed_c10d._get_default_store()
        else:
            self._hosts = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if starts and processes == self._world_size and "MASTER_PORT" not in os.environ:
                port = 0  # any that is free: the others are told
            self._raw = attempt_store(self._rank, self._world_size, timeout) or TCPStore(
                address, port, None, self._hosts, timeout, wait_for_workers=False, multi_tenant=True
            )
        if starts:
            port = getattr(self._raw, "port", port)
            launcher.start(environment, processes, address, port, self._ended)
            launcher.go_on()

    def _assemble(self, timeout: timedelta) -> None:
        """Wait until all processes have opened the store, with a line that names those who are missing."""
        began = time.monotonic()
        missing = {rank: f"here/{rank}" for rank in range(self._world_size)}
        self.store.set(missing[self._rank], "")
        said = False
        while True:
            self._raise_if_failed()
            missing = {rank: key for rank, key in missing.items() if not self.store.check([key])}
            waited_s = time.monotonic() - began
            if not missing:
                return
            names = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
            if waited_s > timeout.total_seconds():
                raise RankFailed(
                    f"{names} of {self._world_size} did not come within {timeout.total_seconds():g} s. Every "
                    "process of the job has to be started, and to run the same requests to the trainer.",
                    rank=next(iter(missing)),
                )
            if not said and waited_s > _SAYS_AFTER_S:
                said = True
                rank_zero_info(f"waiting for {names} of {self._world_size}")
            time.sleep(0.02 if waited_s < _SAYS_AFTER_S else 0.2)

    def _make_groups(self, backend: str, device: torch.device, timeout: timedelta) -> None:
        self._owns_groups = not dist.is_initialized()
        self._backend = backend
        before = open_sockets()
        if self._owns_groups:
            dist.init_process_group(
                backend, store=PrefixStore("groups", self.store), rank=self._rank,
                world_size=self._world_size, timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )  # fmt: skip
            _hook_exceptions(self)
        self.coordination = dist.new_group(backend="gloo", timeout=timeout)
        self._sockets = open_sockets() - before

    # -- failing ---------------------------------------------------------------------------------------------

    def _raise_if_failed(self) -> None:
        failure = self.failure
        if failure is not None and failure.rank != self._rank:
            raise failure.error()

    def _ended(self, rank: int, code: int) -> None:
        """A process that this one has started has ended by itself; called by a thread."""
        if self._busy and self._watch is not None:
            self._watch.tell(of_exit_code(rank, code))

    def _failed_elsewhere(self, failure: Failure) -> None:
        """The job has failed; called by a thread. The request that runs here ends, one way or another."""
        if failure.rank != self._rank:
            job_failed(failure.error())
            threading.Thread(target=self._see_to_it, args=(failure,), daemon=True).start()

    def _see_to_it(self, failure: Failure) -> None:
        times = self._times
        time.sleep(_CUT_AFTER_S)
        if self._busy and times == self._times:
            shut(self._sockets)
            if "nccl" in self._backend:
                # Its collectives do not notice that a process is gone.
                with suppress(Exception):
                    dist.distributed_c10d._get_default_group().abort()
        ends = time.monotonic() + _GRACE_S
        while time.monotonic() < ends:
            if not self._busy or times != self._times:
                return
            time.sleep(0.2)
        say(f"rank {self._rank} ends, since it cannot go on: {failure.error()}")
        leave(1)

    def _let_go(self, *, failed: bool = False) -> None:
        """Close the groups; where the job has failed whoever waits for this process there hears so."""
        if not self._joined:
            return
        # Where Python drops a group itself it lets go of its lock, which the group's threads may need to end;
        # where a wrapper of the model does, it is held. So the group outlives the wrapper.
        self._groups = [self.coordination, self._saving]
        self._joined, self.coordination, self._saving = False, None, None
        if self._owns_groups and dist.is_initialized():
            self._groups.append(dist.distributed_c10d._get_default_group())
        if failed:
            shut(self._sockets)
        if self._owns_groups and dist.is_initialized():
            with suppress(Exception):
                if "nccl" in self._backend and failed:
                    # To leave in good order would take the others.
                    dist.distributed_c10d._abort_process_group()
                else:
                    dist.destroy_process_group()

    def _close(self) -> None:
        """The process ends."""
        self._busy = False
        started = bool(launcher.children) or line_to_rank_zero() is not None
        if self._watch is not None:
            failed = self.failure is not None
            if not failed and not started:
                # Whose process has the store is the last to go.
                with suppress(Exception):
                    self.store.add("goodbye", 1)
                    ends = time.monotonic() + _LAST_ONE_WAITS_S
                    while self._hosts and time.monotonic() < ends:
                        if self.store.add("goodbye", 0) >= self._world_size:
                            break
                        time.sleep(0.02)
            self._watch.close()
        self._let_go()
        self._groups = []


def _hook_exceptions(connection: Connection) -> None:
    """Have the others hear of an exception that ends this process between two requests.

    In a process that rank 0 has started one line says that another rank failed: where is said there.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        watch = connection._watch
        if isinstance(error, RankFailed) and line_to_rank_zero() is not None:
            say(f"[rank{connection._rank}]: ends: {str(error).splitlines()[0]}")
            return
        before(kind, error, trace)
        if watch is not None and watch.failure is None:
            watch.tell(of_error(connection._rank, error))

    sys.excepthook = hook


connection = Connection()
"""This process's."""
