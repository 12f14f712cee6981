"""Reading a checkpoint back: every byte is checked before anything of it is returned, and no code runs."""

from __future__ import annotations

import difflib
import json
import os
import threading
from collections.abc import Collection
from typing import Any

import torch

from holdfast.checkpoint import catalog, container, foreign, integrity, payload, pickling
from holdfast.checkpoint.container import Entry
from holdfast.checkpoint.integrity import crc32
from holdfast.checkpoint.tensors import memory
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointIncompatible,
    CheckpointNotFound,
    CheckpointUnsafe,
)

_BATCH_BYTES = 16 << 20
_BATCH_RECORDS = 400  # two buffers each, and the kernel takes 1,024
_CHECK_BYTES = 4 << 20  # read and checked while it is in the processor's cache
_STAGED_BYTES = 64 << 10


def load(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    skip: Collection[str] = (),
    verify: bool = True,
) -> Any:
    """Read a checkpoint: the payload, equal to what was saved, each byte of it checked first.

    Tensors own their memory: nothing refers to the file afterwards. Opening a checkpoint runs no code that the
    file names. Checkpoints of torch.save and PyTorch Lightning are read too: their unknown classes become
    inert `foreign.Opaque` objects.

    Args:
        path: the file.
        map_location: where tensors go, as `torch.load` takes it.
        skip: top-level keys to leave out; tensors that only they hold are neither read nor checked.
        verify: False leaves the tensors' checksums uncompared; the structure is checked all the same.

    Raises:
        CheckpointNotFound: there is no such file; names the nearest names in that directory.
        CheckpointIncomplete: the file was cut short, or is not a checkpoint.
        CheckpointCorrupt: bytes differ from those written; names the record and the tensors in it.
        CheckpointIncompatible: the file was written by a newer holdfast.
        CheckpointUnsafe: the file asks for code or for absurd amounts of memory.
        StorageError: the disk failed.
    """
    name = os.fspath(path)
    file = _open(name)
    with file:
        fd = file.fileno()
        try:
            tail = container.read_tail(fd)
        except container.NotWhole as problem:
            if problem.ours or container.has_mark(fd):
                raise CheckpointIncomplete(
                    f"{os.path.basename(name)} is not a whole checkpoint: {problem.reason}.{_newest(name)}",
                    path=name,
                ) from None
            return foreign.load(name, fd, map_location=map_location, skip=skip, verify=verify)
        except OSError as error:
            from holdfast.checkpoint.commit import storage_error

            raise storage_error(name, "read", error) from error
        return _Reader(name, fd, tail, map_location, frozenset(skip), verify).load()
