"""The records of a zip archive that torch.save wrote, without torch."""

from __future__ import annotations

import errno
import os
import struct
import zipfile

from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.pickle_scan import printable
from holdfast.errors import CheckpointCorrupt, CheckpointIncompatible, CheckpointIncomplete

_LOCAL = struct.Struct("<IHHHHHIIIHH")


class Archive:
    """The records of a zip archive, read straight from the file, each header and checksum compared."""

    def __init__(self, name: str, fd: int, verify: bool) -> None:
        self._name, self._fd, self._verify = name, fd, verify
        short = os.path.basename(name)
        try:
            with os.fdopen(os.dup(fd), "rb") as again, zipfile.ZipFile(again) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except (
            zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error, OSError,
        ) as error:  # fmt: skip
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # that one is a place before the file's beginning
            raise CheckpointIncomplete(
                f"{short} is not a whole checkpoint: it begins as a zip archive, but the directory at "
                f"its end cannot be read ({error}). It may have been cut short.",
                path=name,
            ) from error
        self.size = os.fstat(fd).st_size
        self.records: dict[str, zipfile.ZipInfo] = {}
        roots = {info.filename.split("/", 1)[0] for info in infos}
        for info in infos:
            inner = info.filename.split("/", 1)[-1]
            if inner.startswith("holdfast/"):
                raise CheckpointIncomplete(
                    f"{short} is not a whole checkpoint: its manifest is damaged.", path=name
                )
            if inner in self.records:
                raise self._corrupt(f"it has two records named {printable(inner)}")
            self.records[inner] = info
        if len(roots) != 1:
            raise CheckpointIncomplete(f"{short} is a zip archive, but not a checkpoint.", path=name)
        self._ends = self._apart(infos, directory)

    def _apart(self, infos: list[zipfile.ZipInfo], directory: int) -> dict[int, int]:
        """For each header where the next thing begins; refuse records that lie in one another."""
        infos = sorted(infos, key=lambda info: info.header_offset)
        starts = [info.header_offset for info in infos]
        ends = [*starts[1:], directory]
        for info, end in zip(infos, ends, strict=True):
            least = info.header_offset + 30 + len(info.orig_filename) + info.compress_size
            if info.header_offset < 0 or least > end:
                inner = info.filename.split("/", 1)[-1]
                raise self._corrupt(f"{printable(inner)} overlaps what comes after it")
        return dict(zip(starts, ends, strict=True))

    def read(self, inner: str) -> bytes:
        """A record's bytes."""
        buffer = bytearray(self._length(inner))
        self.fill(inner, memoryview(buffer))
        return bytes(buffer)

    def length(self, key: str) -> int:
        """Bytes of the storage ``data/<key>``."""
        if f"data/{key}" not in self.records:
            raise self._corrupt(f"it has no record data/{key}")
        return self._length(f"data/{key}")

    def _length(self, inner: str) -> int:
        info = self.records[inner]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointIncompatible(
                f"{os.path.basename(self._name)}: {inner} is compressed; a checkpoint's records are stored.",
                path=self._name,
            )
        if info.header_offset < 0 or info.header_offset + info.file_size > self.size:
            raise self._corrupt(f"{inner} lies outside the file")
        return info.file_size

    def place(self, inner: str) -> int:
        """Where a record's data begins, its header compared with the directory."""
        info = self.records[inner]
        head = os.pread(self._fd, 30, info.header_offset)
        name_length = int.from_bytes(head[26:28], "little")
        extra_length = int.from_bytes(head[28:30], "little")
        full = os.pread(self._fd, name_length, info.header_offset + 30)
        if len(head) < 30 or full != info.orig_filename.encode() or not _agrees(head, info):
            raise self._corrupt(f"the zip header of {inner} does not agree with the zip directory")
        at = info.header_offset + 30 + name_length + extra_length
        if at + info.file_size > self._ends[info.header_offset]:
            raise self._corrupt(f"{inner} overlaps what comes after it")
        return at

    def fill(self, inner: str, into: memoryview) -> None:
        """Read a record into a buffer of just its length, and compare its checksum."""
        info = self.records[inner]
        at = self.place(inner)
        checksum = 0
        while into:
            piece = into[: 2 << 20]
            count = os.preadv(self._fd, [piece], at)
            if count == 0:
                raise self._corrupt(f"the file ends within {inner}")
            checksum = crc32(piece[:count], checksum)
            into, at = into[count:], at + count
        if self._verify and checksum != info.CRC:
            raise self._corrupt(f"{inner} has checksum {checksum:08x}, the zip directory says {info.CRC:08x}")

    def _corrupt(self, what: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(f"{os.path.basename(self._name)} is corrupt: {what}.", path=self._name)


def _agrees(head: bytes, info: zipfile.ZipInfo) -> bool:
    """Whether a local header says what the directory says; torch leaves its numbers to the directory."""
    signature, _, flags, method, _, _, checksum, packed, length, _, _ = _LOCAL.unpack(head)
    later = {0} if flags & 8 else set()
    return (
        signature == 0x04034B50
        and method == info.compress_type
        and checksum in {info.CRC, *later}
        and {packed, length} <= {info.file_size, 0xFFFFFFFF, *later}
    )
