"""A sharded checkpoint as one file: tensor after tensor, a few megabytes of memory however large they are."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from holdfast.checkpoint import background, payload, pickling, sharded_bytes
from holdfast.checkpoint.directories import PAYLOAD
from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.load import load as load_file
from holdfast.checkpoint.report import SaveReport
from holdfast.checkpoint.sharded_bytes import Reader
from holdfast.checkpoint.sharded_manifest import Bad
from holdfast.checkpoint.sharded_payload import join
from holdfast.checkpoint.sharded_tensors import TensorEntry
from holdfast.checkpoint.tensors import CHUNK_BYTES, Plan, Record, memory
from holdfast.checkpoint.writing import Content
from holdfast.errors import CheckpointUnsafe
from holdfast.utilities.collector import uncollected


def merge(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> SaveReport:
    """Write a sharded checkpoint as one ordinary ``.ckpt``, durably: what one process would have saved.

    Of what the processes had each for itself, rank 0's is in the ``state_dict``; all of it stays under
    ``holdfast``. Every byte is checked first.

    Args:
        path: the directory, which stays as it is.
        out: the file; one that is there is replaced as a whole.

    Memory: what is not in shards, and a few megabytes.

    Raises:
        CheckpointError: the directory is not there, not whole, or damaged; nothing was written.
        StorageError: the disk refused.
    """
    began = time.monotonic()
    final = os.path.abspath(os.fspath(out))
    with sharded_bytes.opened(path) as directory, Reader(directory) as reader, uncollected():
        sharded_bytes.check(directory, directory.manifest.files)
        rest = load_file(os.path.join(directory.place, PAYLOAD))
        places = _Places()
        try:
            value = join(rest, {key: places.tensor(one) for key, one in directory.tensors().items()})
        except (ValueError, TypeError) as error:
            raise Bad(CheckpointUnsafe, f"its tensors do not fit its {PAYLOAD} ({error})") from error
        encoded = payload.encode(value)
        plan = Plan(encoded.tensors)
        plan.records[:] = [_streamed(record, places, reader) for record in plan.records]
        about = {**directory.manifest.summary, "contents": [key for key in encoded.tree if type(key) is str]}
        pickled = pickling.dumps(encoded.tree, plan)
        content = Content(Layout(plan.records), pickled, encoded.types, encoded.omissions, about)
        size, write_s, _ = background.write(final, content)
    spent = time.monotonic() - began
    return SaveReport(final, (), size, spent, spent, encoded.omissions, write_s=write_s)


class _Places:
    """Tensors that have a shape and an address, and no memory: nobody may look at their values."""

    def __init__(self) -> None:
        self._by_address: dict[int, TensorEntry] = {}
        self._made: dict[Any, torch.Tensor] = {}
        self._kept: list[_Nothing] = []

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """One for a tensor of the checkpoint; the same one for another name of it."""
        dtype = getattr(torch, entry.dtype)
        if not entry.size_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        who = (entry.dtype, entry.shape, entry.chunks)
        if who not in self._made:
            nothing = _Nothing(entry.size_bytes)
            self._kept.append(nothing)
            view = memory(nothing.address, entry.size_bytes, writable=True)
            self._made[who] = torch.frombuffer(view, dtype=torch.uint8).view(dtype).view(entry.shape)
            self._by_address[nothing.address] = entry
        return self._made[who]

    def entry(self, record: Record) -> TensorEntry | None:
        """The tensor whose bytes belong into a record."""
        return None if record.address is None else self._by_address.get(record.address)


class _Nothing:
    """Addresses without memory behind them."""

    def __init__(self, length: int) -> None:
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        )  # fmt: skip
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        none = 0  # PROT_NONE: it can be neither read nor written, so it costs nothing
        found = self._libc.mmap(None, length, none, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address, self._length = int(found), length

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._libc.munmap(self.address, self._length)


class _Streamed(Record):
    """A record whose bytes are read from the shards when they are written."""

    __slots__ = ("_entry", "_reader")

    def __init__(self, record: Record, entry: TensorEntry, reader: Reader) -> None:
        for name in Record.__slots__:
            setattr(self, name, getattr(record, name))
        self.address = None
        self._entry, self._reader = entry, reader
        for span in self.spans:
            span.record = self

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(address, length) of the record's bytes, each good until the next one is asked for."""
        buffer = torch.empty(min(self.length, CHUNK_BYTES), dtype=torch.uint8)
        view = memory(buffer.data_ptr(), buffer.numel(), writable=True)
        for at in range(0, self.length, CHUNK_BYTES):
            count = min(CHUNK_BYTES, self.length - at)
            self._reader.read(self._entry, at, view[:count])
            yield buffer.data_ptr(), count


def _streamed(record: Record, places: _Places, reader: Reader) -> Record:
    entry = places.entry(record)
    return record if entry is None else _Streamed(record, entry, reader)
