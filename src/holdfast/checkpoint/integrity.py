"""Checksums of the file's records, and the words for a record that is bad."""

from __future__ import annotations

import os
from typing import Any

try:
    from isal.isal_zlib import crc32 as _crc32
except ImportError:  # a platform without a wheel: the same value, a few times slower
    from zlib import crc32 as _crc32

CHUNK_BYTES = 4 << 20


def crc32(data: Any, start: int = 0) -> int:
    """CRC-32 of a bytes-like object, going on from ``start``; the value that zip files hold."""
    return int(_crc32(data, start))


def describe(name: str, tensors: list[str]) -> str:
    """``data/17 (state_dict/layers.0.weight)``: the record, and what a user knows it by."""
    if not tensors:
        return name
    more = f" and {len(tensors) - 2} more" if len(tensors) > 2 else ""
    return f"{name} ({', '.join(tensors[:2])}{more})"


def checksum_error(path: str, record: str, found: int, expected: int) -> str:
    """The first line of the message for a record whose bytes are not those that were written."""
    return (
        f"{os.path.basename(path)} is corrupt: {record} has checksum {found:08x}, "
        f"the manifest says {expected:08x}."
    )
