"""Checking a checkpoint against its manifest: every byte of the file, and the words for one that is wrong.

The manifest gives each record's name, length and checksum. From these all zip headers, the padding and the
zip directory follow, so they are written again and compared; what is left, the records' data, has checksums.
Needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from holdfast.checkpoint import container
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry, Tail

_NAME = re.compile(r"(?!/)[A-Za-z0-9_./-]{1,200}(?<!/)")
_FIXED = {"version": b"3\n", "byteorder": b"little"}  # torch.load goes by them
_BATCH_RECORDS = 400  # two buffers each; the kernel takes 1,024 in one call
_PIECE_BYTES = 2 << 20  # read, then checked while it is in the processor's cache


class Damage(Exception):
    """Bytes that are not those that were written; the text is the middle of a sentence about the file."""


class Placed(NamedTuple):
    """A record, the zip header that must stand before it, and the tensors in it."""

    entry: Entry
    header: bytes
    tensors: list[str]

    @property
    def title(self) -> str:
        """``data/17 (state_dict/layers.0.weight)``: the record, and what a user knows it by."""
        names = self.tensors
        if not names:
            return self.entry.name
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return f"{self.entry.name} ({', '.join(names[:2])}{more})"


class Manifest(NamedTuple):
    """What a file consists of, checked against its structure."""

    records: list[Placed]
    types: Any
    omissions: list[Any]


def read_manifest(fd: int, tail: Tail) -> Manifest:
    """Read the manifest; check that the file's length and its zip directory agree with it.

    Raises:
        Damage: naming what is wrong.
    """
    said = tail.summary.get("records")
    where: dict[str, Any] = said if isinstance(said, dict) else {}
    offset, length, checksum = where.get("offset"), where.get("length"), where.get("crc32")
    if not (isinstance(offset, int) and isinstance(length, int)):
        raise Damage("its summary does not say where the manifest is")
    if min(offset, length) < 0 or offset + length > tail.directory:
        raise Damage("its summary says that the manifest lies outside the file")
    data = os.pread(fd, length, offset)
    if f"{crc32(data):08x}" != checksum:
        raise Damage(f"{container.RECORDS} has checksum {crc32(data):08x}, the summary says {checksum}")
    try:
        content = json.loads(data)
        rows = [(str(row[0]), row[2], int(row[3], 16)) for row in content["records"]]
        offsets = [row[1] for row in content["records"]]
        names = [[str(tensor[0]) for tensor in row[4]] for row in content["records"]]
        types, omissions = content["types"], content["omissions"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Damage(f"its manifest cannot be read: {error!r}") from error
    if not isinstance(omissions, list):
        raise Damage("its manifest has no list of omissions")
    _check_rows(rows, tail.directory)
    about = tail.summary_bytes
    rows += [(container.RECORDS, length, crc32(data)), (container.SUMMARY, len(about), crc32(about))]
    names += [[], []]
    offsets += [offset, tail.directory - len(about)]
    placed = [Placed(*pair, name) for pair, name in zip(container.place(rows), names, strict=True)]
    for record, said in zip(placed, offsets, strict=True):
        if record.entry.offset != said:
            raise Damage(f"{record.title} is at byte {said}, where the manifest leaves no room for it")
    expected = container.directory([record.entry for record in placed], tail.directory)
    if os.pread(fd, len(expected) + 1, tail.directory) != expected:
        raise Damage("its zip directory is not the one that was written")
    return Manifest(placed, types, omissions)


def _check_rows(rows: list[tuple[str, int, int]], most: int) -> None:
    seen = {container.RECORDS, container.SUMMARY}
    for name, length, checksum in rows:
        if not _NAME.fullmatch(name) or ".." in name or name in seen:
            raise Damage(f"its manifest has a record named {name[:200]!r}")
        if type(length) is not int or not 0 <= length <= most:
            raise Damage(
                f"its manifest says that {name} has {str(length)[:40]} bytes, the file has room for {most}"
            )
        if not 0 <= checksum <= 0xFFFFFFFF:
            raise Damage(f"its manifest says that {name} has checksum {checksum:x}"[:300])
        if name in _FIXED and (length, checksum) != (len(_FIXED[name]), crc32(_FIXED[name])):
            raise Damage(f"its {name} is not {_FIXED[name].decode().strip()}")
        seen.add(name)


class Job(NamedTuple):
    """One record to read and check.

    Its bytes go to ``into``, a writable buffer of just its length; with None they are checked and forgotten.
    """

    record: Placed
    into: memoryview | None


def read_records(fd: int, jobs: list[Job], *, verify: bool = True, threads: int = 2) -> None:
    """Read records into their buffers and check each one's header and checksum.

    Memory: 2 MiB for each thread, beside the buffers that are given.

    Raises:
        Damage: naming the first bad record in the file's order, and how many more there are.
    """
    found = bad_records(fd, jobs, verify=verify, threads=threads)
    if found:
        more = "" if len(found) == 1 else f" ({len(found) - 1} more are bad)"
        raise Damage(f"{found[0]}{more}")


def bad_records(fd: int, jobs: list[Job], *, verify: bool = True, threads: int = 2) -> list[str]:
    """As `read_records`, but give what is wrong with each bad record, in the file's order.

    Raises:
        Damage: the file ends within one of them.
    """
    batches = list(_batches(jobs))
    read = _Reader(fd, verify).read
    if threads < 2 or len(batches) < 4:
        found = [read(batch) for batch in batches]
    else:
        with ThreadPoolExecutor(threads, "holdfast-read") as pool:
            found = list(pool.map(read, batches))
    return [problem for _, problem in sorted(one for batch in found for one in batch)]


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Runs of records that follow each other in the file, small enough to stay in the cache."""
    batch: list[Job] = []
    size, end = 0, -1
    for job in jobs:
        entry = job.record.entry
        if batch and (
            entry.header != end or size + entry.length > _PIECE_BYTES or len(batch) == _BATCH_RECORDS
        ):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += entry.length
        end = entry.offset + entry.length
    if batch:
        yield batch


class _Reader:
    """Reads batches, each thread with a buffer of its own for what is not kept."""

    def __init__(self, fd: int, verify: bool) -> None:
        self._fd, self._verify = fd, verify
        self._own = threading.local()

    def read(self, batch: list[Job]) -> list[tuple[int, str]]:
        """Read one batch; gives where each bad record begins, and what is wrong with it."""
        headers = [memoryview(bytearray(len(job.record.header))) for job in batch]
        begin = batch[0].record.entry.header
        if len(batch) == 1 and batch[0].record.entry.length > _PIECE_BYTES:
            _fill(self._fd, [headers[0]], begin, batch)
            checksums = [self._read_large(batch[0])]
        else:
            buffers = self._buffers(batch)
            _fill(
                self._fd, [one for pair in zip(headers, buffers, strict=True) for one in pair], begin, batch
            )
            checksums = [crc32(buffer) for buffer in buffers]
        found = []
        for job, header, checksum in zip(batch, headers, checksums, strict=True):
            entry, record = job.record.entry, job.record
            if header != record.header:
                found.append(
                    (entry.header, f"the zip header of {record.title} is not the one that was written")
                )
            elif self._verify and checksum != entry.crc32:
                said = f"{record.title} has checksum {checksum:08x}, the manifest says {entry.crc32:08x}"
                found.append((entry.header, said))
        return found

    def _buffers(self, batch: list[Job]) -> list[memoryview]:
        scratch, at, buffers = self._scratch(), 0, []
        for job in batch:
            if job.into is not None:
                buffers.append(job.into)
            else:
                length = job.record.entry.length
                buffers.append(scratch[at : at + length])
                at += length
        return buffers

    def _read_large(self, job: Job) -> int:
        entry, checksum = job.record.entry, 0
        for at in range(0, entry.length, _PIECE_BYTES):
            piece = self._scratch() if job.into is None else job.into[at : at + _PIECE_BYTES]
            piece = piece[: entry.length - at]
            _fill(self._fd, [piece], entry.offset + at, [job])
            checksum = crc32(piece, checksum)
        return checksum

    def _scratch(self) -> memoryview:
        known: memoryview | None = getattr(self._own, "scratch", None)
        if known is None:
            known = self._own.scratch = memoryview(bytearray(_PIECE_BYTES))
        return known


def _fill(fd: int, buffers: list[memoryview], at: int, batch: list[Job]) -> None:
    wanted = [buffer for buffer in buffers if len(buffer)]
    while wanted:
        count = os.preadv(fd, wanted, at)
        if count == 0:
            ends = [job for job in batch if job.record.entry.offset + job.record.entry.length > at]
            raise Damage(f"the file ends within {ends[0].record.title}")
        at += count
        while wanted and count >= len(wanted[0]):
            count -= len(wanted.pop(0))
        if wanted and count:
            wanted[0] = wanted[0][count:]
