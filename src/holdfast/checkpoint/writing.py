"""Writing the file: records behind their headers, the manifest and the summary, last the zip directory."""

from __future__ import annotations

from typing import Any

from holdfast.checkpoint import commit, container, payload
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry
from holdfast.checkpoint.tensors import Record

_COALESCE_BYTES = 4 << 20
_SMALL_BYTES = 128 << 10


def write(
    fd: int, pickled: bytes, records: list[Record], encoded: payload.Encoded, about: dict[str, Any]
) -> int:
    """Write the whole file from its start; return its length.

    Memory: a few chunks, however large the state.
    """
    writer = _Writer(fd)
    writer.add("data.pkl", pickled)
    writer.add("version", b"3\n")
    writer.add("byteorder", b"little")
    tensors: dict[str, list[str]] = {}
    for record in records:
        tensors[record.name] = [
            container.tensor_json(span.name, str(span.tensor.dtype)[6:], span.tensor.shape)
            for span in record.spans
        ]
        writer.add_record(record)
    manifest = container.records_bytes(writer.entries, tensors, encoded.types, encoded.omissions)
    placed = writer.add(container.RECORDS, manifest)
    writer.add(container.SUMMARY, container.summary_bytes(about, placed))
    writer.flush()
    commit.crash_point("before-directory")
    return commit.writev_all(fd, [container.directory(writer.entries, writer.at)], writer.at)


class _Writer:
    """Lays records out one after the other and writes them in large pieces."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.entries: list[Entry] = []
        self.at = 0  # where the next header goes
        self._written = 0
        self._pending: list[bytes] = []

    def add(self, name: str, data: bytes) -> Entry:
        """Place a small record; it is written with its neighbours."""
        entry = self._place(name, len(data), crc32(data))
        self._pending.append(data)
        if self.at - self._written >= _COALESCE_BYTES:
            self.flush()
        return entry

    def add_record(self, record: Record) -> None:
        if record.length <= _SMALL_BYTES:
            self.add(record.name, record.small())
            return
        # Twice over the memory, since a zip's checksum stands before the data; a checksum costs little.
        checksum = 0
        for chunk in record.chunks():
            checksum = crc32(chunk, checksum)
        self._place(record.name, record.length, checksum)
        for chunk in record.chunks():
            self.flush(chunk)

    def _place(self, name: str, length: int, checksum: int) -> Entry:
        header = container.local_header(name, self.at, length, checksum)
        entry = Entry(name, self.at, self.at + len(header), length, checksum)
        self.entries.append(entry)
        self.at = entry.offset + length
        self._pending.append(header)
        return entry

    def flush(self, chunk: Any = b"") -> None:
        """Write what is pending, and then the chunk."""
        self._written = commit.writev_all(self.fd, [b"".join(self._pending), chunk], self._written)
        self._pending = []
        commit.crash_point("writing")
