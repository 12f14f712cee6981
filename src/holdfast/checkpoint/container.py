"""The .ckpt file: torch's zip layout plus a manifest; every byte follows from the manifest and the data.

Order in the file: the storages ``data/0`` ..., ``data.pkl``, ``version``, ``byteorder``, then
``holdfast/records.json`` (name, offset, length and checksum of each record, tensor names, exact types) and,
last before the zip directory, ``holdfast/summary.json``, which a reader finds from the file's tail. The
oldest files have the storages after ``byteorder``: readers go by the manifest's order. All lie under one
root, stored, with their data aligned to 64 bytes by an extra field in the local header.

No byte is free: names, lengths and checksums determine all headers, the padding and the zip directory, so a
reader writes them again from the manifest and compares.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from holdfast.checkpoint.checksum import crc32

ROOT = "archive/"
RECORDS = "holdfast/records.json"
SUMMARY = "holdfast/summary.json"
FORMAT = 1
ALIGNMENT = 64
SUMMARY_BYTES = 16 << 20  # the most that a reader looks at for the summary
MARK = b"holdfast"  # begins the first record's padding, so that a damaged tail cannot disown the file

ZIP64_BYTES = 0xFFFFFFFF  # sizes and offsets from here on go into zip64 fields; a test lowers it
ZIP64_ENTRIES = 0xFFFF

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_PADDING = struct.Struct("<HH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8"  # a pickle of that format's mark, begun
_quoted = json.encoder.encode_basestring_ascii
_DATE = 0x21  # 1 January 1980: two saves of one state are the same bytes but for their summary
_PADDING_ID = 0x4246
_MARKED = re.compile(struct.pack("<H", _PADDING_ID) + b".." + MARK, re.DOTALL)


class Entry(NamedTuple):
    """One record as placed in the file; ``offset`` is where its data starts, ``header`` where it begins."""

    name: str
    header: int
    offset: int
    length: int
    crc32: int


def local_header(name: str, at: int, length: int, crc: int) -> bytes:
    """The bytes before a record's data, when they begin at ``at``; what comes next is aligned."""
    full = (ROOT + name).encode("ascii")
    if length >= ZIP64_BYTES or at >= ZIP64_BYTES:
        extra = struct.pack("<HHQQ", 1, 16, length, length)
        version, size = 45, 0xFFFFFFFF
    else:
        extra, version, size = b"", 20, length
    mark = MARK if at == 0 else b""
    start = at + 34 + len(full) + len(extra) + len(mark)  # 30 fixed bytes, 4 before the padding
    padding = -start % ALIGNMENT + len(mark)
    head = _LOCAL.pack(
        0x04034B50, version, 0, 0, 0, _DATE, crc, size, size, len(full), len(extra) + 4 + padding
    )  # fmt: skip
    return b"".join((head, full, extra, _PADDING.pack(_PADDING_ID, padding), mark.ljust(padding, b"\0")))


def _central_header(entry: Entry) -> bytes:
    full = (ROOT + entry.name).encode("ascii")
    wide = entry.length >= ZIP64_BYTES or entry.header >= ZIP64_BYTES
    extra = b""
    size = offset = 0xFFFFFFFF
    if wide:
        extra = struct.pack("<HHQQQ", 1, 24, entry.length, entry.length, entry.header)
    else:
        size, offset = entry.length, entry.header
    return (
        _CENTRAL.pack(
            0x02014B50, 45 if wide else 20, 45 if wide else 20, 0, 0, 0, _DATE, entry.crc32, size, size,
            len(full), len(extra), 0, 0, 0, 0, offset,
        )
        + full + extra
    )  # fmt: skip


def directory(entries: list[Entry], at: int) -> bytes:
    """The zip directory and everything after it, when it begins at ``at``."""
    central = b"".join(map(_central_header, entries))
    count, size = len(entries), len(central)
    end64 = b""
    if count >= ZIP64_ENTRIES or size >= ZIP64_BYTES or at >= ZIP64_BYTES:
        end64 = _END64.pack(0x06064B50, 44, 45, 45, 0, 0, count, count, size, at)
        end64 += _LOCATOR.pack(0x07064B50, 0, at + size, 1)
        count, size, at = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
    return central + end64 + _END.pack(0x06054B50, 0, 0, count, count, size, at, 0)


def place(rows: list[tuple[str, int, int]]) -> Iterator[tuple[Entry, bytes]]:
    """Lay out (name, length, crc32) rows from the start of the file: each entry with its local header."""
    at = 0
    for name, length, crc in rows:
        header = local_header(name, at, length, crc)
        yield Entry(name, at, at + len(header), length, crc), header
        at += len(header) + length


class Tail(NamedTuple):
    """What the last few kilobytes of a whole file say."""

    summary: dict[str, Any]
    summary_bytes: bytes
    directory: int


class NotWhole(Exception):
    """The tail is not that of a whole holdfast file; ``ours`` says whether it looks like a damaged one."""

    def __init__(self, reason: str, *, ours: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.ours = ours


def has_mark(fd: int) -> bool:
    """Whether the file begins as holdfast's files do."""
    head = os.pread(fd, 128, 0)
    # Not anywhere: torch.save to "holdfast.pt" has the word in the names of its records.
    return head.startswith(_LOCAL_SIGNATURE) and _MARKED.search(head) is not None


def is_old_torch(head: bytes) -> bool:
    """Whether a file whose first bytes these are is in the format of torch.save before torch 1.6."""
    return head.startswith(_OLD_TORCH)


def is_zip(fd: int) -> bool:
    """Whether the file begins as a zip archive does."""
    return os.pread(fd, 4, 0) == _LOCAL_SIGNATURE


def read_tail(fd: int) -> Tail:
    """Find the summary from the file's tail, without reading anything else.

    Raises:
        NotWhole: if the file does not end as a holdfast file ends.
    """
    size = os.fstat(fd).st_size
    at, _ = find_directory(fd, size)
    span = 16 << 10
    while True:
        begin = max(0, at - span)
        block = os.pread(fd, at - begin, begin)
        found = block.rfind(_LOCAL_SIGNATURE)
        if found >= 0 or begin == 0 or span >= SUMMARY_BYTES:
            break
        span = min(8 * span, SUMMARY_BYTES)
    return _parse_summary(block, found, at)


def _parse_summary(block: bytes, found: int, at: int) -> Tail:
    missing = NotWhole("it has no holdfast summary", ours=False)
    if found < 0 or len(block) - found < _LOCAL.size:
        raise missing
    fields = _LOCAL.unpack_from(block, found)
    name_at = found + _LOCAL.size
    data_at = name_at + fields[9] + fields[10]
    name = block[name_at : name_at + fields[9]]
    if name != (ROOT + SUMMARY).encode():
        raise missing
    data = block[data_at:]
    if crc32(data) != fields[6]:
        raise NotWhole("its summary has a wrong checksum", ours=True)
    try:
        summary = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotWhole(f"its summary is not JSON: {error}", ours=True) from error
    if not isinstance(summary, dict) or type(summary.get("format")) is not int or summary["format"] < 1:
        raise NotWhole("its summary has no format version", ours=True)
    return Tail(summary, data, at)


def find_directory(fd: int, size: int) -> tuple[int, int]:
    """Where the zip directory begins and how many entries it has, from the end of the file.

    Raises:
        NotWhole: if the file does not end with a zip directory that fills it exactly.
    """
    length = min(size, _END.size + _LOCATOR.size + _END64.size)
    tail = os.pread(fd, length, size - length)
    if length < _END.size or not tail[-_END.size :].startswith(b"PK\x05\x06"):
        raise NotWhole("it does not end with a zip directory", ours=False)
    _, _, _, _, count, central, at, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    wide = at == 0xFFFFFFFF or count == 0xFFFF
    if (
        len(tail) >= _END64.size and tail.startswith(b"PK\x06\x06") and (wide or at + central != end)
    ):  # torch writes both
        fields = _END64.unpack_from(tail)
        count, central, at = fields[7], fields[8], fields[9]
        end = size - length
    if comment or at + central != end:
        raise NotWhole("the zip directory does not fit the file's length", ours=False)
    return at, count


def summary_bytes(summary: dict[str, Any], records: Entry) -> bytes:
    """The summary record: the caller's values plus where the manifest is and what its checksum is."""
    manifest = {"offset": records.offset, "length": records.length, "crc32": f"{records.crc32:08x}"}
    content = {"format": FORMAT} | summary | {"format": FORMAT, "records": manifest}
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def records_bytes(
    entries: list[Entry],
    tensors: dict[str, list[str]],
    types: Any,
    omissions: list[tuple[str, str]],
) -> bytes:
    """The manifest: one row a record, and the exact types and omissions of the payload."""
    dumps = json.JSONEncoder(separators=(",", ":")).encode
    rows = ",\n".join(
        f'["{e.name}",{e.offset},{e.length},"{e.crc32:08x}",[{",".join(tensors.get(e.name, ()))}]]'
        for e in entries
    )
    columns = '["name","offset","length","crc32","tensors"]'
    rest = f'"types":{dumps(types)},\n"omissions":{dumps(omissions)}'
    return f'{{"columns":{columns},\n"records":[\n{rows}],\n{rest}}}'.encode("ascii")


def tensor_json(path: str, dtype: str, shape: tuple[int, ...]) -> str:
    """One tensor in the manifest: its path in the payload, dtype and shape."""
    return f'[{_quoted(path)},"{dtype}",{list(shape)}]'
