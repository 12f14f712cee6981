"""Checking a checkpoint without loading it: every byte read, nothing unpickled, memory that does not grow.

Needs no torch.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from holdfast.checkpoint import commit, container, integrity, origin, sharded_bytes
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.directories import is_sharded
from holdfast.checkpoint.foreign_archive import Archive
from holdfast.checkpoint.integrity import Damage, Job
from holdfast.checkpoint.own_file import corrupt, no_checkpoint, own_tail
from holdfast.errors import CheckpointCorrupt, CheckpointIncompatible, HoldfastError
from holdfast.utilities.collector import uncollected

EVERY_BYTE = "every byte"
ZIP_CHECKSUMS = "zip checksums"
NOTHING = "nothing"

_MOST_NAMED = 20
_PIECE_BYTES = 2 << 20


@dataclass(frozen=True)
class VerifyReport:
    """What was checked of a checkpoint, and found to be as it was written.

    Attributes:
        path: The file or directory.
        records: How many parts it consists of: each tensor is one, or shares one with its views; of a sharded
            checkpoint each file.
        size_bytes: Its length.
        seconds: How long it took.
        checked: "every byte": a file of holdfast, headers, padding and directory included. "zip checksums": a
            file of torch.save or Lightning, whose records have checksums, but not what lies between them.
            "nothing": the format of torch.save before torch 1.6, which has none.
    """

    path: str
    records: int
    size_bytes: int
    seconds: float
    checked: str


def verify(path: origin.Source) -> VerifyReport:
    """Check every byte of a checkpoint that can be checked; returns only if all are as they were written.

    Nothing is unpickled and nothing kept: it takes a few MiB of memory, however large the file.

    Args:
        path: What `holdfast.load` takes: a path, that of a sharded checkpoint too, a URL or an open file.

    Raises:
        CheckpointNotFound: there is no such file.
        CheckpointIncomplete: it was cut short, or is not a checkpoint.
        CheckpointCorrupt: bytes differ; names each bad record and the tensors in it, up to 20.
        CheckpointIncompatible: a newer holdfast wrote it.
        StorageError: the disk or the connection failed.
    """
    begun = time.perf_counter()
    if isinstance(path, (str, os.PathLike)) and not origin.is_url(path) and is_sharded(path):
        found_files = sharded_bytes.verify(path)
        spent = time.perf_counter() - begun
        return VerifyReport(os.fspath(path), found_files.files, found_files.size_bytes, spent, EVERY_BYTE)
    try:
        with origin.opened(path) as found, uncollected():
            records, checked = _check(found)
            size_bytes = os.fstat(found.file.fileno()).st_size
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise commit.storage_error(origin.title(path), "read", error) from error
    return VerifyReport(found.name, records, size_bytes, time.perf_counter() - begun, checked)


def _check(found: origin.Origin) -> tuple[int, str]:
    fd = found.file.fileno()
    tail = own_tail(found)
    if tail is not None:
        try:
            records = integrity.read_manifest(fd, tail).records
            bad = integrity.bad_records(fd, [Job(record, None) for record in records])
        except Damage as damage:
            raise corrupt(found, damage) from None
        if bad:
            raise corrupt(found, _listed(bad))
        return len(records), EVERY_BYTE
    if container.is_zip(fd):
        return _check_zip(found), ZIP_CHECKSUMS
    head = os.pread(fd, 16, 0)
    if container.is_old_torch(head):
        return 0, NOTHING
    raise no_checkpoint(found.name, head)


def _check_zip(found: origin.Origin) -> int:
    archive = Archive(found.name, found.file.fileno(), True)
    bad = [what for inner in archive.records if (what := _wrong_with(found, archive, inner))]
    if bad:
        raise corrupt(found, _listed(bad))
    return len(archive.records)


def _wrong_with(found: origin.Origin, archive: Archive, inner: str) -> str:
    """What is wrong with one record of a zip archive, or nothing."""
    fd, info = found.file.fileno(), archive.records[inner]
    if info.compress_size != info.file_size:
        raise CheckpointIncompatible(
            f"{os.path.basename(found.name)}: {inner} is compressed; a checkpoint's records are stored.",
            path=found.name,
        )
    try:
        at, left, checksum = archive.place(inner), info.file_size, 0
    except CheckpointCorrupt:
        return f"the zip header of {inner} does not agree with the zip directory"
    piece = memoryview(bytearray(min(left, _PIECE_BYTES)))
    while left:
        count = os.preadv(fd, [piece[: min(left, len(piece))]], at)
        if count == 0:
            return f"the file ends within {inner}"
        checksum = crc32(piece[:count], checksum)
        at, left = at + count, left - count
    if checksum == info.CRC:
        return ""
    return f"{inner} has checksum {checksum:08x}, the zip directory says {info.CRC:08x}"


def _listed(bad: list[str]) -> str:
    if len(bad) == 1:
        return bad[0]
    more = f"\n  and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
    return f"{len(bad)} records are bad:\n  " + "\n  ".join(bad[:_MOST_NAMED]) + more
