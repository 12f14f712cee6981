"""Reading checkpoints that holdfast did not write: PyTorch Lightning's and torch.save's, old format included.

Nothing that such a file names is imported or called. Tensors and plain values come back as they are; a class
outside the allowlist becomes an inert `Opaque` object, which remembers its name and what the file said of it.
"""

from __future__ import annotations

import os
import zipfile
from typing import Any, Protocol

import torch

from holdfast.checkpoint import container, foreign_legacy, pickling
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.foreign_types import KNOWN, Opaque, opaque_class, settle
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
        elif foreign_legacy.begins(head):
            value = _load_legacy(name, fd, move, skip)
        else:
            found = "is empty" if not head else f"begins with {head!r}"
            raise CheckpointIncomplete(f"{short} is not a checkpoint: it {found}.", path=name)
    except (CheckpointError, OSError, Warning):
        raise
    except (pickling.PickleError, RecursionError, MemoryError) as error:
        raise CheckpointUnsafe(f"{short} cannot be read: {error}.", path=name) from error
    except Exception as error:
        raise CheckpointCorrupt(f"{short} cannot be read: {error!r}.", path=name) from error
    if isinstance(value, dict):
        for key in skip:
            value.pop(key, None)
    return value


def _load_zip(name: str, fd: int, move: Mover | None, skip: frozenset[str], verify: bool) -> Any:
    short = os.path.basename(name)
    archive = _Archive(name, fd, verify)
    if "constants.pkl" in archive.records:
        raise CheckpointIncompatible(f"{short} is a TorchScript program, not a checkpoint.", path=name)
    if "data.pkl" not in archive.records:
        raise CheckpointIncomplete(
            f"{short} is a zip archive, but not a checkpoint: it has no data.pkl.", path=name
        )
    if "byteorder" in archive.records and archive.read("byteorder") != b"little":
        raise CheckpointIncompatible(f"{short} was written on a big-endian machine.", path=name)
    pickled = archive.read("data.pkl")
    pickling.scan(pickled)
    wanted = _wanted(pickled, skip) if skip else None
    return _build(pickled, archive, wanted, move)


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
    value = unpickler.load()
    return settle(value) if unpickler.has_stubs else value


class _Stubs(pickling.SafeUnpickler):
    """Builds an inert object wherever a pickle names something that is not on the list."""

    has_stubs = False

    def unknown_global(self, module: str, name: str) -> Any:
        self.has_stubs = True
        known = KNOWN.get((module, name))
        if known is not None:
            return known
        classes: dict[tuple[str, str], type[Opaque]] = self.__dict__.setdefault("classes", {})
        if (module, name) not in classes:
            classes[module, name] = opaque_class(module, name)
        return classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        # The old format has a sixth part, for views, which no torch has written since 0.4.
        return super().persistent_load(pid[:5] if type(pid) is tuple and pid[5:] == (None,) else pid)


class _ForeignUnpickler(_Stubs):
    """Builds the payload."""


class _Sketch(_Stubs, Outline):
    """Builds the payload without a single tensor, and takes note of the sizes of their elements."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.itemsizes: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Any:
        key = super().persistent_load(pid)
        kind, name, _, _ = pickling.storage_id(pid[:5])
        self.itemsizes[name] = kind.dtype.itemsize
        return key


class _Archive:
    """The records of a zip archive, read straight from the file, each header and checksum compared."""

    def __init__(self, name: str, fd: int, verify: bool) -> None:
        self._name, self._fd, self._verify = name, fd, verify
        short = os.path.basename(name)
        try:
            with os.fdopen(os.dup(fd), "rb") as again, zipfile.ZipFile(again) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
            raise CheckpointIncomplete(
                f"{short} is not a whole checkpoint: it begins as a zip archive, but the directory at "
                f"its end cannot be read ({error}). It may have been cut short.",
                path=name,
            ) from error
        self.size = os.fstat(fd).st_size
        self.records: dict[str, zipfile.ZipInfo] = {}
        roots = {info.filename.split("/", 1)[0] for info in infos}
        for info in infos:
            inner = info.filename.split("/", 1)[-1]
            if inner.startswith("holdfast/"):
                raise CheckpointIncomplete(
                    f"{short} is not a whole checkpoint: its manifest is damaged.", path=name
                )
            if inner in self.records:
                raise CheckpointCorrupt(f"{short} is corrupt: it has two records named {inner}.", path=name)
            self.records[inner] = info
        if len(roots) != 1:
            raise CheckpointIncomplete(f"{short} is a zip archive, but not a checkpoint.", path=name)

    def read(self, inner: str) -> bytes:
        buffer = bytearray(self._length(inner))
        self._fill(inner, memoryview(buffer))
        return bytes(buffer)

    def length(self, key: str) -> int:
        """Bytes of the storage ``data/<key>``."""
        if f"data/{key}" not in self.records:
            raise self._corrupt(f"it has no record data/{key}")
        return self._length(f"data/{key}")

    def storage(self, key: str) -> torch.UntypedStorage:
        """The storage ``data/<key>``, in memory of its own."""
        length = self.length(key)
        storage = new_storage(length)
        self._fill(f"data/{key}", memory(storage.data_ptr(), length, writable=True))
        return storage

    def _length(self, inner: str) -> int:
        info = self.records[inner]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointIncompatible(
                f"{os.path.basename(self._name)}: {inner} is compressed; a checkpoint's records are stored.",
                path=self._name,
            )
        if info.header_offset < 0 or info.header_offset + info.file_size > self.size:
            raise self._corrupt(f"{inner} lies outside the file")
        return info.file_size

    def _fill(self, inner: str, into: memoryview) -> None:
        info = self.records[inner]
        head = os.pread(self._fd, 30, info.header_offset)
        name_length = int.from_bytes(head[26:28], "little")
        extra_length = int.from_bytes(head[28:30], "little")
        full = os.pread(self._fd, name_length, info.header_offset + 30)
        if not head.startswith(b"PK\x03\x04") or full != info.orig_filename.encode():
            raise self._corrupt(f"the zip header of {inner} does not agree with the zip directory")
        at = info.header_offset + 30 + name_length + extra_length
        checksum = 0
        while into:
            piece = into[: 2 << 20]
            count = os.preadv(self._fd, [piece], at)
            if count == 0:
                raise self._corrupt(f"the file ends within {inner}")
            checksum = crc32(piece[:count], checksum)
            into, at = into[count:], at + count
        if self._verify and checksum != info.CRC:
            raise self._corrupt(f"{inner} has checksum {checksum:08x}, the zip directory says {info.CRC:08x}")

    def _corrupt(self, what: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(f"{os.path.basename(self._name)} is corrupt: {what}.", path=self._name)


__all__ = ["Opaque", "load"]
