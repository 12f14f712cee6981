"""Saving: a payload in, a durable file out, and an account of what it cost."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from holdfast.checkpoint import commit, payload, pickling, writing
from holdfast.checkpoint.point_in_time import PointInTime
from holdfast.checkpoint.report import SaveReport
from holdfast.checkpoint.tensors import Plan
from holdfast.errors import ConfigError


class SnapshotChanged(Exception):
    """Tensors were changed while they were copied: that snapshot is not one moment, and was thrown away.

    Attributes:
        names: the tensors, as they are called in the payload. The engine copies them at once from now on.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{', '.join(names)} changed while being copied")
        self.names = tuple(names)


class PendingSave:
    """A save that goes on in the background.

    Attributes:
        path: the final name.
        names: further names for the same content.
        omissions: (path, reason) of each value that could not be stored; known at once.
        blocked_s: seconds for which the caller waited.
    """

    def __init__(
        self,
        path: str,
        names: tuple[str, ...],
        omissions: list[tuple[str, str]],
        on_end: Callable[[PendingSave], None] | None,
    ) -> None:
        self.path = path
        self.names = names
        self.omissions = omissions
        self.blocked_s = 0.0
        self._on_end = on_end
        self._ended = threading.Event()
        self._report: SaveReport | None = None
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether it is durable under all its names, or has failed."""
        return self._ended.is_set()

    def wait(self) -> SaveReport:
        """Return when the file is durable under all its names.

        Raises:
            StorageError: the disk refused; with the traceback of where it was met.
            SnapshotChanged: the tensors changed while they were copied. Save again at the next safe point.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def _end(self, report: SaveReport | None, error: BaseException | None) -> None:
        self._report, self._error = report, error
        self._ended.set()
        if self._on_end is not None:
            self._on_end(self)


class CheckpointEngine:
    """Saves payloads as files that are whole or absent.

    One save is in flight at a time; a further one waits for it. `wait` and `close` are where a caller meets
    what is still running.
    """

    copying = False
    """Whether a snapshot still reads live tensors: then `wait_for_copy` has to come before they change."""

    def __init__(self) -> None:
        self._pending: PendingSave | None = None

    def prepare(self, size_bytes: int) -> None:
        """Make memory ready in the background for snapshots of about ``size_bytes``; returns at once."""

    def wait_for_copy(self) -> None:
        """Return when live tensors may change again: the snapshot in flight, if any, has read them all."""

    def save(
        self,
        payload: Any,
        path: str | os.PathLike[str],
        *,
        names: Sequence[str | os.PathLike[str]] = (),
        symlinks: bool = True,
        summary: dict[str, Any] | None = None,
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

        Ranks: the one that writes.
        Blocks: until the save before it has ended, and the file and its directory are on disk.
        On return: the payload may be changed; nothing that happens to it now is in the file.

        Raises:
            StorageError: the disk refused. Until the new file is whole, all names are as they were; if giving
                it a further name fails, ``path`` has it already.
            ConfigError: the summary is not plain values.
        """
        began = time.monotonic()
        self._wait_for_end()
        queued_s = time.monotonic() - began
        with pickling.uncollected():
            return _save(payload, path, names, symlinks, summary or {}, began, queued_s)

    def save_in_background(
        self,
        payload: Any,
        path: str | os.PathLike[str],
        *,
        names: Sequence[str | os.PathLike[str]] = (),
        symlinks: bool = True,
        summary: dict[str, Any] | None = None,
        late: Collection[Tensor] = (),
        attempts: int = 1,
        on_end: Callable[[PendingSave], None] | None = None,
    ) -> PendingSave:
        """Save the payload as it is at this moment; return when its snapshot is taken, or is being taken.

        Args:
            payload: as for `save`.
            path: as for `save`.
            names: as for `save`.
            symlinks: as for `save`.
            summary: as for `save`.
            late: live tensors that nothing changes before `wait_for_copy` or the next step of any
                `torch.optim.Optimizer`: they may be copied after the call has returned. All others are
                copied at once.
            attempts: how often the file is written, each time anew, before the save has failed.
            on_end: called in the background, with this save, when it is durable or has failed. It must
                return quickly, and must not save.

        Ranks: the one that writes.
        Blocks: until the save before it has ended, and for the copy of what is not ``late``.
        On return: all but the tensors in ``late`` may be changed; while `copying`, those only after
            `wait_for_copy`.

        Raises:
            ConfigError: the summary is not plain values.
        """
        began = time.monotonic()
        self._wait_for_end()
        queued_s = time.monotonic() - began
        snapshot = PointInTime().of(payload)
        final = os.path.abspath(os.fspath(path))
        further = tuple(os.path.abspath(os.fspath(name)) for name in names)
        about = plain_summary(summary or {})
        pending = PendingSave(final, further, [], on_end)

        def run() -> None:
            try:
                report = _save(snapshot, final, further, symlinks, about, began, queued_s)
            except BaseException as error:
                pending._end(None, error)
            else:
                pending._end(report, None)

        self._pending = pending
        threading.Thread(target=run, name="holdfast-save").start()
        pending.blocked_s = time.monotonic() - began
        return pending

    def wait(self) -> None:
        """Return when every save so far has ended; what one failed with, its `PendingSave` raises."""
        self._wait_for_end()

    def close(self) -> None:
        """Wait, and let go of threads and buffers; the engine can be used again afterwards."""
        self.wait()

    def _wait_for_end(self) -> None:
        if self._pending is not None:
            self._pending._ended.wait()
            self._pending = None


def _save(
    value: Any,
    path: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]],
    symlinks: bool,
    summary: dict[str, Any],
    began: float,
    queued_s: float,
) -> SaveReport:
    final = os.path.abspath(os.fspath(path))
    encoded = payload.encode(value)
    plan = Plan(encoded.tensors)
    pickled = pickling.dumps(encoded.tree, plan)
    about = plain_summary(summary)
    about["saved_at"] = time.time()
    keys = encoded.tree if isinstance(encoded.tree, dict) else {}
    about["contents"] = [key for key in keys if isinstance(key, str)]
    writes = time.monotonic()
    with commit.replacing(final) as file:
        file.needed_bytes = len(pickled) + sum(record.length for record in plan.records)
        size = writing.write(file.fd, pickled, plan.records, encoded, about)
    write_s = time.monotonic() - writes
    further = tuple(os.path.abspath(os.fspath(name)) for name in names)
    links = [commit.add_name(final, name, symlink=symlinks) for name in further]
    spent = time.monotonic() - began
    return SaveReport(
        final,
        further,
        size,
        spent,
        spent,
        encoded.omissions,
        tuple(links),
        queued_s=queued_s,
        write_s=write_s,
    )


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
