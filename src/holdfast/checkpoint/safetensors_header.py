"""The header of a safetensors file: which tensors it holds and where, without the package of that name.

Source: the format's description in https://github.com/huggingface/safetensors: eight bytes with the length of
a JSON object, that object, then the tensors' bytes without a gap.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, NamedTuple

_MOST_BYTES = 100_000_000  # the limit that the format sets itself
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


class BadHeader(Exception):
    """The header is not one; the text is the middle of a sentence about the file."""


class Header(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    """By name: dtype as torch calls it, shape, where its bytes begin in the file, how many there are."""
    metadata: dict[str, str]


def begins(fd: int, size: int) -> bool:
    """Whether a file looks like one: a length that fits the file, then a JSON object."""
    head = os.pread(fd, 9, 0)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def read(fd: int, size: int) -> Header:
    """Read and check the header.

    Memory: in proportion to the header, which is at most 100 MB.

    Raises:
        BadHeader: it is not one, or does not fit the file.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > min(_MOST_BYTES, size - 8):
        raise BadHeader(f"its header of {length} bytes is longer than the file, or than 100 MB")
    try:
        content = json.loads(os.pread(fd, length, 8), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadHeader(f"its header is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadHeader("its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader("its metadata is not text by name")
    tensors = {name: _tensor(name, about, 8 + length, size) for name, about in content.items()}
    at = 8 + length
    for begin, count in sorted((begin, count) for _, _, begin, count in tensors.values()):
        if begin != at:
            raise BadHeader(f"its tensors do not lie one behind the other at byte {min(begin, at)}")
        at += count
    if at != size:
        raise BadHeader(f"its tensors end at byte {at}, the file at {size}")
    return Header(tensors, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _tensor(name: str, about: Any, start: int, size: int) -> tuple[str, tuple[int, ...], int, int]:
    said = about if isinstance(about, dict) else {}
    kind, shape, place = said.get("dtype"), _whole(said.get("shape")), _whole(said.get("data_offsets"))
    if not isinstance(kind, str) or shape is None or place is None or len(place) != 2:
        raise BadHeader(f"its header does not describe {name[:200]!r} as a tensor")
    begin, end = place
    if begin > end or start + end > size:
        raise BadHeader(f"{name[:200]!r} lies outside the file")
    dtype = _DTYPES.get(kind, kind.lower()[:40])
    digits = "".join(c for c in kind.partition("_")[0] if c.isdigit())
    bits = 8 if kind == "BOOL" else int(digits[:4] or 8)
    if kind in _DTYPES and math.prod(shape) * bits != 8 * (end - begin):
        raise BadHeader(f"{name[:200]!r} has {end - begin} bytes, which are not {list(shape)} of {kind}")
    return dtype, shape, start + begin, end - begin


def _whole(values: Any) -> tuple[int, ...] | None:
    if not isinstance(values, list) or len(values) > 64:
        return None
    return tuple(values) if all(type(n) is int and 0 <= n < 1 << 63 for n in values) else None
