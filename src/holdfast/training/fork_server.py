"""Imported by Python's fork server when it starts, so that it outlives a signal for the whole process group.

Data-loader workers end as soon as the server that started them is gone. So it is started with such signals
held back, and so is all that it starts, whosever that is: each process lets them through when it begins.
Only a worker that is about to ignore them does so itself, once it does.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing import forkserver, process
from typing import Any

_NAME = __name__


def ensure_running() -> None:
    """Start the server, unless it is running, and have it import this module."""
    server: Any = forkserver._forkserver
    if _NAME not in server._preload_modules:
        forkserver.set_forkserver_preload([_NAME, *server._preload_modules])
    forkserver.ensure_running()


def _hold_signals_until_processes_run() -> None:
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    run: Any = process.BaseProcess._bootstrap  # type: ignore[attr-defined]

    def bootstrap(self: Any, *args: Any, **named: Any) -> Any:
        if not any(getattr(type(given), "lets_signals_through", False) for given in self._args):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        return run(self, *args, **named)

    process.BaseProcess._bootstrap = bootstrap  # type: ignore[attr-defined]
    # Every worker needs it: imported here, none of them takes seconds to start.
    import torch.utils.data  # noqa: F401


if "multiprocessing.forkserver" in " ".join(sys.orig_argv):  # in the server itself
    _hold_signals_until_processes_run()
