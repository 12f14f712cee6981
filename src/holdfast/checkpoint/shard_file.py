"""One process's shards in one file of torch.distributed.checkpoint (DCP), written from beginning to end.

DCP has each chunk as `torch.save` would write it, one after the other. These here are such items too, with
each tensor's bytes at a known place, so that they can be read without what is around them.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from holdfast.checkpoint import commit, container, direct, pickling
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.direct import BlockWriter, Write
from holdfast.checkpoint.sharded_payload import is_dtensor
from holdfast.checkpoint.sharded_tensors import Chunk, Part
from holdfast.checkpoint.tensors import Plan, memory
from holdfast.checkpoint.writing import BATCH_BYTES, BUFFERS, DIRECT_BYTES, PIECE_BYTES


class Written(NamedTuple):
    """A chunk as a process wrote it: an item of DCP's, with the tensor's bytes at a known place in it."""

    key: str
    at: int
    length: int
    chunk: Chunk


class Shard(NamedTuple):
    """What one process wrote.

    Attributes:
        file: its name; None if there was nothing for it to write.
        part: its size and checksum.
        written: the chunks in it.
    """

    file: str | None
    part: Part | None
    written: list[Written]


def local_part(tensor: Any) -> torch.Tensor:
    """What this process has of a tensor: of a DTensor its shard."""
    local: torch.Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return local.detach()


class ShardFile:
    """A file that is written from its beginning to its end, its checksum computed on the way.

    What it is given is copied, and the checksums are those of the copy: of what is written, come what may.

    Memory: `BATCH_BYTES` times `BUFFERS`, or what the file needs.

    Args:
        path: the file, which is made.
        least_bytes: how long it is going to be at least.

    Attributes:
        position: how many bytes have been put.
        checksum: of these.
    """

    def __init__(self, path: str, least_bytes: int) -> None:
        self.position = self.checksum = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._writer: BlockWriter | None = None
        if least_bytes >= DIRECT_BYTES:
            direct.reserve(self._fd, least_bytes)
            self._writer = BlockWriter(self._fd)
        count = BUFFERS if self._writer is not None else 1
        self._size = BATCH_BYTES if self._writer is not None else DIRECT_BYTES
        self._memory = memoryview(direct.aligned(self._size * count))
        self._writes: list[Write | None] = [None] * count
        self._turn = self._filled = 0  # which buffer, and how much of it

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
        os.close(self._fd)

    def put(self, data: bytes | memoryview) -> int:
        """Write the next bytes; returns their checksum.

        Raises:
            OSError: the file system refused these or earlier ones.
        """
        view, checksum = memoryview(data), 0
        for at in range(0, len(view), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            while piece:
                count = min(len(piece), self._size - self._filled)
                begin = self._turn * self._size + self._filled
                copy = self._memory[begin : begin + count]
                copy[:] = piece[:count]
                checksum = crc32(copy, checksum)
                self.checksum = crc32(copy, self.checksum)
                self._filled += count
                self.position += count
                piece = piece[count:]
                if self._filled == self._size:
                    self._hand_over()
        return checksum

    def _hand_over(self) -> None:
        """Have a full buffer written, and go on in the next one."""
        full = self._memory[self._turn * self._size : self._turn * self._size + self._filled]
        if self._writer is None:
            commit.write_all(self._fd, full)
        else:
            self._writes[self._turn] = self._writer.put(full, self.position - self._filled)
            self._turn = (self._turn + 1) % len(self._writes)
            before = self._writes[self._turn]
            if before is not None:
                before.wait()
        self._filled = 0

    def end(self) -> None:
        """Bring all of it onto the disk.

        Raises:
            OSError: the file system refused.
        """
        if self._writer is not None:
            self._writer.close()
            os.lseek(self._fd, self.position - self._filled, os.SEEK_SET)
        begin = self._turn * self._size
        commit.write_all(self._fd, self._memory[begin : begin + self._filled])
        os.fsync(self._fd)


def put_item(
    file: ShardFile,
    name: str,
    key: str,
    tensor: torch.Tensor,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Written:
    """Write a chunk as torch.save would, alone in a zip archive, with its bytes aligned."""
    file.put(bytes(-file.position % container.ALIGNMENT))
    begin = file.position
    local = local_part(tensor)
    if tuple(local.shape) != sizes:
        raise RuntimeError(f"{key} has a shard of shape {tuple(local.shape)} where {sizes} was planned")
    local = local.cpu().contiguous()
    length = local.numel() * local.element_size()
    view = memory(local.data_ptr(), length)
    checksum = crc32(view)
    entries: list[container.Entry] = []

    def put(inner: str, data: memoryview | bytes, crc: int) -> None:
        at = file.position - begin
        header = container.local_header(inner, at, len(data), crc)
        entries.append(container.Entry(inner, at, at + len(header), len(data), crc))
        file.put(header)
        if file.put(data) != crc:
            raise RuntimeError(f"{key} changed while it was being saved: save a snapshot of it")

    put("data/0", view, checksum)
    pickled = pickling.dumps(local, Plan([(key, local)]))
    for inner, data in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
        put(inner, data, crc32(data))
    file.put(container.directory(entries, file.position - begin))
    chunk = Chunk(name, begin + entries[0].offset, length, checksum, offsets, sizes)
    return Written(key, begin, file.position - begin, chunk)
