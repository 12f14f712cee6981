"""Files that only a hostile hand or another program writes: each part as wished, every checksum right."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.checkpoint import container
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry


def build(
    path: Path,
    *,
    value: Any = None,
    pickled: bytes | None = None,
    types: Any = None,
    storages: tuple[bytes, ...] = (),
    summary: dict[str, Any] | bytes = b"",
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write one file; ``change`` edits the manifest, ``summary`` as bytes replaces the whole record."""
    data = bytearray()
    entries: list[Entry] = []

    def add(name: str, record: bytes) -> Entry:
        header = container.local_header(name, len(data), len(record), crc32(record))
        entry = Entry(name, len(data), len(data) + len(header), len(record), crc32(record))
        entries.append(entry)
        data.extend(header + record)
        return entry

    add("data.pkl", pickle.dumps(value, 2) if pickled is None else pickled)
    add("version", b"3\n")
    add("byteorder", b"little")
    for number, storage in enumerate(storages):
        add(f"data/{number}", storage)
    manifest = container.records_bytes(entries, {}, types, [])
    if change is not None:
        content = json.loads(manifest)
        change(content)
        manifest = json.dumps(content).encode()
    placed = add(container.RECORDS, manifest)
    add(
        container.SUMMARY,
        summary if isinstance(summary, bytes) and summary else container.summary_bytes(dict(summary), placed),
    )
    data += container.directory(entries, len(data))
    path.write_bytes(data)
    return path
