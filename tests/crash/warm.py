"""A Python that has torch and the programs of these tests imported, and forks a copy of itself for each run.

    python warm.py SOCKET

A copy leaves the loop and the function, so that the training runs as it does in a script, in the main thread.
What it raises ends the interpreter as it ends any; an exit code is left with by a shorter way (the tests of the
real command see to the long one).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import child
import failing_run
import preempted_child
import saving_child
import torch._dynamo  # noqa: F401  torch.optim imports it late, and that takes a second

import holdfast.training.trainer  # noqa: F401  the names in holdfast itself are imported when they are used

FDS = 3
PROGRAMS = {program.__name__: program for program in (child, failing_run, preempted_child, saving_child)}


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer with the number of a new process, or with how one ended; returns in each of the copies."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 1 << 16, FDS)
        if not message:
            return None
        asked = json.loads(message)
        if "wait" in asked:
            answer = os.waitpid(asked["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                for target, fd in enumerate(fds):
                    os.dup2(fd, target)
        for fd in fds:
            os.close(fd)
        if answer == 0 and "wait" not in asked:
            connection.close()
            return asked
        connection.send(str(answer).encode())


def leave(code: int) -> NoReturn:
    """End as the interpreter does, but for taking every module apart, which takes longer than the training."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # Whoever runs the tests in the background has it ignored, and so would all that come from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # a copy that looked through all that was imported would take a second to end
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["directory"])
        try:
            PROGRAMS[asked["program"]].main(Path(asked["root"]), asked["options"])
        except SystemExit as error:
            leave(error.code)
        leave(0)
