"""CRC-32, the checksum that zip files hold, at the speed of memory."""

from __future__ import annotations

from typing import Any

try:
    from isal.isal_zlib import crc32 as _crc32
except ImportError:  # a platform without a wheel: the same value, a few times slower
    from zlib import crc32 as _crc32


def crc32(data: Any, start: int = 0) -> int:
    """CRC-32 of a bytes-like object, going on from ``start``."""
    return int(_crc32(data, start))
