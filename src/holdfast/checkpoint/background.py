"""What makes saving in the background safe for a process: its optimizers, its children, its end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.checkpoint import commit, writing
from holdfast.checkpoint.pending import PendingSave
from holdfast.checkpoint.report import SaveReport
from holdfast.errors import StorageError


class Waiting(Protocol):
    """An engine, as far as this module goes."""

    def wait_for_copy(self) -> None: ...

    def _begin_in_child(self) -> None: ...


def start(pending: PendingSave, work: Callable[[], SaveReport]) -> None:
    """As `carry_out`, in a thread that the interpreter waits for at its end."""
    once = threading.Lock()

    def run(pending: PendingSave, work: Callable[[], SaveReport]) -> None:
        if once.acquire(blocking=False):
            carry_out(pending, work)

    thread = threading.Thread(target=run, args=(pending, work), name="holdfast-save", daemon=False)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is about to end: then here and now
        run(pending, work)
    except BaseException:  # interrupted: nobody knows whether there is a thread, and somebody may wait for it
        run(pending, work)
        raise


def carry_out(pending: PendingSave, work: Callable[[], SaveReport]) -> None:
    """Do the work, and tell ``pending`` how it went."""
    report: SaveReport | None = None
    error: BaseException | None = None
    try:
        report = work()
    except BaseException as problem:
        error = problem
    del work  # the traceback keeps this frame, and must not keep the snapshot
    pending._end(report, error)


def write(
    path: str,
    content: writing.Content,
    *,
    image: memoryview | None = None,
    attempts: int = 1,
    confirm: Callable[[], None] | None = None,
) -> tuple[int, float, int]:
    """Write the file durably; return its length, the seconds of writing and how often it was written.

    Args:
        path: its final name.
        content: what goes into it.
        image: as for `writing.write`.
        attempts: how often it is written, each time to a new file, before it has failed.
        confirm: called when all is written and nothing has the final name; what it raises ends the save.

    Raises:
        StorageError: the disk refused the last attempt.
    """
    attempt = 0
    while True:
        attempt += 1
        began = time.monotonic()
        try:
            with commit.replacing(path) as file:
                size = writing.write(file, content, image)
                if confirm is not None:
                    confirm()
            return size, time.monotonic() - began, attempt
        except StorageError:
            if attempt >= attempts:
                raise


def add_names(path: str, names: Sequence[str], *, symlinks: bool, attempts: int = 1) -> tuple[str, ...]:
    """Give the file its further names, durably; return how each was made.

    Raises:
        StorageError: the disk refused the last attempt.
    """
    links = []
    for name in names:
        for attempt in range(1, attempts + 1):
            try:
                links.append(commit.add_name(path, name, symlink=symlinks))
                break
            except StorageError:
                if attempt >= attempts:
                    raise
    return tuple(links)


# --- optimizers -------------------------------------------------------------------------------------------

_copying: list[Waiting] = []
_hooked = False


def begin_copying(engine: Waiting) -> None:
    """Have every optimizer's step call the engine's `wait_for_copy`, until `end_copying`."""
    global _hooked
    if not _hooked:
        # For good: an optimizer in another thread may be going through the hooks when one is removed, and
        # would fail. Where nothing is being copied it costs a step less than 0.1 us.
        _hooked = True
        register_optimizer_step_pre_hook(_before_step)
    if engine not in _copying:
        _copying.append(engine)


def end_copying(engine: Waiting) -> None:
    """The engine's snapshot reads nothing that an optimizer may change."""
    with contextlib.suppress(ValueError):
        _copying.remove(engine)


def _before_step(*_: Any) -> None:
    if _copying:
        _wait_for_copies()


def _wait() -> None:
    for engine in tuple(_copying):
        engine.wait_for_copy()


# A step that is compiled must not trace into this, as `torch.compiler.disable` says it without its import.
_without_compiling: Any = getattr(torch, "_disable_dynamo", lambda function: function)
_wait_for_copies: Callable[[], None] = _without_compiling(_wait)


# --- children ---------------------------------------------------------------------------------------------

_engines: weakref.WeakSet[Waiting] = weakref.WeakSet()


def survive_fork(engine: Waiting) -> None:
    """Have the engine begin anew in each child: threads and what they were about do not survive a fork."""
    _engines.add(engine)


def _begin_in_child() -> None:
    _copying.clear()
    for engine in list(_engines):
        engine._begin_in_child()


os.register_at_fork(after_in_child=_begin_in_child)
