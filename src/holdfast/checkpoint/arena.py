"""Memory for snapshots: reused from save to save, page-aligned for O_DIRECT, touched before it is needed.

Copying into fresh pages takes several times as long as copying into warm ones, so the memory is mapped once,
made ready in the background, and kept.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from typing import Any

import torch

_HUGE_BYTES = 2 << 20
_PIECE_BYTES = 32 << 20
_MADV_HUGEPAGE, _MADV_WIPEONFORK, _MADV_POPULATE_WRITE = 14, 18, 23
_SHRINK_AFTER = 8  # snapshots in a row that need less than half of the memory

_cudart: Any = torch.cuda.cudart
_madvise: Any = getattr(ctypes.CDLL(None), "madvise", None)
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Arena:
    """One stretch of memory that is lent to one snapshot at a time.

    Ranks: each process has its own. A child made by fork has none, and costs its parent no copy of a page.
    """

    def __init__(self) -> None:
        self._memory: _Memory | None = None
        self._wanted: list[int] = []  # what the latest snapshots needed
        _arenas.add(self)

    @property
    def size_bytes(self) -> int:
        """How much memory is held; 0 before the first snapshot and after `close`."""
        return 0 if self._memory is None else self._memory.size_bytes

    def prepare(self, size_bytes: int) -> None:
        """Map at least ``size_bytes`` and touch every page in the background; returns at once.

        What the memory held is lost if it has to grow.

        Raises:
            MemoryError: the system has no such memory.
        """
        if self.size_bytes < size_bytes:
            self.close()
            self._memory = _Memory(size_bytes)
            self._memory.populate()

    def lend(self, size_bytes: int, *, pinned: bool = False) -> int:
        """The address of at least ``size_bytes`` of memory, good until the next call on this object.

        Its content is whatever was there before. Memory that is too small, or was far too large for many
        snapshots in a row, is replaced, and let go of before the new is asked for.

        Args:
            size_bytes: how much is needed.
            pinned: whether a CUDA device copies into it.

        Raises:
            MemoryError: the system has no such memory.
        """
        self._wanted = [*self._wanted[1 - _SHRINK_AFTER :], size_bytes]
        most = max(self._wanted)
        too_large = len(self._wanted) == _SHRINK_AFTER and most < self.size_bytes // 2
        if self._memory is None or self._memory.size_bytes < size_bytes or too_large:
            self.close()
            self._memory = _Memory(size_bytes)
        if pinned:
            self._memory.pin()
        return self._memory.address

    def close(self) -> None:
        """Give the memory back to the system; it can be asked for again."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


class _Memory:
    def __init__(self, size_bytes: int) -> None:
        whole = -(-max(1, size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            # The slack, for an address that huge pages like, is never touched and so costs nothing.
            self._map = mmap.mmap(-1, whole + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {size_bytes:,} bytes for a snapshot: {error}") from error
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = -(-begin // _HUGE_BYTES) * _HUGE_BYTES
        self.size_bytes = whole
        self._stop = threading.Event()
        self._populating: threading.Thread | None = None
        self._pinned = False
        # Else, while a child lives, each page that the parent writes to is copied first; and pages on their
        # way to the disk by O_DIRECT must not be shared with a child.
        _advise(begin, whole + _HUGE_BYTES, _MADV_WIPEONFORK)
        if whole >= _HUGE_BYTES:
            _advise(self.address, whole, _MADV_HUGEPAGE)

    def populate(self) -> None:
        """Touch every page in the background, without changing what is in it."""

        def run() -> None:
            for at in range(0, self.size_bytes, _PIECE_BYTES):
                length = min(_PIECE_BYTES, self.size_bytes - at)
                if self._stop.is_set() or not _advise(self.address + at, length, _MADV_POPULATE_WRITE):
                    return  # an older kernel: the first snapshot touches the pages

        self._populating = threading.Thread(target=run, name="holdfast-memory", daemon=True)
        self._populating.start()

    def pin(self) -> None:
        # Registered, not torch's pin_memory, which rounds up to a power of two. Where it fails, copies are
        # merely slower and wait for the device.
        if not self._pinned:
            self._pinned = True
            _cudart().cudaHostRegister(self.address, self.size_bytes, 1)

    def close(self) -> None:
        self._stop.set()
        if self._populating is not None:
            self._populating.join()
        if self._pinned:
            _cudart().cudaHostUnregister(self.address)
        self._map.close()


def _advise(address: int, length: int, advice: int) -> bool:
    # Not mmap.madvise, which would hold the GIL while a gigabyte is touched.
    return _madvise is not None and _madvise(address, length, advice) == 0


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _forget_in_child() -> None:
    for arena in list(_arenas):
        memory, arena._memory = arena._memory, None
        if memory is not None:
            memory._map.close()  # neither its thread nor what CUDA knew of it came along


os.register_at_fork(after_in_child=_forget_in_child)
