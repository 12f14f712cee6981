"""Checkpointer: checkpoints for a training loop that you write yourself."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

from torch import Tensor

from holdfast.callbacks.save_line import format_number, format_size
from holdfast.checkpoint import catalog, commit, ownership, retention, stateful
from holdfast.checkpoint.catalog import Entry
from holdfast.checkpoint.engine import CheckpointEngine, PendingSave, SnapshotChanged
from holdfast.checkpoint.load import load_mapped
from holdfast.checkpoint.mapped import Loaded
from holdfast.checkpoint.newest import newest_verified
from holdfast.checkpoint.ownership import Contents, RunFiles
from holdfast.checkpoint.report import SaveReport, tell_omissions
from holdfast.checkpoint.retention import Policy
from holdfast.checkpoint.spent import SavingStats
from holdfast.errors import (
    ConfigError,
    StorageError,
)
from holdfast.training import loop_state
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn

_ATTEMPTS = 3
_COPIED = (stateful.MODULE, stateful.TENSOR)


@dataclass
class _Flight:
    """A save that is under way, and what has become of it."""

    path: str
    pending: PendingSave | None = None
    settled: bool = False
    error: BaseException | None = None
    report: SaveReport | None = None
    deleted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves the state of a loop so that a run which is killed at any instant goes on where it was.

        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        with Checkpointer("runs/a", keep=3, every=100) as checkpointer:
            step = checkpointer.restore(state) or 0
            while step < 10_000:
                train_one_step()
                step += 1
                checkpointer.save(step, state)

    What may be in ``state``: anything with ``state_dict()`` and ``load_state_dict()``, tensors, generators,
    plain values, and dicts and lists of these. The generators that everybody draws from (Python, NumPy,
    torch) are saved and restored as well.

    Call `save` where nothing of a step is left half done: after ``optimizer.step()`` and the scheduler's
    step. Gradients are not saved.

    Args:
        directory: Where the files go; it is made. One directory is for one run.
        keep: Which checkpoints stay: a number is the last n, None is all; or policies, such as
            ``KeepBest(1, "val_loss") | KeepLast(2)``. The newest always stays.
        every: Save every n-th step; `save` may then be called at each.
        background: Return from `save` once the snapshot is taken, and write while training goes on.
        on_error: What becomes of a save that fails: "raise" it at the next `save`, in `wait` or at the end of
            the block; "warn" and go on; "retry" writes it three times in all and then raises.
        rng: Save and restore the generators of Python, NumPy and torch too.

    Ranks: call `save` on one of them, `restore` on all. Only the generators of the one that saves are in the
        file, so with several processes use ``rng=False`` and seed each.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int | Policy | None = 3,
        every: int = 1,
        *,
        background: bool = True,
        on_error: Literal["raise", "warn", "retry"] = "raise",
        rng: bool = True,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r}: give a whole number of steps, at least 1.")
        if on_error not in ("raise", "warn", "retry"):
            raise ConfigError(f'on_error={on_error!r}: it is "raise", "warn" or "retry".')
        self.directory = os.path.abspath(os.fspath(directory))
        self.policy = retention.policy_of(keep)
        self.every = every
        self.background = background
        self.on_error = on_error
        self._attempts = _ATTEMPTS if on_error == "retry" else 1
        self.rng = rng
        self._engine = CheckpointEngine()
        self._files = RunFiles(self.directory)
        self._seen = 0  # the last step that save() was called with
        self._due = 0 if every == 1 else every
        self._attention = False  # a save has ended, and is to be looked at on the loop's own thread
        self._flight: _Flight | None = None
        self._settling = threading.Lock()
        self._places: dict[str, Any] = {}
        self._stats = SavingStats()

    # -- saving ----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: dict[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> str | None:
        """Save the state as it is now, if a checkpoint is due at this step.

        Args:
            step: How many steps the whole run has made; it never goes back.
            state: The live objects.
            metrics: Numbers by which checkpoints are compared.
            force: Save whether it is due or not, and copy all of it before the call returns: for the last
                save of a run, behind which weights may be changed by other means than a step.

        Blocks: until the save before it has ended, and for the snapshot; with ``background=False`` until the
            file is durable.
        On return: the state may be changed; nothing that happens to it now is in the file. What optimizers
            train may still be being copied, which their next step waits for; if anything else changes it
            meanwhile, that is noticed, and the save is made again at the next call.

        Returns:
            The path that the checkpoint has when it is durable; None if nothing was due.

        Raises:
            StorageError: the disk refused this save, or in the background the one before it.
            ConfigError: the step has gone back, or the state or a metric is not one that can be saved.
        """
        if self._seen <= step < self._due and not force and not self._attention:
            self._seen = step
            return None
        return self._save(_whole(step), state, metrics, force)

    def _save(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, Any] | None, force: bool
    ) -> str | None:
        if step < self._seen:
            raise ConfigError(
                f"save(step={step}): the step has gone back, it was {self._seen} before. Give the number of "
                "steps of the whole run, not of an epoch."
            )
        self._seen = step
        began = time.monotonic()
        self._end_flight(saves_again=True)
        if not force and step < self._due:
            return None
        payload, whole = loop_state.capture(state, step, self._places, rng=self.rng)
        numbers = loop_state.numbers(metrics)
        told = self._files.claim()
        if told:
            rank_zero_warn(told)
        path, owner = self._files.place(step)
        summary = {
            "step": step,
            "epoch": state["epoch"] if type(state.get("epoch")) is int else None,
            "metrics": numbers,
            "exact": whole,
            "kind": "state",
            **owner,
        }
        self._due = (step // self.every + 1) * self.every
        self._flight = _Flight(path)
        try:
            if self.background:
                self._start(self._flight, payload, summary, [] if force else stateful.late_tensors(state))
            else:
                self._write(self._flight, payload, summary)
        except BaseException:
            self._flight, self._due = None, 0
            raise
        self._stats = replace(self._stats, blocked_s=self._stats.blocked_s + time.monotonic() - began)
        return path if self.background or self._end_flight() else None

    def _start(
        self, flight: _Flight, payload: dict[str, Any], summary: dict[str, Any], late: list[Tensor]
    ) -> None:
        flight.pending = self._engine.save_in_background(
            payload,
            flight.path,
            summary=summary,
            late=late,
            attempts=self._attempts,
            on_end=functools.partial(self._settle, flight),
        )

    def _write(self, flight: _Flight, payload: dict[str, Any], summary: dict[str, Any]) -> None:
        try:
            flight.report = self._engine.save(payload, flight.path, summary=summary, attempts=self._attempts)
        except StorageError as error:
            flight.error = error
        self._settle(flight, None)

    # -- what becomes of a save ------------------------------------------------------------------------------

    def _settle(self, flight: _Flight, pending: PendingSave | None) -> None:
        """Take in how a save ended, and delete what makes way for it; on whatever thread comes first."""
        with self._settling:
            if flight.settled:
                return
            if pending is not None:
                try:
                    flight.report = pending.wait()
                except BaseException as error:
                    flight.error = error
            if flight.report is not None:
                self._files.add(flight.path)
                try:
                    flight.deleted, flight.problems = self._files.make_way(self.policy, time.time())
                except Exception as error:  # a policy of the user's own may raise anything
                    flight.problems = [f"Nothing was deleted in {self.directory}: keep= raised {error!r}."]
            flight.settled = True
            self._attention = True

    def _end_flight(self, *, saves_again: bool = False) -> bool:
        """Wait for the save that is under way, if any, and say how it ended; returns whether it is durable.

        Args:
            saves_again: What could not be copied as of one moment is saved anew right after this.

        Raises:
            Exception: the one that ended it, unless ``on_error="warn"``.
        """
        flight = self._flight
        if flight is None:
            return True
        if flight.pending is not None:
            with contextlib.suppress(Exception):
                flight.pending.wait()  # first, so that the lock is never held while it waits
            self._settle(flight, flight.pending)
            if flight.report is not None:
                flight.report = flight.pending.wait()  # with what the loop has waited since it was durable
        self._flight, self._attention = None, False
        for text in flight.problems:
            rank_zero_warn(text)
        if flight.report is not None:
            self._tell(flight, flight.report)
            return True
        assert flight.error is not None
        self._stats = replace(self._stats, failed=self._stats.failed + 1)
        self._due = 0  # what was not saved is due at once
        if saves_again and isinstance(flight.error, SnapshotChanged):
            return False  # the engine says which tensors it was
        if self.on_error != "warn" or not isinstance(flight.error, Exception):
            raise flight.error
        rank_zero_warn(
            f"{os.path.basename(flight.path)} was not saved, and training goes on without it: {flight.error}"
        )
        return False

    def _tell(self, flight: _Flight, report: SaveReport) -> None:
        """Count what a durable save did, and say it in one line."""
        self._stats = self._stats.with_durable(report, len(flight.deleted))
        tell_omissions(report.omissions)
        parts = [f"saved {os.path.basename(report.path)}", format_size(report.size_bytes)]
        parts[1] += f" in {report.durable_s:.2f} s" + (
            f" ({report.blocked_s:.3f} s of it blocked)" if report.background else ""
        )
        ranking = retention.first_ranking(self.policy)
        entry = next((one.entry for one in self._files.files if one.entry.path == report.path), None)
        if ranking is not None and entry is not None and ranking.metric in entry.metrics:
            best = ranking.best([one.entry for one in self._files.files])
            mark = " (best)" if best and best[0] is entry else ""
            parts.append(f"{ranking.metric} {format_number(entry.metrics[ranking.metric])}{mark}")
        if flight.deleted:
            parts.append(f"deleted {', '.join(flight.deleted)}")
        rank_zero_info("  ".join(parts))

    def wait(self) -> None:
        """Return when every save so far is durable.

        Raises:
            StorageError: one was refused by the disk, unless ``on_error="warn"``.
            SnapshotChanged: tensors changed while they were copied; save again.
        """
        self._end_flight()
        self._engine.wait()

    def close(self) -> None:
        """Wait, and let go of buffers and of the directory; the checkpointer can be used again afterwards.

        Raises:
            StorageError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._engine.close()
            self._files.release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:  # what ended the block is what the user has to see
            rank_zero_warn(f"The save that was under way failed as well: {failure}")

    # -- restoring -------------------------------------------------------------------------------------------

    def restore(self, state: dict[str, Any], path: str | os.PathLike[str] | None = None) -> int | None:
        """Put the newest verified checkpoint of the directory into the live objects.

        Every byte is checked, and the whole of it is compared with ``state``, before anything is written: all
        of it is restored, or nothing. A checkpoint that is damaged is passed over for the one before it, and
        named in a warning. Plain values are put back into ``state``.

        Args:
            state: As for `save`; the objects built as they were then.
            path: A certain checkpoint instead; then no other is ever taken.

        Returns:
            The step it was saved at; None if there is no checkpoint yet.

        Raises:
            CheckpointCorrupt: there are checkpoints, and not one of them is whole and verified; or ``path``
                is damaged.
            CheckpointNotFound: there is no file ``path``.
            CheckpointIncompatible: it does not fit ``state``; names the key, what was expected and found.
        """
        for _ in stateful.leaves(state):
            pass  # refuses what is no state
        self.wait()
        contents = ownership.look(self.directory)
        if path is not None:
            name = os.fspath(path)
            return self._go_on_from(state, name, _read(name, state), contents, explicit=True)
        found = newest_verified(self.directory, contents, lambda path: _read(path, state))
        if found is not None:
            self._files.damaged = found.damaged
            return self._go_on_from(state, found.path, found.read, contents, explicit=False)
        others = f" (of a Checkpointer; it has {len(contents.others)} others)" if contents.others else ""
        rank_zero_info(f"{self.directory} has no checkpoint{others} yet: starting from scratch")
        self._files.start_fresh()
        self._prepare(stateful.expected_bytes(state))
        return None

    def _prepare(self, size_bytes: int) -> None:
        """Warn where the next checkpoint will not fit, and make memory ready for snapshots."""
        free = commit.free_bytes(os.path.join(self.directory, "step"))
        if free < size_bytes:
            rank_zero_warn(
                f"A checkpoint of this state needs about {size_bytes:,} bytes, and {free:,} are free in "
                f"{self.directory}: the first save will fail. Make room, or choose another directory."
            )
        if self.background:
            self._engine.prepare(size_bytes)

    def _go_on_from(
        self, state: dict[str, Any], path: str, loaded: Loaded, contents: Contents, *, explicit: bool
    ) -> int:
        name = os.path.basename(path)
        payload = loaded.payload
        try:
            loaded.check()
            step, missing = loop_state.restore(state, payload, name, rng=self.rng)
            keys = ", ".join(key for key in payload if key != loop_state.OWN)
            size = stateful.size_bytes(payload)
        finally:
            del payload
            loaded.release()
        self._files.go_on_from(path, contents, explicit=explicit)
        self._seen, self._due = step, (step // self.every + 1) * self.every
        self._prepare(size)
        if missing:
            rank_zero_warn(f"Not restored from {name}, and as it was before: {', '.join(missing)}.")
        rank_zero_info(f"restored {name}: step {step}, {keys}")
        return step

    # -- what there is ---------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> list[Entry]:
        """The durable checkpoints of this run, oldest first; before it has saved, those of the newest run."""
        found = ownership.look(self.directory).owned
        run = self._files.run or (found[-1].run if found else "")
        return [one.entry for one in found if one.run == run]

    @property
    def newest(self) -> Entry | None:
        """The newest of `checkpoints`; None if there is none."""
        return next(reversed(self.checkpoints), None)

    @property
    def best(self) -> Entry | None:
        """The best of `checkpoints`, as the first `KeepBest` of ``keep`` ranks them; None if none is ranked.

        Raises:
            ConfigError: ``keep`` has no `KeepBest`.
        """
        ranking = retention.first_ranking(self.policy)
        if ranking is None:
            raise ConfigError(
                "best: this Checkpointer ranks nothing. Give it a metric to go by, such as "
                'keep=KeepBest(1, "val_loss") | KeepLast(3).'
            )
        return next(iter(ranking.best(self.checkpoints)), None)

    @property
    def stats(self) -> SavingStats:
        """What saving has cost, as far as `save` and `wait` have seen saves end."""
        return self._stats


def _whole(step: Any) -> int:
    try:
        number = int(step)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or number != step:
        raise ConfigError(f"save(step={step!r}): give the number of steps as a whole number, 0 or more.")
    return number


def _read(path: str, state: dict[str, Any]) -> Loaded:
    """Read and verify a file; what only modules and tensors need stays in it, and is copied out of it."""
    copied = {key for key, value in state.items() if stateful.kind_of(value) in _COPIED}
    contents = catalog.entry(path).contents
    return load_mapped(path, own=[key for key in contents if key not in copied])
