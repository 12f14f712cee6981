"""Saving: a payload in, a durable file out, and an account of what it cost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint import commit, container, payload, pickling
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry
from holdfast.checkpoint.tensors import Plan, Record
from holdfast.errors import ConfigError

_COALESCE_BYTES = 4 << 20
_SMALL_BYTES = 128 << 10


@dataclass(frozen=True)
class SaveReport:
    """What one save did.

    Attributes:
        path: the final name.
        names: the further names that hold the same content now.
        links: for each of them, how: "reflink", "hard link", "symlink", "copy" or "same".
        size_bytes: length of the file.
        blocked_s: seconds for which the caller waited.
        durable_s: seconds until the file and its directory were on disk.
        omissions: (path, reason) of each value that could not be stored.
    """

    path: str
    names: tuple[str, ...]
    size_bytes: int
    blocked_s: float
    durable_s: float
    omissions: list[tuple[str, str]] = field(default_factory=list)
    links: tuple[str, ...] = ()


class CheckpointEngine:
    """Saves payloads as files that are whole or absent.

    One save is in flight at a time. What `save` promises does not depend on whether the writing happens
    before it returns or in the background; `wait` and `close` are where a caller meets what is still
    running, and where its errors are raised if no further `save` comes.
    """

    copying = False
    """Whether a snapshot still reads live tensors: then `wait_for_copy` has to come before they change."""

    def wait_for_copy(self) -> None:
        """Return when live tensors may change again. A save that blocks has copied by the time it returns."""

    def save(
        self,
        payload: Any,
        path: str | os.PathLike[str],
        *,
        names: Sequence[str | os.PathLike[str]] = (),
        symlinks: bool = True,
        summary: dict[str, Any] | None = None,
        on_commit: Callable[[SaveReport], None] | None = None,
    ) -> SaveReport:
        """Save the payload as it is at this moment, durably and under all its names.

        Parent directories are made. A file that is already there is replaced as a whole, even if it is
        read-only or shares its content with another name; that other name keeps its content.

        Args:
            payload: a dict of anything; `payload.encode` says what becomes of values that cannot be stored.
            path: the final name.
            names: further names for the same content, at no further space where the file system can.
            symlinks: whether a further name may be a symlink, which ends with the file under ``path``.
            summary: plain values that a directory listing shows: step, epoch, metrics, exact, kind.
            on_commit: called with the report when the file is durable under all its names.

        Ranks: the one that writes.
        Blocks: until the file and its directory are on disk.
        On return: the payload may be changed; nothing that happens to it now is in the file.

        Raises:
            StorageError: the disk refused. Until the new file is whole, all names are as they were; if giving
                it a further name fails, ``path`` has it already.
            ConfigError: the summary is not plain values.
        """
        with pickling.uncollected():
            report = _save(payload, path, names, symlinks, summary or {})
        if on_commit is not None:
            on_commit(report)
        return report

    def wait(self) -> None:
        """Return when every save so far is durable; raise the error of one that failed."""

    def close(self) -> None:
        """Wait, and let go of threads and buffers; the engine can be used again afterwards."""
        self.wait()


def _save(
    value: Any,
    path: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]],
    symlinks: bool,
    summary: dict[str, Any],
) -> SaveReport:
    began = time.monotonic()
    final = os.path.abspath(os.fspath(path))
    encoded = payload.encode(value)
    plan = Plan(encoded.tensors)
    pickled = pickling.dumps(encoded.tree, plan)
    about = plain_summary(summary)
    about["saved_at"] = time.time()
    keys = encoded.tree if isinstance(encoded.tree, dict) else {}
    about["contents"] = [key for key in keys if isinstance(key, str)]
    with commit.replacing(final) as file:
        file.needed_bytes = len(pickled) + sum(record.length for record in plan.records)
        size = write(file.fd, pickled, plan.records, encoded, about)
    further = tuple(os.path.abspath(os.fspath(name)) for name in names)
    links = [commit.add_name(final, name, symlink=symlinks) for name in further]
    spent = time.monotonic() - began
    return SaveReport(final, further, size, spent, spent, encoded.omissions, tuple(links))


def plain_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as JSON holds it: numbers that JSON lacks become text ("NaN").

    Raises:
        ConfigError: naming the value that is not plain.
    """
    return {key: _plain(value, key) for key, value in summary.items()}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    raise ConfigError(
        f"summary: {where} is a {type(value).__name__}; a summary holds plain values only "
        "(text, numbers, True, False, None, and lists and dicts of them)."
    )


def write(
    fd: int, pickled: bytes, records: list[Record], encoded: payload.Encoded, about: dict[str, Any]
) -> int:
    """Write the whole file from its start; return its length.

    Memory: a few chunks, however large the state.
    """
    writer = _Writer(fd)
    writer.add("data.pkl", pickled)
    writer.add("version", b"3\n")
    writer.add("byteorder", b"little")
    tensors: dict[str, list[str]] = {}
    for record in records:
        tensors[record.name] = [
            container.tensor_json(span.name, str(span.tensor.dtype)[6:], span.tensor.shape)
            for span in record.spans
        ]
        writer.add_record(record)
    manifest = container.records_bytes(writer.entries, tensors, encoded.types, encoded.omissions)
    placed = writer.add(container.RECORDS, manifest)
    writer.add(container.SUMMARY, container.summary_bytes(about, placed))
    writer.flush()
    commit.crash_point("before-directory")
    return commit.writev_all(fd, [container.directory(writer.entries, writer.at)], writer.at)


class _Writer:
    """Lays records out one after the other and writes them in large pieces."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.entries: list[Entry] = []
        self.at = 0  # where the next header goes
        self._written = 0
        self._pending: list[bytes] = []

    def add(self, name: str, data: bytes) -> Entry:
        """Place a small record; it is written with its neighbours."""
        entry = self._place(name, len(data), crc32(data))
        self._pending.append(data)
        if self.at - self._written >= _COALESCE_BYTES:
            self.flush()
        return entry

    def add_record(self, record: Record) -> None:
        if record.length <= _SMALL_BYTES:
            self.add(record.name, record.small())
            return
        # Twice over the memory, since a zip's checksum stands before the data; a checksum costs little.
        checksum = 0
        for chunk in record.chunks():
            checksum = crc32(chunk, checksum)
        self._place(record.name, record.length, checksum)
        for chunk in record.chunks():
            self.flush(chunk)

    def _place(self, name: str, length: int, checksum: int) -> Entry:
        header = container.local_header(name, self.at, length, checksum)
        entry = Entry(name, self.at, self.at + len(header), length, checksum)
        self.entries.append(entry)
        self.at = entry.offset + length
        self._pending.append(header)
        return entry

    def flush(self, chunk: Any = b"") -> None:
        """Write what is pending, and then the chunk."""
        self._written = commit.writev_all(self.fd, [b"".join(self._pending), chunk], self._written)
        self._pending = []
        commit.crash_point("writing")
