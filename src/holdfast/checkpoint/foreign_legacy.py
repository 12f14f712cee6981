"""The format of torch.save before torch 1.6: five pickles one after the other, then the storages' bytes.

It has no checksums: what can be told of damage is that lengths do not fit. Source: the files themselves,
which ``torch.save(..., _use_new_zipfile_serialization=False)`` still writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from holdfast.checkpoint import pickling
from holdfast.checkpoint.tensors import memory, new_storage
from holdfast.errors import CheckpointIncompatible, CheckpointIncomplete

_FIRST_WINDOW_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20


class LegacyFile:
    """A file in the old format; `pickled` is the payload's pickle, and `storage` reads what it refers to."""

    def __init__(self, name: str, fd: int) -> None:
        self._name, self._fd = name, fd
        self._size = os.fstat(fd).st_size
        _, at = self._pickle(0)  # the format's mark
        _, at = self._pickle(at)  # its version
        about, at = self._pickle(at)
        machine = self._plain(about)
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise CheckpointIncompatible(
                f"{os.path.basename(name)} was written on a big-endian machine.", path=name
            )
        self.pickled, at = self._pickle(at)
        keys, at = self._pickle(at)
        self._keys = self._plain(keys)
        self._at = at
        self._places: dict[str, tuple[int, int]] = {}

    def locate(self, itemsizes: Mapping[str, int]) -> None:
        """Find each storage from the sizes of the elements, by key, which only the pickle knows."""
        at = self._at
        for key in self._keys if isinstance(self._keys, list) else ():
            if key not in itemsizes:
                raise pickling.PickleError(f"it has a storage {str(key)[:40]!r} that nothing refers to")
            count = int.from_bytes(os.pread(self._fd, 8, at), "little", signed=True)
            length = count * itemsizes[key]
            if count < 0 or at + 8 + length > self._size:
                raise self._cut_short("it ends within its tensors")
            self._places[key] = (at + 8, length)
            at += 8 + length

    def length(self, key: str) -> int:
        """Bytes of a storage."""
        if key not in self._places:
            raise pickling.PickleError(f"there is no storage {key[:40]!r}")
        return self._places[key][1]

    def place(self, key: str) -> int:
        """Where a storage's bytes begin."""
        self.length(key)
        return self._places[key][0]

    def storage(self, key: str) -> torch.UntypedStorage:
        """Read a storage into memory of its own."""
        length = self.length(key)
        at = self._places[key][0]
        storage = new_storage(length)
        into = memory(storage.data_ptr(), length, writable=True)
        while into:
            count = os.preadv(self._fd, [into[:_PIECE_BYTES]], at)
            if count == 0:
                raise self._cut_short("it ends within its tensors")
            into, at = into[count:], at + count
        return storage

    def _pickle(self, at: int) -> tuple[bytes, int]:
        """The pickle that begins at ``at``, and where the next thing begins."""
        window = _FIRST_WINDOW_BYTES
        while True:
            data = os.pread(self._fd, window, at)
            try:
                end = pickling.scan(data)
            except pickling.PickleError as error:
                if at + len(data) >= self._size:
                    raise self._cut_short(f"what stands at byte {at} cannot be read: {error}") from error
                window *= 4
                continue
            return data[:end], at + end

    def _plain(self, data: bytes) -> Any:
        def refuse(key: str, location: str) -> torch.UntypedStorage:
            raise pickling.PickleError("a tensor stands where none belongs")

        return pickling.SafeUnpickler(data, refuse).load()

    def _cut_short(self, problem: str) -> CheckpointIncomplete:
        return CheckpointIncomplete(
            f"{os.path.basename(self._name)}, in torch's old format, is not a whole checkpoint: {problem}.",
            path=self._name,
        )
