"""Saving: a payload in, a durable file out, and an account of what it cost."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from holdfast.checkpoint import background, payload, pickling
from holdfast.checkpoint.arena import Arena
from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.pending import PendingSave as PendingSave
from holdfast.checkpoint.plain_summary import plain_summary as plain_summary
from holdfast.checkpoint.planned import Planned
from holdfast.checkpoint.report import SaveReport, tell_omissions
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.checkpoint.tensors import Plan
from holdfast.checkpoint.trust import SnapshotChanged as SnapshotChanged
from holdfast.checkpoint.trust import Trust
from holdfast.checkpoint.writing import Content
from holdfast.utilities.collector import uncollected
from holdfast.utilities.rank_zero import warn_once

_KNOWN_PLANS = 2  # full checkpoints and those of weights alone often take turns


def save(
    state: Any,
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    metrics: dict[str, float] | None = None,
) -> SaveReport:
    """Save anything as a checkpoint: durable when this returns, whole or absent, checked when it is loaded.

    A value that cannot be stored is left out, and named in a warning and in the report.

    Args:
        state: a dict of anything: tensors, state dicts, plain values, nested as you like.
        path: the file. Its directory is made; a file that is already there is replaced as a whole.
        step: shown in listings, and orders checkpoints by age.
        metrics: numbers that listings show.

    Blocks: until the file and its directory are on disk.

    Raises:
        StorageError: the disk refused. What was there before is untouched.
        ConfigError: a metric is not a plain number.
    """
    about = {"step": step, "metrics": metrics}
    summary = {key: value for key, value in about.items() if value is not None}
    report = CheckpointEngine().save(state, path, summary=summary)
    tell_omissions(report.omissions)
    return report


class CheckpointEngine:
    """Saves payloads as files that are whole or absent.

    One save is in flight at a time; a further one waits for it. `wait` and `close` are where a caller meets
    what is still running. A background save that is in flight when the interpreter ends is finished first.

    Memory: one snapshot, from the first background save until `close`.

    Attributes:
        not_before_s: seconds since 1970; `date` gives every file a later date.
    """

    not_before_s = 0.0

    def __init__(self) -> None:
        self._trust = Trust()
        self._arena = Arena()
        self._known: list[Planned] = []
        self._begin_in_child()
        background.survive_fork(self)

    def __reduce__(self) -> tuple[type[CheckpointEngine], tuple[()]]:
        return type(self), ()  # a copy of what owns it, or one sent to another process, gets one of its own

    def _begin_in_child(self) -> None:
        pending: PendingSave | None = getattr(self, "_pending", None)
        self._saving = threading.RLock()
        self._pending: PendingSave | None = None
        self._copy: tuple[Snapshot, PendingSave] | None = None
        if pending is not None:
            pending._left_behind()

    @property
    def copying(self) -> bool:
        """Whether a snapshot still reads live tensors: then `wait_for_copy` comes before they change."""
        copy = self._copy
        return copy is not None and copy[0].open

    def date(self) -> float:
        """When the next file is saved, for its summary: a clock that was set back makes no file look old."""
        self.not_before_s = max(time.time(), self.not_before_s + 1e-6)
        return self.not_before_s

    def prepare(self, size_bytes: int) -> None:
        """Make memory ready in the background for snapshots of about ``size_bytes``; returns at once.

        It is a matter of speed alone: what cannot be had is not missed before the first snapshot.
        """
        if not self._saving.acquire(blocking=False):
            return
        try:
            if self._copy is None and (self._pending is None or self._pending._told.is_set()):
                self._arena.prepare(size_bytes + size_bytes // 64 + (1 << 20))  # headers stand between
        except MemoryError:
            pass
        finally:
            self._saving.release()

    def wait_for_copy(self, *, learn: bool = True) -> None:
        """Return when live tensors may change again: the snapshot in flight, if any, has read them all.

        Call it as late as possible before they change, and after whatever changes tensors against the
        promise: that is noticed here. The step of any `torch.optim.Optimizer` calls it. Any thread may.

        Args:
            learn: False where less has happened since the save than before a step: that tensors have not
                changed yet says nothing then of whether they may be copied late.

        Blocks: for the rest of the copy; for the first two snapshots, to compare each byte. On a CUDA
        device, never the host.
        """
        copy = self._copy
        if copy is None:
            return
        snapshot, pending = copy
        began = time.monotonic()
        snapshot.settle(learn)
        if self._copy is copy:
            self._copy = None
            background.end_copying(self)
            pending.waited_s += time.monotonic() - began
        self._trust.tell()

    def save(
        self,
        payload: Any,
        path: str | os.PathLike[str],
        *,
        names: Sequence[str | os.PathLike[str]] = (),
        symlinks: bool = True,
        summary: dict[str, Any] | None = None,
        attempts: int = 1,
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
            attempts: how often the file is written, each time anew, before the save has failed.

        Ranks: the one that writes.
        Blocks: until the save before it has ended, and the file and its directory are on disk.
        On return: the payload may be changed; nothing that happens to it now is in the file.

        Raises:
            StorageError: the disk refused. Until the new file is whole, all names are as they were; if giving
                it a further name fails, ``path`` has it already.
            ConfigError: the summary is not plain values.
        """
        began = time.monotonic()
        about = plain_summary(summary or {})
        with self._one_at_a_time():
            queued_s = time.monotonic() - began
            final, further = _absolute(path, names)
            with uncollected():
                return _save_now(payload, final, further, symlinks, about, began, queued_s, attempts)

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

        Where there is no memory for a snapshot it is saved in the foreground, with a warning.

        Args:
            payload: as for `save`.
            path: as for `save`.
            names: as for `save`.
            symlinks: as for `save`.
            summary: as for `save`.
            late: live tensors that nothing changes before `wait_for_copy` or the next step of any
                `torch.optim.Optimizer`: they may be copied after the call has returned, from the third
                snapshot on that they are in. All others are copied at once.
            attempts: as for `save`.
            on_end: called in the background, with this save, when it is durable or has failed. It must
                return quickly, and must not save. What it raises, `PendingSave.wait` raises.

        Ranks: the one that writes.
        Blocks: until the save before it has ended, and for the copy of what is not ``late``.
        On return: all but the tensors in ``late`` may be changed; while `copying`, those only after
            `wait_for_copy`.

        Raises:
            ConfigError: the summary is not plain values.
        """
        began = time.monotonic()
        about = plain_summary(summary or {})
        with self._one_at_a_time():
            queued_s = time.monotonic() - began
            final, further = _absolute(path, names)
            try:
                with uncollected():
                    snapshot = Snapshot(payload, late, self._known, self._arena, self._trust)
            except MemoryError as error:
                self._arena.close()
                warn_once(
                    "no memory for a snapshot",
                    f"Checkpoints are saved in the foreground, while training waits: {error}.",
                )
                pending = PendingSave(final, further, [], on_end)

                def work() -> SaveReport:
                    with uncollected():
                        return _save_now(payload, final, further, symlinks, about, began, queued_s, attempts)

                background.carry_out(pending, work)
                pending.blocked_s = time.monotonic() - began
                return pending
            encoded = snapshot.encoded
            assert encoded is not None
            _describe(about, encoded)
            self._known = [snapshot.planned, *(one for one in self._known if one is not snapshot.planned)]
            del self._known[_KNOWN_PLANS:]
            pending = PendingSave(final, further, encoded.omissions, on_end)
            del encoded

            def work() -> SaveReport:
                return _finish(snapshot, pending, symlinks, about, attempts, began, queued_s)

            if snapshot.open:
                self._copy = snapshot, pending
                background.begin_copying(self)
            self._pending = pending
            background.start(pending, work)
            pending.blocked_s = time.monotonic() - began
            return pending

    def wait(self) -> None:
        """Return when every save so far has ended; what one failed with, its `PendingSave` raises."""
        pending = self._pending
        if pending is None or pending._telling == threading.get_ident():
            return
        pending._told.wait()
        if self._pending is pending:
            self._forget()

    def close(self) -> None:
        """Wait, and let go of threads and buffers; the engine can be used again afterwards."""
        with self._one_at_a_time():
            self._arena.close()
            self._known = []
            self._trust = Trust()  # what is saved next may be another model, with the same names

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        pending = self._pending
        if pending is not None and pending._telling == threading.get_ident():
            raise RuntimeError(
                "An on_end callback must not save: it would wait for itself. Note what is to be done there, "
                "and save where training calls from."
            )
        with self._saving:
            self.wait()
            self._trust.tell()
            yield

    def _forget(self) -> None:
        copy, self._copy, self._pending = self._copy, None, None
        background.end_copying(self)
        if copy is not None:
            copy[0].drop()


def _save_now(
    value: Any,
    path: str,
    names: tuple[str, ...],
    symlinks: bool,
    about: dict[str, Any],
    began: float,
    queued_s: float,
    attempts: int,
) -> SaveReport:
    encoded = payload.encode(value)
    plan = Plan(encoded.tensors)
    pickled = pickling.dumps(encoded.tree, plan)
    _describe(about, encoded)
    content = Content(Layout(plan.records), pickled, encoded.types, encoded.omissions, about)
    size, write_s, written = background.write(path, content, attempts=attempts)
    links = background.add_names(path, names, symlinks=symlinks, attempts=attempts)
    spent = time.monotonic() - began
    return SaveReport(
        path,
        names,
        size,
        spent,
        spent,
        encoded.omissions,
        links,
        queued_s=queued_s,
        write_s=write_s,
        attempts=written,
    )


def _finish(
    snapshot: Snapshot,
    pending: PendingSave,
    symlinks: bool,
    about: dict[str, Any],
    attempts: int,
    began: float,
    queued_s: float,
) -> SaveReport:
    """In the background, from a snapshot that may still be copied to a durable file."""
    try:
        snapshot.copy_late()
        encoded = snapshot.encoded
        assert encoded is not None
        pickled = pickling.dumps(encoded.tree, snapshot.planned.plan)
        content = Content(snapshot.layout, pickled, encoded.types, encoded.omissions, about)
    finally:
        encoded = None
        snapshot.release()
    size, write_s, written = background.write(
        pending.path, content, image=snapshot.image, attempts=attempts, confirm=snapshot.confirm
    )
    links = background.add_names(pending.path, pending.names, symlinks=symlinks, attempts=attempts)
    return SaveReport(
        pending.path,
        pending.names,
        size,
        pending.blocked_s,
        time.monotonic() - began,
        pending.omissions,
        links,
        background=True,
        queued_s=queued_s,
        write_s=write_s,
        attempts=written,
    )


def _absolute(
    path: str | os.PathLike[str], names: Sequence[str | os.PathLike[str]]
) -> tuple[str, tuple[str, ...]]:
    return os.path.abspath(os.fspath(path)), tuple(os.path.abspath(os.fspath(name)) for name in names)


def _describe(about: dict[str, Any], encoded: payload.Encoded) -> None:
    """Add to the summary what every file says of itself."""
    about.setdefault("saved_at", time.time())
    keys = encoded.tree if isinstance(encoded.tree, dict) else {}
    about["contents"] = [key for key in keys if isinstance(key, str)]
