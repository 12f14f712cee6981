"""Writing whole blocks of a new file at the disk's speed: past the page cache where the file system lets us.

Through the page cache a write costs a copy, memory, and the kernel's own moment to write it back. O_DIRECT
costs aligned buffers. Where the file system refuses it, the same blocks go through the cache, and the kernel
is asked to begin writing them back at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import threading
from typing import Any

from holdfast.checkpoint import commit, open_files

BLOCK_BYTES = 4096
"""Direct writes begin and end at whole multiples of this, in the file and in memory."""

_HUGE_BYTES = 2 << 20
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_WRITE_BACK = 2  # SYNC_FILE_RANGE_WRITE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def aligned(size_bytes: int) -> mmap.mmap:
    """Memory that direct writes may begin and end in, zeroed; in huge pages where it is large enough."""
    made = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and size_bytes >= 2 * _HUGE_BYTES:
        made.madvise(advice)
    return made


class Write:
    """One write on its way; whoever asked for it leaves its memory alone until `wait` returns."""

    __slots__ = ("_ended", "at", "data", "error")

    def __init__(self, data: memoryview, at: int) -> None:
        self.data = data
        self.at = at
        self.error: BaseException | None = None
        self._ended = threading.Event()

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            OSError: what the file system said.
        """
        self._ended.wait()
        if self.error is not None:
            raise self.error

    def end(self, error: BaseException | None) -> None:
        """Let those who wait go on."""
        self.error = error
        self._ended.set()


class _Abandoned(Exception):
    pass


class BlockWriter:
    """Writes whole blocks of one file from a few threads, so that the disk never waits for Python.

    Not for more than one thread that calls it. After `close` the file is an ordinary one again.

    Args:
        fd: the file; nothing else writes to it meanwhile.
        threads: how many writes are in flight at once; 0 writes in the caller's thread.
    """

    def __init__(self, fd: int, threads: int = 2) -> None:
        self._fd = os.dup(fd)  # closed only when no thread can write any more: numbers are used again
        open_files.not_for_children.add(self._fd)
        self.direct = set_direct(self._fd, True)
        self._writes: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            thread = threading.Thread(target=self._run, name="holdfast-write", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is about to end
                break
            self._threads.append(thread)

    def put(self, data: memoryview, at: int) -> Write:
        """Begin to write whole blocks at offset ``at``.

        Raises:
            OSError: an earlier write has failed.
        """
        if self._error is not None:
            raise self._error
        write = Write(data, at)
        if self._threads:
            self._writes.put(write)
        else:
            self._carry_out(write)
        return write

    def close(self) -> None:
        """Return when all is written.

        Raises:
            OSError: a write has failed.
        """
        for _ in self._threads:
            self._writes.put(None)
        for thread in self._threads:
            thread.join()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            set_direct(fd, False)
            open_files.close(fd)
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Return when nothing is being written any more; what has not begun never is."""
        if self._error is None:
            self._error = _Abandoned()
        with contextlib.suppress(OSError, _Abandoned):
            self.close()

    def _run(self) -> None:
        while (write := self._writes.get()) is not None:
            self._carry_out(write)

    def _carry_out(self, write: Write) -> None:
        error: BaseException | None = None
        try:
            if self._error is None:  # else nobody waits for more than the end
                self._write(write.data, write.at)
                commit.crash_point("writing")
        except BaseException as problem:
            self._error = error = problem
        write.end(error)

    def _write(self, data: memoryview, at: int) -> None:
        while data:
            direct = self.direct
            try:
                written = os.pwritev(self._fd, [data], at)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                # Not this file system, or not the rest of a write that it cut short.
                set_direct(self._fd, False)
                self.direct = False
                continue
            if not direct:
                write_back(self._fd, at, written)
            data = data[written:]
            at += written


def set_direct(fd: int, wanted: bool) -> bool:
    """Turn O_DIRECT on or off for an open file; return whether it is on."""
    if not _DIRECT:
        return False
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)
    except OSError:
        return False
    return wanted


def reserve(fd: int, size_bytes: int) -> None:
    """Have the file system set room aside for a file, if it can: so it is full before a byte is written.

    Raises:
        OSError: there is no room.
    """
    # Not os.posix_fallocate, which writes into every block of a file where the file system has no such call.
    if _fallocate is not None and _fallocate(fd, 0, 0, size_bytes) != 0:
        number = ctypes.get_errno()
        if number in _FULL:
            raise OSError(number, os.strerror(number))


def write_back(fd: int, at: int, length: int) -> None:
    """Have the kernel begin to write a stretch of the file to the disk, if it can."""
    if _sync_file_range is not None:
        _sync_file_range(fd, at, length, _WRITE_BACK)


def _from_libc(names: tuple[str, ...], *arguments: Any) -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    for name in names:
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes = arguments
            function.restype = ctypes.c_int
            return function
    return None


_fallocate = _from_libc(
    ("fallocate64", "fallocate"), ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)
_sync_file_range = _from_libc(
    ("sync_file_range",), ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
