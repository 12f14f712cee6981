"""Writing the file: the storages as one stream of whole blocks, then what describes them, last the directory.

The storages go out in large pieces while the next ones are copied and their checksums are computed, from a
ring of buffers or from an image in memory that has the data in place already. A checksum is always that of
the bytes that are written, whatever another thread does to a tensor meanwhile.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from holdfast.checkpoint import commit, container, direct
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry
from holdfast.checkpoint.direct import BLOCK_BYTES, BlockWriter, Write
from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.tensors import Record

BATCH_BYTES = 8 << 20
BUFFERS = 4
DIRECT_BYTES = 1 << 20  # what is smaller costs less in one go through the page cache
PIECE_BYTES = 1 << 20  # copied, then checked while it is in the processor's cache
_CHECKSUM_AT = 14  # within a local header

_checksum = struct.Struct("<I")


class Content(NamedTuple):
    """What goes into a file.

    Attributes:
        layout: the storages; their values are read while they are written, or lie in an image.
        pickled: ``data.pkl``.
        types: the exact types of the payload's values.
        omissions: (path, reason) of each value that is left out.
        about: the summary.
    """

    layout: Layout
    pickled: bytes
    types: Any
    omissions: list[tuple[str, str]]
    about: dict[str, Any]


def write(file: commit.Replacement, content: Content, image: memoryview | None = None) -> int:
    """Write the whole file; return its length.

    Memory: without an image `BATCH_BYTES` times `BUFFERS`, however large the state.

    Args:
        file: a new file, to which nothing else writes.
        content: what goes into it.
        image: at least ``layout.image_bytes`` of writable memory from a page's start, with each record's
            data at its ``offset``. The headers are put between them; what comes after ``layout.end``, up to
            the block's end, may be overwritten.

    Raises:
        StorageError: there is less room than the file needs; nothing was written.
        OSError: the file system refused.
    """
    layout = content.layout
    file.needed_bytes = layout.end + len(content.pickled) + layout.tail_bytes
    commit.check_room(file)
    if layout.end < DIRECT_BYTES:
        storages = _Storages(layout, image, None)
        storages.put()
        tail, directory = _tail(content, storages.entries)
    else:
        direct.reserve(file.fd, layout.end)
        writer = BlockWriter(file.fd)
        try:
            storages = _Storages(layout, image, writer)
            storages.put()
            tail, directory = _tail(content, storages.entries)  # while the last blocks are on their way
        except BaseException:
            writer.abandon()
            raise
        writer.close()
    for at, block in storages.late_headers:
        commit.writev_all(file.fd, [block], at)
    at = commit.writev_all(file.fd, [storages.rest, *tail], layout.end - len(storages.rest))
    commit.crash_point("writing")
    commit.crash_point("before-directory")
    return commit.writev_all(file.fd, [directory], at)


def _tail(content: Content, entries: list[Entry]) -> tuple[list[bytes], bytes]:
    """What follows the storages, and then the directory of the whole."""
    entries = list(entries)
    parts: list[bytes] = []
    at = content.layout.end

    def add(name: str, data: bytes) -> Entry:
        nonlocal at
        checksum = crc32(data)
        header = container.local_header(name, at, len(data), checksum)
        entry = Entry(name, at, at + len(header), len(data), checksum)
        entries.append(entry)
        parts.extend((header, data))
        at = entry.offset + entry.length
        return entry

    add("data.pkl", content.pickled)
    add("version", b"3\n")
    add("byteorder", b"little")
    manifest = container.records_bytes(entries, content.layout.tensors, content.types, content.omissions)
    placed = add(container.RECORDS, manifest)
    add(container.SUMMARY, container.summary_bytes(content.about, placed))
    return parts, container.directory(entries, at)


class _Storages:
    """Puts the records and their headers into one buffer after the other and has the full ones written.

    Attributes:
        entries: the records put so far.
        rest: what follows the last whole block that was written.
        late_headers: (offset, bytes) of blocks with the headers of records longer than a buffer, to be
            written once more now that the checksums are known.
    """

    def __init__(self, layout: Layout, image: memoryview | None, writer: BlockWriter | None) -> None:
        self.entries: list[Entry] = []
        self.rest = b""
        self.late_headers: list[tuple[int, bytes]] = []
        self._layout = layout
        self._image = image
        self._writer = writer
        self._ring = _Ring(max(BLOCK_BYTES, layout.image_bytes)) if image is None else None
        self._start = 0  # where in the file the buffer begins
        self._buffer, self._address = self._next_buffer()

    def put(self) -> None:
        layout = self._layout
        for record, entry, header in zip(layout.records, layout.entries, layout.headers, strict=True):
            end = entry.offset + entry.length
            if end > self._start + BATCH_BYTES:
                self._flush(entry.header - entry.header % BLOCK_BYTES, entry.header)
            base = entry.header - self._start
            self._buffer[base : base + len(header)] = header
            if end > self._start + BATCH_BYTES:
                checksum = self._put_long(record, entry, header)
            else:
                checksum = self._fill(record, entry)
                _checksum.pack_into(self._buffer, base + _CHECKSUM_AT, checksum)
            self.entries.append(Entry(entry.name, entry.header, entry.offset, entry.length, checksum))
        whole = layout.end - layout.end % BLOCK_BYTES if self._writer is not None else 0
        self.rest = bytes(self._buffer[max(0, whole - self._start) : layout.end - self._start])
        if self._writer is not None and whole > self._start:
            self._writer.put(self._buffer[: whole - self._start], self._start)

    def _fill(self, record: Record, entry: Entry) -> int:
        """Put a record that fits into the buffer; return its checksum."""
        at = entry.offset - self._start
        if self._ring is None or record.length <= PIECE_BYTES:
            if self._ring is not None:
                record.copy_to(self._address + at)
            return crc32(self._buffer[at : at + entry.length])
        checksum = 0
        for source, length in self._pieces(record, entry):
            ctypes.memmove(self._address + at, source, length)
            checksum = crc32(self._buffer[at : at + length], checksum)
            at += length
        return checksum

    def _put_long(self, record: Record, entry: Entry, header: bytes) -> int:
        """Put a record that is longer than a buffer; its header's blocks are written once more at the end."""
        first = entry.header - entry.header % BLOCK_BYTES
        last = entry.offset + -entry.offset % BLOCK_BYTES
        block = bytearray()
        at, checksum = entry.offset, 0
        for source, length in self._pieces(record, entry):
            done = 0
            while done < length:
                if at == self._start + BATCH_BYTES:
                    if not block:
                        block += self._buffer[first - self._start : last - self._start]
                    self._flush(at, at)
                here = at - self._start
                count = min(length - done, BATCH_BYTES - here)
                if self._ring is not None:
                    ctypes.memmove(self._address + here, source + done, count)
                checksum = crc32(self._buffer[here : here + count], checksum)
                done += count
                at += count
        _checksum.pack_into(block, entry.header - first + _CHECKSUM_AT, checksum)
        self.late_headers.append((first, bytes(block)))
        return checksum

    def _pieces(self, record: Record, entry: Entry) -> Iterator[tuple[int, int]]:
        if self._ring is None:
            yield 0, entry.length
            return
        for source, length in record.pieces():
            for done in range(0, length, PIECE_BYTES):
                yield source + done, min(PIECE_BYTES, length - done)

    def _flush(self, stop: int, filled: int) -> None:
        """Have the buffer written up to ``stop``; carry what it holds from there to ``filled`` over."""
        if stop == self._start:
            return
        assert self._writer is not None
        data = self._buffer[: stop - self._start]
        carried = self._buffer[stop - self._start : filled - self._start]
        write = self._writer.put(data, self._start)
        self._start = stop
        if self._ring is not None:
            self._ring.lend(write)
        self._buffer, self._address = self._next_buffer()
        if self._ring is not None:
            self._buffer[: len(carried)] = carried

    def _next_buffer(self) -> tuple[memoryview, int]:
        if self._ring is not None:
            return self._ring.next()
        assert self._image is not None
        return self._image[self._start : self._start + BATCH_BYTES], 0


class _Ring:
    """A few aligned buffers, each used again once its write has ended."""

    def __init__(self, needed_bytes: int) -> None:
        self._size = min(needed_bytes, BATCH_BYTES)
        self._writes: list[Write | None] = [None] * min(BUFFERS, -(-needed_bytes // BATCH_BYTES) + 1)
        self._memory = memoryview(direct.aligned(self._size * len(self._writes)))
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._at = 0

    def next(self) -> tuple[memoryview, int]:
        """A buffer and its address; waits until what it held before is written."""
        write = self._writes[self._at]
        if write is not None:
            write.wait()
        begin = self._at * self._size
        return self._memory[begin : begin + self._size], self._begin + begin

    def lend(self, write: Write) -> None:
        """The buffer belongs to a write from here on."""
        self._writes[self._at] = write
        self._at = (self._at + 1) % len(self._writes)
