"""Reading checkpoints that holdfast did not write: PyTorch Lightning's and torch.save's, old format included.

Nothing that such a file names is imported or called. Tensors and plain values come back as they are; a class
outside the allowlist becomes an inert `Opaque` object, which remembers its name and what the file said of it.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

from holdfast.checkpoint import container, foreign_legacy, pickling
from holdfast.checkpoint.foreign_archive import Archive
from holdfast.checkpoint.foreign_types import KNOWN, Opaque, inert_class, settle
from holdfast.checkpoint.own_file import no_checkpoint
from holdfast.checkpoint.pickle_scan import printable
from holdfast.checkpoint.reachable import Outline, reachable
from holdfast.checkpoint.tensors import Mover, memory, new_storage
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointUnsafe,
)


def load(name: str, fd: int, move: Mover | None, skip: frozenset[str], verify: bool) -> Any:
    """Read a file of torch.save or PyTorch Lightning; checksums are compared where the file has them.

    Raises:
        CheckpointError: one of those that `load.load` names.
    """
    short = os.path.basename(name)
    head = os.pread(fd, 16, 0)
    try:
        if container.is_zip(fd):
            value = _load_zip(name, fd, move, skip, verify)
        elif container.is_old_torch(head):
            value = _load_legacy(name, fd, move, skip)
        else:
            raise no_checkpoint(name, head)
    except (CheckpointError, pickling.UnsafeGlobal, OSError, Warning):
        raise
    except (pickling.PickleError, RecursionError, MemoryError) as error:
        raise CheckpointUnsafe(f"{short} cannot be read: {printable(str(error), 500)}.", path=name) from error
    except Exception as error:
        raise CheckpointCorrupt(
            f"{short} cannot be read: {printable(repr(error), 500)}.", path=name
        ) from error
    if isinstance(value, dict):
        for key in skip:
            value.pop(key, None)
    return value


def _load_zip(name: str, fd: int, move: Mover | None, skip: frozenset[str], verify: bool) -> Any:
    archive = _Archive(name, fd, verify)
    pickled = pickled_of(name, archive)
    pickling.scan(pickled)
    wanted = _wanted(pickled, skip) if skip else None
    return _build(pickled, archive, wanted, move)


def pickled_of(name: str, archive: Archive) -> bytes:
    """The pickle in an archive, unread.

    Raises:
        CheckpointIncompatible: the archive is a program, or was written on another kind of machine.
        CheckpointIncomplete: it has no pickle.
    """
    short = os.path.basename(name)
    if "constants.pkl" in archive.records:
        raise CheckpointIncompatible(f"{short} is a TorchScript program, not a checkpoint.", path=name)
    if "data.pkl" not in archive.records:
        raise CheckpointIncomplete(
            f"{short} is a zip archive, but not a checkpoint: it has no data.pkl.", path=name
        )
    if "byteorder" in archive.records and archive.read("byteorder") != b"little":
        raise CheckpointIncompatible(f"{short} was written on a big-endian machine.", path=name)
    return archive.read("data.pkl")


def _load_legacy(name: str, fd: int, move: Mover | None, skip: frozenset[str]) -> Any:
    file = foreign_legacy.LegacyFile(name, fd)
    sketch = _Sketch(file.pickled)
    sketch.load()
    file.locate(sketch.itemsizes)
    wanted = _wanted(file.pickled, skip) if skip else None
    return _build(file.pickled, file, wanted, move)


class _Storages(Protocol):
    """The storages of a file, by the keys that its pickle has for them."""

    def length(self, key: str) -> int:
        """Bytes of one."""

    def storage(self, key: str) -> torch.UntypedStorage:
        """Read one."""


def _wanted(pickled: bytes, skip: frozenset[str]) -> set[str] | None:
    try:
        return reachable(pickled, skip, _Sketch)
    except Exception:  # a file that can only be read whole: if it is bad, that will say so
        return None


def _build(pickled: bytes, storages: _Storages, wanted: set[str] | None, move: Mover | None) -> Any:
    read: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, location: str) -> torch.UntypedStorage:
        if key not in read:
            if wanted is not None and key not in wanted:
                read[key] = new_storage(storages.length(key), "meta")
            else:
                found = storages.storage(key)
                read[key] = found if move is None else move(found, location)
        return read[key]

    unpickler = _ForeignUnpickler(pickled, storage)
    with pickling.allowance(16 * len(pickled) + (1 << 16)):
        value = unpickler.load()
        return settle(value) if unpickler.has_stubs else value


class Stubs(pickling.SafeUnpickler):
    """Builds an inert object wherever a pickle names something that is not on the list."""

    has_stubs = False

    def unknown_global(self, module: str, name: str) -> Any:
        self.has_stubs = True
        known = KNOWN.get((module, name))
        if known is not None:
            return known
        return inert_class(module, name, self.__dict__.setdefault("classes", {}))

    def persistent_load(self, pid: Any) -> Any:
        # The old format has a sixth part, for views, which no torch has written since 0.4.
        return super().persistent_load(pid[:5] if type(pid) is tuple and pid[5:] == (None,) else pid)


class _ForeignUnpickler(Stubs):
    """Builds the payload."""


class _Sketch(Stubs, Outline):
    """Builds the payload without a single tensor, and takes note of the sizes of their elements."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.itemsizes: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Any:
        key = super().persistent_load(pid)
        kind, name, _, _ = pickling.storage_id(pid[:5])
        self.itemsizes[name] = kind.dtype.itemsize
        return key


class _Archive(Archive):
    """An archive whose storages are read into torch's memory."""

    def storage(self, key: str) -> torch.UntypedStorage:
        """The storage ``data/<key>``, in memory of its own."""
        length = self.length(key)
        storage = new_storage(length)
        self.fill(f"data/{key}", memory(storage.data_ptr(), length, writable=True))
        return storage


__all__ = ["Opaque", "load"]
