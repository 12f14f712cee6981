"""Tensors that lie in a file until it is released: mapped, not read, so they cost no memory of their own.

A mapping has two dangers. What is written into the file in place shows in the tensors, and a file that is
truncated kills the process (SIGBUS) that touches what is gone. So nothing may refer to a mapping for longer
than a restore takes, and nothing can: what is still alive when a mapping is released gets memory of its own,
at the same address.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
import weakref
from typing import Any

import torch

from holdfast.checkpoint import integrity
from holdfast.checkpoint.integrity import Damage, Job
from holdfast.checkpoint.tensors import memory, new_storage
from holdfast.errors import CheckpointCorrupt

_PAGE_BYTES = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000
_MAY_MOVE, _FIXED = 1, 2

# File systems whose pages are this machine's own: elsewhere another machine can change them, and a connection
# that is lost is a SIGBUS.
_LOCAL_FILE_SYSTEMS = {
    0xEF53,  # ext4
    0x58465342,  # XFS
    0x9123683E,  # Btrfs
    0x2FC12FC1,  # ZFS
    0xF2F52010,  # F2FS
    0xCA451A4E,  # bcachefs
    0x01021994,  # tmpfs
    0x858458F6,  # ramfs
    0x794C7630,  # overlayfs, of containers
}


def _linux_calls() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    libc.mremap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
    )  # fmt: skip
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return libc


_libc: Any = _linux_calls() if sys.platform == "linux" and sys.maxsize > 1 << 32 else None


def can_map(fd: int) -> bool:
    """Whether a file lies where mapping it is safe: on this machine, under Linux."""
    if _libc is None:
        return False
    about = (ctypes.c_long * 64)()
    return _libc.fstatfs(fd, ctypes.byref(about)) == 0 and about[0] in _LOCAL_FILE_SYSTEMS


class MappedFile:
    """A private mapping of a whole file, in which storages can lie.

    Args:
        fd: The file; it may be closed afterwards.

    Raises:
        OSError: the system refuses.
    """

    def __init__(self, fd: int) -> None:
        about = os.fstat(fd)
        self._as_mapped = about.st_size, about.st_mtime_ns
        self._checked: list[Job] = []
        self._address = _map(about.st_size, fd)
        self._fd = os.dup(fd)
        self._lent: list[tuple[Any, int, int]] = []
        self._let_go = weakref.finalize(self, _let_go, self._fd, self._address, about.st_size, self._lent)
        self._let_go.atexit = False  # the end of the process lets go of it anyway

    def storage(self, job: Job) -> torch.UntypedStorage:
        """The storage of one record, which whoever asks has to check; writing to it leaves the file alone."""
        entry = job.record.entry
        if entry.length == 0:
            return new_storage(0)
        view = memory(self._address + entry.offset, entry.length, writable=True)
        self._lent.append((weakref.ref(view), entry.offset, entry.length))
        self._checked.append(job)
        # The storage holds on to the view, so the view tells whether the storage is alive.
        return torch.frombuffer(view, dtype=torch.uint8).untyped_storage()

    def check(self) -> None:
        """Make sure that the file still holds what was verified when its storages were made.

        Raises:
            Damage: it was cut short or overwritten in place since then.
        """
        about = os.fstat(self._fd)
        if (about.st_size, about.st_mtime_ns) == self._as_mapped:
            return
        size, _ = self._as_mapped
        if about.st_size < size:
            raise Damage(f"it was cut from {size} to {about.st_size} bytes while it was being loaded")
        try:
            integrity.read_records(self._fd, self._checked)
        except Damage as damage:
            raise Damage(f"it was overwritten while it was being loaded: {damage}") from None
        self._as_mapped = size, about.st_mtime_ns

    def release(self) -> None:
        """Let go of the file. Storages that are still alive own their memory from here on.

        On return: neither changing nor truncating the file touches anything.
        """
        if any(view() is not None for view, _, _ in self._lent):
            gc.collect()  # rather than copy what only garbage refers to, such as the frames of an exception
        self._let_go()


def _map(length: int, fd: int) -> int:
    """Memory that nobody else sees the changes of: a file's, or with ``fd=-1`` zeros."""
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(address)


def _let_go(fd: int, address: int, length: int, lent: list[tuple[Any, int, int]]) -> None:
    try:
        alive = [(view(), offset, size) for view, offset, size in lent]
        alive = [one for one in alive if one[0] is not None]
        if alive:
            _give_memory(address, length, os.fstat(fd).st_size, [one[1:] for one in alive])
            _Remains(address, length, [one[0] for one in alive])
        else:
            _libc.munmap(address, length)
    finally:
        os.close(fd)


def _give_memory(address: int, length: int, size_now: int, alive: list[tuple[int, int]]) -> None:
    """Put a copy of what is alive in the place of the mapping, in one step."""
    fresh = _map(length, -1)
    end = 0
    for offset, size in sorted(alive):
        # Whole pages, and none twice: neighbours in a page may both be alive.
        begin = max(end, offset - offset % _PAGE_BYTES)
        end = max(end, min(offset + size + -(offset + size) % _PAGE_BYTES, length))
        # What was cut off is gone; reading it would be the end of the process.
        there = min(end, size_now + -size_now % _PAGE_BYTES)
        if there > begin:
            ctypes.memmove(fresh + begin, address + begin, there - begin)
    if _libc.mremap(fresh, length, length, _MAY_MOVE | _FIXED, address) != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class _Remains:
    """Memory at the address of a mapping that is gone, unmapped when the last storage in it is."""

    def __init__(self, address: int, length: int, views: list[Any]) -> None:
        self._address, self._length, self._left = address, length, len(views)
        for view in views:
            weakref.finalize(view, self._one_less).atexit = False

    def _one_less(self) -> None:
        self._left -= 1
        if not self._left:
            _libc.munmap(self._address, self._length)


class Loaded:
    """A payload of which some tensors may lie in its file; `release` it as soon as its use is over.

    Attributes:
        payload: what was read, each byte of it verified.
    """

    def __init__(self, name: str, payload: Any, mapping: MappedFile | None = None) -> None:
        self.payload = payload
        self._name = name
        self._mapping = mapping

    def check(self) -> None:
        """Make sure, before the tensors are used, that nobody has changed the file since it was verified.

        Raises:
            CheckpointCorrupt: somebody has.
        """
        self._check(self._mapping)

    def release(self) -> None:
        """Let go of payload and file; what still refers to a tensor keeps it, in memory of its own.

        Raises:
            CheckpointCorrupt: the file was changed while its tensors were in use.
        """
        self.payload = None
        mapping, self._mapping = self._mapping, None
        try:
            self._check(mapping)
        finally:
            if mapping is not None:
                mapping.release()

    def _check(self, mapping: MappedFile | None) -> None:
        try:
            if mapping is not None:
                mapping.check()
        except Damage as damage:
            raise CheckpointCorrupt(
                f"{os.path.basename(self._name)} is corrupt: {damage}.", path=self._name
            ) from None
