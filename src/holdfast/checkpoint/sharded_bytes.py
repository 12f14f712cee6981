"""The bytes of a sharded checkpoint's tensors, as if each lay in one piece; and the check of all its files.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shlex
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from holdfast.checkpoint import catalog, commit, sharded_manifest
from holdfast.checkpoint.sharded_manifest import Bad, Directory
from holdfast.checkpoint.sharded_tensors import TensorEntry
from holdfast.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointNotFound, HoldfastError

_MOST_OPEN = 200
_MOST_NAMED = 20
_THREADS = 4


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Directory]:
    """Open a sharded checkpoint for the length of a block; what is wrong with it is said as our errors.

    Raises:
        CheckpointNotFound: there is none, or it was deleted meanwhile.
        CheckpointError: it is not whole, or damaged; each file that is bad is named.
        StorageError: it cannot be read.
    """
    name = os.fspath(path)
    with telling(name), sharded_manifest.opened(name) as directory:
        yield directory


@contextlib.contextmanager
def telling(name: str, found: Sequence[Directory] = ()) -> Iterator[None]:
    """Say in holdfast's errors what goes wrong with a directory in a block; ``found`` once it is open."""
    try:
        yield
    except Bad as bad:
        if found and not found[0].is_there():
            raise _gone(name) from None
        hint = newest_beside(name) if bad.kind in (CheckpointIncomplete, CheckpointCorrupt) else ""
        raise bad.told(name, hint) from None
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise _gone(name) from error
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise commit.storage_error(name, "read", error) from error


def _gone(name: str) -> CheckpointNotFound:
    return CheckpointNotFound(f"There is no checkpoint {name}, or it has just been deleted.", path=name)


def newest_beside(name: str) -> str:
    """A line that names the newest whole checkpoint beside one that is not, or nothing."""
    directory = os.path.dirname(os.path.abspath(name))
    try:
        for entry in catalog.scan(directory):
            if entry.whole and not entry.foreign and os.path.abspath(entry.path) != os.path.abspath(name):
                newest = f"Newest whole checkpoint in {directory}: {os.path.basename(entry.path)}."
                return f"\n{newest} Check them all: holdfast verify {shlex.quote(directory)}"
    except (HoldfastError, OSError):  # this is for the message of an error that says more
        pass
    return ""


def check(directory: Directory, names: Collection[str]) -> None:
    """Read files whole and compare their checksums; of a shard that is bad, name the tensors.

    Memory: 2 MiB for each of a few threads.

    Raises:
        Bad: some are not what was written; each is named.
    """
    found = list(filter(None, map_in_threads(directory, sorted(names))))
    if not found:
        return
    told = []
    for name, bad in found[:_MOST_NAMED]:
        tensors = directory.bad_tensors(name) if bad.kind is CheckpointCorrupt else []
        more = f" and {len(tensors) - 2} more" if len(tensors) > 2 else ""
        told.append(f"{bad.reason} ({'; '.join(tensors[:2])}{more})" if tensors else bad.reason)
    kind = found[0][1].kind
    if len(found) == 1:
        raise Bad(kind, told[0])
    more = f"\n  and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    raise Bad(kind, f"{len(found)} files are bad:\n  " + "\n  ".join(told) + more)


def map_in_threads(directory: Directory, names: Sequence[str]) -> list[tuple[str, Bad] | None]:
    """Check each file; gives what is wrong with it, or None."""

    def one(name: str) -> tuple[str, Bad] | None:
        try:
            directory.check(name)
        except Bad as bad:
            return name, bad
        return None

    if len(names) < 2:
        return [one(name) for name in names]
    with ThreadPoolExecutor(min(_THREADS, len(names)), "holdfast-read") as pool:
        return list(pool.map(one, names))


class Checked(NamedTuple):
    """What `verify` looked at."""

    files: int
    size_bytes: int
    seconds: float


def verify(path: str | os.PathLike[str]) -> Checked:
    """Check every byte of a sharded checkpoint, and that there is nothing in it that is no part of it.

    Raises:
        CheckpointNotFound: there is none.
        CheckpointIncomplete: a file is missing or was cut short; it is named.
        CheckpointCorrupt: bytes differ from those written, or a file is there that has no part in it.
        CheckpointUnsafe: it holds what no save writes.
        StorageError: the disk failed.
    """
    began = time.perf_counter()
    with opened(path) as directory:
        files = directory.manifest.files
        check(directory, files)
        directory.tensors()
        strangers = directory.strangers()
        if strangers:
            names = ", ".join(repr(name) for name in strangers[:3])
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            text = f"it holds {names}{more}, which the manifest does not name; nothing reads that: remove it"
            raise Bad(CheckpointCorrupt, text)
        return Checked(len(files) + 1, directory.manifest.size_bytes, time.perf_counter() - began)


class _Run(NamedTuple):
    """Bytes that follow each other in the tensor and in a file."""

    begin: int
    length: int
    file: str
    offset: int


class Reader:
    """Reads tensors of an opened checkpoint, which somebody has checked."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._open: dict[str, int] = {}
        self._of: TensorEntry | None = None
        self._runs: list[_Run] = []
        self._begins: list[int] = []
        self._spread: list[int] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def read(self, tensor: TensorEntry, at: int, into: memoryview) -> None:
        """Read bytes of a tensor, in row-major order, from the ``at``-th on, as many as there is room for.

        Raises:
            Bad: a file ends too early.
            OSError: the disk failed.
        """
        self._look_at(tensor)
        end = at + len(into)
        first = max(0, bisect_right(self._begins, at) - 1)
        for run in itertools.islice(self._runs, first, None):
            if run.begin >= end:
                break
            self._copy(run, at, end, into)
        for index in self._spread:
            for run in _spread_runs(tensor, index, at, end):
                self._copy(run, at, end, into)

    def _copy(self, run: _Run, at: int, end: int, into: memoryview) -> None:
        begin, stop = max(run.begin, at), min(run.begin + run.length, end)
        if begin >= stop:
            return
        part, place = into[begin - at : stop - at], run.offset + begin - run.begin
        fd = self._fd(run.file)
        while part:
            count = os.preadv(fd, [part], place)
            if not count:
                raise Bad(CheckpointIncomplete, f"{run.file} ends too early")
            part, place = part[count:], place + count

    def _fd(self, name: str) -> int:
        fd = self._open.get(name)
        if fd is None:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            fd = self._open[name] = self._directory.open(name)
        return fd

    def _look_at(self, tensor: TensorEntry) -> None:
        if self._of is tensor:
            return
        self._of, self._spread, runs = tensor, [], []
        for index, chunk in enumerate(tensor.chunks):
            if chunk.length:
                inner = _first_full(chunk.sizes, tensor.shape)
                if math.prod(chunk.sizes[:inner]) == 1:
                    begin = _position(chunk.offsets, tensor.shape) * tensor.itemsize
                    runs.append(_Run(begin, chunk.length, chunk.file, chunk.offset))
                else:
                    self._spread.append(index)
        self._runs = sorted(runs)
        self._begins = [run.begin for run in self._runs]


def _first_full(sizes: Sequence[int], shape: Sequence[int]) -> int:
    """The dimension from which on a box lies in a run: all behind it are as long as the tensor's."""
    for dim in range(len(shape) - 1, -1, -1):
        if sizes[dim] != shape[dim]:
            return dim
    return 0


def _position(index: Sequence[int], shape: Sequence[int]) -> int:
    """Which element, in row-major order, has an index."""
    position = 0
    for at, length in zip(index, shape, strict=True):
        position = position * length + at
    return position


def _spread_runs(tensor: TensorEntry, index: int, at: int, end: int) -> Iterator[_Run]:
    """The runs of a chunk that does not lie in one, as far as they may meet a range of bytes."""
    chunk, shape, size = tensor.chunks[index], tensor.shape, tensor.itemsize
    inner = _first_full(chunk.sizes, shape)
    length = math.prod(chunk.sizes[inner:]) * size
    row = math.prod(shape[1:]) * size
    first = max(0, at // row - chunk.offsets[0])
    last = min(chunk.sizes[0], -(-end // row) - chunk.offsets[0])
    outer = chunk.sizes[:inner]
    for place in itertools.product(range(first, last), *map(range, outer[1:])):
        number = _position(place, outer)
        there = [begin + step for begin, step in zip(chunk.offsets, place, strict=False)]
        there += chunk.offsets[inner:]
        yield _Run(_position(there, shape) * size, length, chunk.file, chunk.offset + number * length)


def fill_box(
    reader: Reader, tensor: TensorEntry, begin: Sequence[int], sizes: Sequence[int], into: memoryview
) -> None:
    """Read a box of a tensor's elements, in row-major order.

    Raises:
        Bad: a file ends too early.
        OSError: the disk failed.
    """
    if not len(into):
        return
    inner, size = _first_full(sizes, tensor.shape), tensor.itemsize
    length = math.prod(sizes[inner:]) * size
    for number, place in enumerate(itertools.product(*map(range, sizes[:inner]))):
        there = [at + step for at, step in zip(begin, place, strict=False)]
        there += begin[inner:]
        reader.read(
            tensor, _position(there, tensor.shape) * size, into[number * length : (number + 1) * length]
        )
