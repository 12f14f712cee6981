"""Files that only a hostile hand or another program writes: each part as wished, every checksum right."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.checkpoint import container
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def build(
    path: Path,
    *,
    value: Any = None,
    pickled: bytes | None = None,
    types: Any = None,
    storages: tuple[bytes, ...] = (),
    summary: dict[str, Any] | bytes = b"",
    change: Callable[[dict[str, Any]], None] | None = None,
    manifest: bytes | None = None,
    more: tuple[tuple[str, bytes], ...] = (),
    byteorder: bytes = b"little",
) -> Path:
    """Write one file of ours.

    Args:
        path: Where.
        value: The payload, or
        pickled: its pickle.
        types: The exact types.
        storages: The records ``data/0``, ``data/1``, ...
        summary: Values, or as bytes the whole record.
        change: Edits the manifest, or
        manifest: is all of it, with ``%ROWS%`` in the place of the rows.
        more: Further records, by name.
        byteorder: That record.
    """
    data = bytearray()
    entries: list[Entry] = []

    def add(name: str, record: bytes) -> Entry:
        header = container.local_header(name, len(data), len(record), crc32(record))
        entry = Entry(name, len(data), len(data) + len(header), len(record), crc32(record))
        entries.append(entry)
        data.extend(header + record)
        return entry

    for number, storage in enumerate(storages):
        add(f"data/{number}", storage)
    add("data.pkl", pickle.dumps(value, 2) if pickled is None else pickled)
    add("version", b"3\n")
    add("byteorder", byteorder)
    for name, record in more:
        add(name, record)
    written = container.records_bytes(entries, {}, types, [])
    if change is not None:
        content = json.loads(written)
        change(content)
        written = json.dumps(content).encode()
    if manifest is not None:
        rows = written[written.index(b'"records":[') + 11 : written.index(b'],\n"types"')]
        written = manifest.replace(b"%ROWS%", rows)
    placed = add(container.RECORDS, written)
    add(
        container.SUMMARY,
        summary if isinstance(summary, bytes) and summary else container.summary_bytes(dict(summary), placed),
    )
    data += container.directory(entries, len(data))
    path.write_bytes(data)
    return path


class Part(NamedTuple):
    """One record of a zip archive, its header and its row of the directory as wished."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    """What both say of its length; None for the truth."""
    at: int | None = None
    """Where the directory says that its header is; None for the truth."""
    header_name: str | None = None
    header_size: int | None = None
    header_crc: int | None = None
    directory_crc: int | None = None


def archive(path: Path, *parts: Part, tail: bytes = b"") -> Path:
    """Write a zip archive such as torch.save might have made, had it wished so."""
    data = bytearray()
    rows = bytearray()
    for part in parts:
        at = len(data)
        size = len(part.data) if part.size is None else part.size
        crc = crc32(part.data)
        name = f"archive/{part.name}".encode()
        header_name = name if part.header_name is None else f"archive/{part.header_name}".encode()
        header_size = size if part.header_size is None else part.header_size
        data += struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 20, part.flags, part.method, 0, 0x21,
            crc if part.header_crc is None else part.header_crc, header_size, header_size,
            len(header_name), 0,
        )  # fmt: skip
        data += header_name + part.data
        rows += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, part.flags, part.method, 0, 0x21,
            crc if part.directory_crc is None else part.directory_crc, size, size,
            len(name), 0, 0, 0, 0, 0, at if part.at is None else part.at,
        )  # fmt: skip
        rows += name
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(parts), len(parts), len(rows), len(data), 0)
    path.write_bytes(data + rows + end + tail)
    return path


def torch_file(path: Path, pickled: bytes, storages: tuple[bytes, ...] = ()) -> Path:
    """Write what torch.save would have, with this pickle in it."""
    parts = [Part("data.pkl", pickled), Part("byteorder", b"little")]
    parts += [Part(f"data/{number}", storage) for number, storage in enumerate(storages)]
    return archive(path, *parts, Part("version", b"3\n"))


def legacy_file(path: Path, pickled: bytes, keys: Any = (), storages: bytes = b"", about: Any = None) -> Path:
    """Write what torch.save would have before torch 1.6."""
    head = {"protocol_version": 1001, "little_endian": True} if about is None else about
    parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, head)]
    path.write_bytes(b"".join([*parts, pickled, pickle.dumps(list(keys), 2), storages]))
    return path
