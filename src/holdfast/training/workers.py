"""The worker processes of a loader: deaf to signals that are meant for the run, and ended for sure.

A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group. The run saves at its next safe
point and leaves; for that it may still need a batch, so its workers have to outlive the signal. A worker that
ignores SIGTERM must not be left behind either: wherever torch or Python would send it one, it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

GRACE_S = 5.0
"""How long workers have to end by themselves."""

_FOR_THE_RUN = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def signals_of_the_run(trainer: Trainer) -> tuple[int, ...]:
    """The signals that the workers of a fit have to survive.

    None outside of fit, where nothing is saved at a signal; none where signals are not handled: with
    ``stop_signals=()``, in another thread than the main one, and on systems without POSIX signals.
    """
    stops = tuple(getattr(trainer.preemption, "signals", ()))
    in_main_thread = threading.current_thread() is threading.main_thread()
    if trainer.state.fn != "fit" or not stops or not in_main_thread or not hasattr(signal, "pthread_sigmask"):
        return ()
    return tuple(sorted({int(getattr(signal, name)) for name in _FOR_THE_RUN} | {int(one) for one in stops}))


class Shielded:
    """A ``worker_init_fn`` that makes its worker ignore signals, and then does what the user's own does.

    Args:
        signals: What to ignore.
        then: The user's ``worker_init_fn``, or None.
    """

    lets_signals_through = True
    """See `fork_server`."""

    def __init__(self, signals: tuple[int, ...], then: Callable[[int], Any] | None) -> None:
        self.signals = signals
        self.then = then

    def __call__(self, worker_id: int) -> None:
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)
        # They were held back while this process started; what came meanwhile is dropped.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        _end_with_the_run()
        if self.then is not None:
            self.then(worker_id)


def _end_with_the_run() -> None:
    """See to it that this worker ends when the process that reads from it was killed.

    torch looks whether its parent is alive. With a fork server that is the server, which lives as long as
    what it started: both would stay for ever.
    """
    run = multiprocessing.parent_process()
    if run is not None and run.pid != os.getppid():

        def watch() -> None:
            run.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="ends with the run").start()


def shield(loader: DataLoader[Any], signals: tuple[int, ...]) -> None:
    """Have the workers that a loader starts from now on ignore signals."""
    if signals and loader.num_workers > 0 and not isinstance(loader.worker_init_fn, Shielded):
        loader.worker_init_fn = Shielded(signals, loader.worker_init_fn)


def unshield(loader: Any) -> None:
    """Give a loader its own ``worker_init_fn`` back."""
    given = getattr(loader, "worker_init_fn", None)
    if isinstance(given, Shielded):
        loader.worker_init_fn = given.then


def start(loader: Any) -> Iterator[Any]:
    """``iter(loader)``, with signals held back while its workers start, and workers that can be ended.

    A new process inherits which signals are held back, so one that arrives while it starts waits until the
    worker ignores it. In this process it is dealt with when the workers are there.
    """
    if getattr(getattr(loader, "_iterator", None), "_shutdown", False):
        # A loader that was used before: it would ask its persistent workers, which were ended since. Not when
        # they were: until it is used again, a loader with a state tells it from there.
        loader._iterator = None
    init = getattr(loader, "worker_init_fn", None)
    if not isinstance(init, Shielded) or _are_running(loader):
        return iter(loader)
    known = set(multiprocessing.active_children())
    held_before = signal.pthread_sigmask(signal.SIG_BLOCK, init.signals)
    iterator: Iterator[Any] | None = None
    try:
        _start_servers(loader.multiprocessing_context, init.signals)
        iterator = iter(loader)
    finally:
        for process in set(multiprocessing.active_children()) - known:
            _kill_instead_of_terminate(process, iterator)
        signal.pthread_sigmask(signal.SIG_SETMASK, held_before)
    assert iterator is not None
    return iterator


def _are_running(loader: Any) -> bool:
    return loader.persistent_workers and getattr(loader, "_iterator", None) is not None


def _start_servers(context: Any, signals: tuple[int, ...]) -> None:
    """Start Python's helper processes first, which live on after the workers."""
    method = (multiprocessing if context is None else context).get_start_method()
    if method != "fork":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()
        # It lets SIGINT and SIGTERM through again when it starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    if method == "forkserver":
        from holdfast.training import fork_server

        fork_server.ensure_running()


def _kill_instead_of_terminate(process: Any, iterator: Any) -> None:
    """Where torch gives up on a worker, and when Python exits, it gets a SIGTERM, which this one ignores."""
    popen = getattr(process, "_popen", None)
    if not process.daemon or popen is None or not hasattr(popen, "kill"):
        return
    # Not the iterator itself: its workers end when the last reference to it is gone.
    owner = None if iterator is None else weakref.ref(iterator)

    def kill() -> None:
        forget_deaths(None if owner is None else owner())
        popen.kill()

    popen.terminate = kill


def end(iterator: Any) -> None:
    """Stop the workers of a loader's iterator: they are asked to end, and killed if they do not."""
    if not hasattr(iterator, "_shutdown_workers"):
        return
    processes = [process for process in getattr(iterator, "_workers", ()) if process.is_alive()]
    if not processes:
        iterator._shutdown_workers()
        return
    forget_deaths(iterator)
    # torch waits for one after the other; a run that was told to leave may not have that long.
    impatience = threading.Timer(GRACE_S, _kill, [processes])
    impatience.daemon = True
    impatience.start()
    try:
        iterator._shutdown_workers()
    finally:
        impatience.cancel()
        _kill(processes)
        for process in processes:
            process.join()


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()


def forget_deaths(iterator: Any) -> None:
    """Have torch no longer raise an error in the main thread when one of these workers dies."""
    if getattr(iterator, "_worker_pids_set", False):
        from torch.utils.data._utils import signal_handling

        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False
