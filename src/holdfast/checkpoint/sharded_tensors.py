"""Where each tensor of a sharded checkpoint lies: ``tensors.json``, which needs no pickle to be read.

A tensor consists of chunks, boxes of its elements, as the processes had them. What the file says is checked
before anything is allocated by it: the chunks of a tensor make the tensor, and no two tensors share bytes but
as two names of the same one. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.checkpoint import directories
from holdfast.checkpoint.itemsizes import ITEMSIZES

_MOST = 1 << 62
_CHECKSUM = re.compile(r"[0-9a-f]{8}")
_COLUMNS = ["path", "dtype", "shape", "name", "chunks"]
_CHUNK_COLUMNS = ["file", "offset", "length", "crc32", "offsets", "sizes"]

Key = tuple["str | int", ...]


class Part(NamedTuple):
    """A file as the manifest knows it."""

    size_bytes: int
    crc32: int


class Chunk(NamedTuple):
    """A box of a tensor's elements, and the bytes in which it lies in row-major order."""

    file: str
    offset: int
    length: int
    crc32: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorEntry(NamedTuple):
    """A tensor: where it belongs in the payload, and the chunks that it consists of.

    Attributes:
        path: keys and indices that lead to it.
        dtype: without the ``torch.``
        name: what `torch.distributed.checkpoint` knows it by.
    """

    path: Key
    dtype: str
    shape: tuple[int, ...]
    name: str
    chunks: tuple[Chunk, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * self.itemsize

    @property
    def title(self) -> str:
        """What messages call it: ``state_dict/layers.0.weight``."""
        return titled(self.path)


def titled(path: Sequence[str | int]) -> str:
    """A path in a payload as messages have it."""
    return "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in path)


def key_of(path: Sequence[str | int]) -> str:
    """A path in a payload as one text: ``'["state_dict","net.0.weight"]'``."""
    return json.dumps(list(path), separators=(",", ":"))


def tensors_bytes(tensors: Sequence[TensorEntry]) -> bytes:
    """``tensors.json``: one row a tensor."""
    dumps = json.JSONEncoder(separators=(",", ":")).encode
    rows = ",\n".join(
        dumps(
            [
                list(one.path), one.dtype, one.shape, one.name,
                [[c.file, c.offset, c.length, f"{c.crc32:08x}", c.offsets, c.sizes] for c in one.chunks],
            ]
        )
        for one in tensors
    )  # fmt: skip
    head = f'{{"columns":{dumps(_COLUMNS)},"chunk_columns":{dumps(_CHUNK_COLUMNS)},'
    return f'{head}\n"tensors":[\n{rows}]}}\n'.encode("ascii")


def parse(data: bytes, files: Mapping[str, Part]) -> dict[str, TensorEntry]:
    """Read ``tensors.json``: each tensor by its key.

    Args:
        data: its bytes.
        files: what the manifest names.

    Raises:
        ValueError: it describes what no save writes.
    """
    try:
        found: dict[str, TensorEntry] = {}
        for row in json.loads(data)["tensors"]:
            one = _tensor(row, files)
            if key_of(one.path) in found:
                raise ValueError(f"{one.title[:200]} is there twice")
            found[key_of(one.path)] = one
        _check_apart(found)
    except (TypeError, LookupError, RecursionError, OverflowError) as error:
        raise ValueError(repr(error)[:200]) from error
    return found


def parse_part(row: Any) -> Part:
    """Read the size and checksum of a file.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(row, list) or len(row) != 2 or not _is_checksum(row[1]):
        raise ValueError(f"{row!r} is no size and checksum"[:200])
    return Part(whole_number(row[0], 0), int(row[1], 16))


def whole_number(value: Any, least: int) -> int:
    """A number that a size or a place can be.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not least <= value < _MOST:
        raise ValueError(f"{str(value)[:40]!r} is no number that can be meant")
    return value


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and _CHECKSUM.fullmatch(value) is not None


def _tensor(row: Any, files: Mapping[str, Part]) -> TensorEntry:
    path, dtype, shape, name, rows = row
    if not isinstance(path, list) or not path or any(type(part) not in (str, int) for part in path):
        raise ValueError(f"a tensor's path is {path!r}"[:300])
    if len(path) > 100 or not isinstance(name, str) or not isinstance(rows, list):
        raise ValueError("a tensor's row is not one")
    if dtype not in ITEMSIZES or dtype.startswith(("q", "bits")):
        raise ValueError(f"{titled(path)[:200]} has dtype {dtype!r}"[:300])
    sizes = tuple(whole_number(size, 0) for size in _list(shape))
    if math.prod(max(1, size) for size in sizes) * ITEMSIZES[dtype] >= _MOST:
        raise ValueError(f"{titled(path)[:200]} has shape {list(sizes)}"[:300])
    chunks = tuple(_chunk(one, sizes, ITEMSIZES[dtype], files) for one in rows)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(sizes) or not _disjoint(chunks):
        raise ValueError(f"the chunks of {titled(path)[:200]} do not make the tensor")
    return TensorEntry(tuple(path), dtype, sizes, name, chunks)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError(f"{str(value)[:40]!r} is no shape")
    return value


def _chunk(row: Any, shape: tuple[int, ...], itemsize: int, files: Mapping[str, Part]) -> Chunk:
    file, offset, length, checksum, offsets, sizes = row
    if not isinstance(file, str) or not directories.is_shard(file) or file not in files:
        raise ValueError(f"a chunk is said to lie in {str(file)[:200]!r}")
    at = tuple(whole_number(one, 0) for one in _list(offsets))
    box = tuple(whole_number(one, 0) for one in _list(sizes))
    if len(at) != len(shape) or len(box) != len(shape):
        raise ValueError("a chunk has other dimensions than its tensor")
    if any(begin + size > whole for begin, size, whole in zip(at, box, shape, strict=True)):
        raise ValueError("a chunk reaches beyond its tensor")
    begin, count = whole_number(offset, 0), whole_number(length, 0)
    if count != math.prod(box) * itemsize or begin + count > files[file].size_bytes:
        raise ValueError(f"a chunk reaches beyond {file}")
    if not _is_checksum(checksum):
        raise ValueError("a chunk has no checksum")
    return Chunk(file, begin, count, int(checksum, 16), at, box)


def _disjoint(chunks: tuple[Chunk, ...]) -> bool:
    """Whether no two of them have an element in common."""
    if len(chunks) < 2:
        return True
    first = chunks[0]
    differ = [
        dim
        for dim in range(len(first.sizes))
        if any((one.offsets[dim], one.sizes[dim]) != (first.offsets[dim], first.sizes[dim]) for one in chunks)
    ]
    if not differ:
        return first.length == 0
    chosen = max(differ, key=lambda dim: len({one.offsets[dim] for one in chunks}))
    ordered = sorted(chunks, key=lambda one: one.offsets[chosen])
    live: list[Chunk] = []
    for one in ordered:
        live = [other for other in live if other.offsets[chosen] + other.sizes[chosen] > one.offsets[chosen]]
        if any(_overlap(one, other) for other in live):
            return False
        live.append(one)
        if len(live) > 10_000:
            raise ValueError("a tensor has more chunks than any save makes")
    return True


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        max(a, b) < min(a + m, b + n)
        for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )


def _check_apart(tensors: dict[str, TensorEntry]) -> None:
    """Two tensors share all of their bytes, under two names, or none: else a small file could be huge."""
    of: dict[tuple[str, int, int], tuple[Any, ...]] = {}
    for one in tensors.values():
        for chunk in one.chunks:
            if chunk.length:
                whose = (one.dtype, one.shape, one.chunks)
                known = of.setdefault((chunk.file, chunk.offset, chunk.length), whose)
                if known != whose:
                    raise ValueError(f"{one.title[:200]} shares bytes with another tensor")
    end, file = 0, ""
    for name, offset, length in sorted(of):
        if name == file and offset < end:
            raise ValueError(f"tensors overlap in {name}")
        file, end = name, offset + length
