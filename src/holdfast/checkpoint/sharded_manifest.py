"""What a sharded checkpoint says of itself: its files with sizes and checksums, and where each tensor lies.

``manifest.json`` is written last: the directory is a checkpoint if and only if that is complete and every
file that it names has its size. ``tensors.json`` says in which bytes of which files the tensors are, so that
reading them needs no pickle. Needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from holdfast.checkpoint import directories, sharded_tensors
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.directories import MANIFEST, PAYLOAD, TENSORS
from holdfast.checkpoint.sharded_tensors import Chunk, Part, TensorEntry, parse_part, whole_number
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointUnsafe,
)

FORMAT = 1
_MANIFEST_BYTES = 64 << 20
_PIECE_BYTES = 2 << 20
_ENDING = re.compile(rb',\n"crc32":"([0-9a-f]{8})"\}\n\Z')


class Bad(Exception):
    """What is wrong with a directory; the text is the middle of a sentence about it."""

    def __init__(self, kind: type[CheckpointError], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason

    def told(self, path: str, hint: str = "") -> CheckpointError:
        """The error for it."""
        name = os.path.basename(os.path.abspath(path))
        how = {
            CheckpointIncomplete: f"{name} is not a whole checkpoint: {self.reason}.{hint}",
            CheckpointCorrupt: f"{name} is corrupt: {self.reason}.{hint}",
            CheckpointUnsafe: f"{name} cannot be read: {self.reason}. Nothing was run. "
            "Do not use it unless you know who wrote it.",
        }
        return self.kind(how.get(self.kind, f"{name} {self.reason}."), path=path)


class Manifest(NamedTuple):
    """What ``manifest.json`` says.

    Attributes:
        format: version of the directory's format.
        world_size: how many processes wrote it.
        summary: as in a single file.
        files: every other file of the checkpoint.
        length: of ``manifest.json`` itself, in bytes.
    """

    format: int
    world_size: int
    summary: dict[str, Any]
    files: dict[str, Part]
    length: int

    @property
    def size_bytes(self) -> int:
        """Length of all files, its own included."""
        return self.length + sum(part.size_bytes for part in self.files.values())


# -- written -------------------------------------------------------------------------------------------------


def manifest_bytes(summary: dict[str, Any], files: dict[str, Part], world_size: int) -> bytes:
    """``manifest.json``; its last line is the checksum of all before it."""
    dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    rows = ",\n".join(f'{dumps(name)}:[{one.size_bytes},"{one.crc32:08x}"]' for name, one in files.items())
    head = f'{{"format":{FORMAT},"world_size":{world_size},\n"summary":{dumps(summary)},\n'
    body = f'{head}"files":{{\n{rows}}}'.encode("ascii")
    return body + f',\n"crc32":"{crc32(body):08x}"}}\n'.encode("ascii")


# -- read ----------------------------------------------------------------------------------------------------


class Directory:
    """An opened checkpoint: the manifest read, and each file there with its size.

    Attributes:
        path: its name.
        place: where it stands, which is aside if it was about to be replaced.
        fd: the directory; what is read is of one checkpoint, whatever happens to its name.
    """

    def __init__(self, path: str, place: str, fd: int) -> None:
        self.path, self.place, self.fd = path, place, fd
        self.manifest = _parse(_read(fd, MANIFEST, _MANIFEST_BYTES))
        for name, part in self.manifest.files.items():
            os.close(self.open(name, part))

    def is_there(self) -> bool:
        """Whether its name is still its own, rather than of another checkpoint or of none."""
        return _has_name(self.fd, self.path) or _has_name(self.fd, self.place)

    def open(self, name: str, part: Part | None = None) -> int:
        """Open one of its files.

        Raises:
            Bad: it is missing, not a regular file, or has another size.
            OSError: it cannot be opened.
        """
        part = part or self.manifest.files[name]
        fd = _open(self.fd, name)
        size = os.fstat(fd).st_size
        if size != part.size_bytes:
            os.close(fd)
            kind = CheckpointIncomplete if size < part.size_bytes else CheckpointCorrupt
            raise Bad(kind, f"{name} has {size} bytes, {MANIFEST} says {part.size_bytes}")
        return fd

    def read(self, name: str) -> bytes:
        """Read one of its files whole and check it.

        Raises:
            Bad: it is not what was written.
        """
        part = self.manifest.files[name]
        fd = self.open(name)
        try:
            data = _whole(fd, part.size_bytes)
        finally:
            os.close(fd)
        _check(name, crc32(data), part)
        return data

    def check(self, name: str) -> None:
        """Read one of its files piece by piece and compare its checksum.

        Raises:
            Bad: it is not what was written.
        """
        part, fd = self.manifest.files[name], self.open(name)
        try:
            _check(name, _checksum(fd, 0, part.size_bytes), part)
        finally:
            os.close(fd)

    def tensors(self) -> dict[str, TensorEntry]:
        """Read ``tensors.json``: each tensor by its key.

        Raises:
            Bad: it is not what was written, or describes what cannot be.
        """
        data = self.read(TENSORS)
        try:
            return sharded_tensors.parse(data, self.manifest.files)
        except ValueError as error:
            raise Bad(CheckpointUnsafe, f"{TENSORS} says what no save writes ({error})"[:500]) from error

    def bad_tensors(self, name: str) -> list[str]:
        """Which tensors the bytes of a file are no longer those of; empty where that cannot be told."""
        try:
            fd = self.open(name)
        except (Bad, OSError):
            return []
        try:
            return [
                f"{one.title}, elements {_range(chunk)}" if len(one.chunks) > 1 else one.title
                for one in self.tensors().values()
                for chunk in one.chunks
                if chunk.file == name and _checksum(fd, chunk.offset, chunk.length) != chunk.crc32
            ]
        except (Bad, OSError):
            return []
        finally:
            os.close(fd)

    def strangers(self) -> list[str]:
        """Names in it that are no part of the checkpoint."""
        return sorted(set(os.listdir(self.fd)) - set(self.manifest.files) - {MANIFEST})


def _range(chunk: Chunk) -> str:
    return ", ".join(f"{at}:{at + size}" for at, size in zip(chunk.offsets, chunk.sizes, strict=True))


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Directory]:
    """Open a sharded checkpoint for the length of a block.

    Raises:
        Bad: it is not whole.
        FileNotFoundError: there is none, or it went away within the block.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    directory = _opened(name)
    try:
        yield directory
    except Bad:
        if not directory.is_there():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
        raise
    finally:
        os.close(directory.fd)


def _opened(name: str, attempts: int = 5) -> Directory:
    place = directories.standing(name)
    fd = -1
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return Directory(name, place, fd)
    except (Bad, FileNotFoundError):
        # It may be on its way out, for another one or for good; then its name is not its own any more.
        moved = fd < 0 or not _has_name(fd, place)
        if fd >= 0:
            os.close(fd)
        if not moved or attempts == 1:
            raise
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    return _opened(name, attempts - 1)


def _has_name(fd: int, path: str) -> bool:
    try:
        own, found = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _open(directory: int, name: str) -> int:
    try:
        # Without waiting for somebody to write to a pipe, and never through a link.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        hint = ": a save into it did not end, or holdfast did not write it" if name == MANIFEST else ""
        raise Bad(CheckpointIncomplete, f"{name} is missing{hint}") from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise Bad(CheckpointUnsafe, f"{name} is a link to somewhere else") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Bad(CheckpointUnsafe, f"{name} is not a regular file")
    return fd


def _read(directory: int, name: str, most_bytes: int) -> bytes:
    fd = _open(directory, name)
    try:
        size = os.fstat(fd).st_size
        if size > most_bytes:
            raise Bad(CheckpointUnsafe, f"{name} has {size} bytes, and no save writes more than {most_bytes}")
        return _whole(fd, size)
    finally:
        os.close(fd)


def _whole(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := os.pread(fd, size - len(data), len(data))):
        data += piece
    return bytes(data)


def _checksum(fd: int, at: int, left: int) -> int:
    piece, checksum = memoryview(bytearray(min(left, _PIECE_BYTES))), 0
    while left:
        count = os.preadv(fd, [piece[: min(left, len(piece))]], at)
        if count == 0:
            return -1
        checksum = crc32(piece[:count], checksum)
        at, left = at + count, left - count
    return checksum


def _check(name: str, checksum: int, part: Part) -> None:
    if checksum != part.crc32:
        said = f"{MANIFEST} says {part.crc32:08x}"
        raise Bad(CheckpointCorrupt, f"{name} has checksum {checksum & 0xFFFFFFFF:08x}, {said}")


def _parse(data: bytes) -> Manifest:
    ending = _ENDING.search(data)
    if ending is None:
        raise Bad(CheckpointIncomplete, f"{MANIFEST} was cut short")
    checksum = f"{crc32(data[: ending.start()]):08x}"
    if checksum != ending[1].decode():
        raise Bad(CheckpointCorrupt, f"{MANIFEST} has checksum {checksum}, it says {ending[1].decode()}")
    try:
        said = json.loads(data)
        version, world_size = whole_number(said["format"], 1), whole_number(said["world_size"], 1)
        summary, files = said["summary"], said["files"]
        if not isinstance(summary, dict) or not isinstance(files, dict):
            raise TypeError("its summary and its files are no objects")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Bad(CheckpointUnsafe, f"{MANIFEST} says what no save writes ({error})"[:500]) from error
    if version > FORMAT:
        text = f"has format {version}; this holdfast reads formats up to {FORMAT}. Update holdfast to read it"
        raise Bad(CheckpointIncompatible, text)
    parts: dict[str, Part] = {}
    for name, row in files.items():
        if not directories.is_part(name) or name == MANIFEST:
            raise Bad(CheckpointUnsafe, f"{MANIFEST} names {name[:200]!r}, which is no file of a checkpoint")
        try:
            parts[name] = parse_part(row)
        except ValueError as error:
            raise Bad(CheckpointUnsafe, f"{MANIFEST} says of {name} what no save writes ({error})") from error
    for name in (PAYLOAD, TENSORS):
        if name not in parts:
            raise Bad(CheckpointUnsafe, f"{MANIFEST} does not name {name}")
    return Manifest(version, world_size, summary, parts, len(data))
