"""Files that are open while a checkpoint is made durable, and when they are let go of."""

from __future__ import annotations

import contextlib
import os
import threading

_LARGE_BYTES = 64 << 20

not_for_children: set[int] = set()
"""Open files of which a child made by fork, such as a loader's worker, lets go at once: it would keep
their locks and, once they are deleted, their room on the disk for as long as it lives."""


def close(fd: int) -> None:
    """Close a file that may be among `not_for_children`."""
    not_for_children.discard(fd)  # first: its number may be used again as soon as it is closed
    os.close(fd)


def held(path: str) -> int | None:
    """Keep a large file that is about to lose its name, so that the rename does not wait for its end.

    To give a gigabyte's blocks back takes as long as half of writing them. None: there is no such file, or it
    is small.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, AttributeError):  # AttributeError: a system without O_PATH
        return None
    if os.fstat(fd).st_size < _LARGE_BYTES:
        os.close(fd)
        return None
    not_for_children.add(fd)
    return fd


def close_in_background(fd: int) -> None:
    """Close a file without waiting for its blocks to be given back."""
    try:
        threading.Thread(target=close, args=(fd,), name="holdfast-free", daemon=True).start()
    except RuntimeError:  # no more threads, or the interpreter is about to end
        close(fd)


def _close_in_child() -> None:
    for fd in not_for_children:
        with contextlib.suppress(OSError):
            os.close(fd)
    not_for_children.clear()


os.register_at_fork(after_in_child=_close_in_child)
