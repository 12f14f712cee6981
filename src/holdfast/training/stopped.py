"""The files of runs that were stopped: what they are called, whose they are, and when they may go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from holdfast.callbacks import lineage, naming
from holdfast.callbacks.base import SavePlan
from holdfast.callbacks.kept_checkpoints import default_directory
from holdfast.checkpoint import catalog
from holdfast.checkpoint.report import SaveReport
from holdfast.checkpoint.reserved import reserving
from holdfast.training.resume import run_directories
from holdfast.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

NAME = "stopped"


class StoppedFiles:
    """``stopped.ckpt``, beside the checkpoints of the trainer's first checkpoint callback.

    A run has an id, which is in all of its checkpoints and in the summaries of the files that it was stopped
    with. So it knows its own:

    - Another run's is never written over or deleted: ``-v1``, ``-v2`` ... come behind the name. Nor is the
      one that the user resumed from by its path, or one that is further on than the run is now.
    - Its own from an earlier life goes once a later full save of the run is durable; if a kill came between
      the two, when the run next goes on by itself from a later file.
    """

    def __init__(self) -> None:
        self.run: str | None = None
        """The id of the current or last run."""
        self._earlier: dict[str, int] = {}
        """The run's own files of before this fit, and how many batches were trained in each."""
        self._saved: dict[str, int] = {}
        """Those that this object has saved."""

    def begin(self, trainer: Trainer, resumed: dict[str, Any] | None) -> None:
        """Find out which run this is and which files are its own.

        Args:
            trainer: Whose counters and directories are restored and settled by now.
            resumed: The "holdfast" part of the checkpoint that it goes on from, or None.
        """
        run = self.run
        if resumed is not None:
            found = resumed.get("run")
            run = found if isinstance(found, str) else None
        elif trainer.progress.total_batches == 0:
            run = None
        if run != self.run or run is None:
            self._saved = {}
        self.run = trainer.strategy.broadcast(run or lineage.new_run_id())
        self._earlier = {}
        if run is None or not trainer.is_global_zero:
            return
        self._earlier = {path: at for path, at in self._saved.items() if os.path.lexists(path)}
        self._earlier.update(self._find(trainer, run, (resumed or {}).get("summary")))
        if resumed is not None and resumed.get("exact") and trainer.resumed_automatically:
            # The one that was just read and verified is as new.
            self._delete(trainer, trainer.progress.total_batches, beside=trainer.resumed_from or "")

    def _find(self, trainer: Trainer, run: str, summary: Any) -> dict[str, int]:
        places = [_directory(trainer)]
        path = trainer.resumed_from if trainer.resumed_automatically else None
        if path is not None:
            places.append(os.path.dirname(path))
        found = {}
        for place in dict.fromkeys(places):
            for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
                if name.startswith(NAME) and name.endswith(catalog.SUFFIX):
                    at = lineage.stopped_at(os.path.join(place, name), run)
                    if at is not None:
                        found[os.path.join(place, name)] = at
        if path is not None and isinstance(summary, dict):
            # Only the user's plugin can read its files; this one it has read.
            at = lineage.stopped_in(summary, os.path.basename(path), run)
            if at is not None:
                found[path] = at
        return found

    def plan(self, trainer: Trainer) -> SavePlan:
        """Choose the name: rank 0 does, for every rank."""
        assert self.run is not None
        directory, now = _directory(trainer), trainer.progress.total_batches
        plans = [getattr(callback, "_plan", None) for callback in trainer.checkpoint_callbacks]
        planned = {name for plan in plans for name in getattr(plan, "names", ())}

        def name_of(version: int | None) -> str:
            behind = "" if version is None else f"-v{version}"
            return os.path.join(directory, f"{NAME}{behind}{catalog.SUFFIX}")

        def usable(path: str) -> bool:
            if path in planned:
                return False
            if not os.path.lexists(path):
                return True
            at = self._earlier.get(path, lineage.stopped_at(path, self.run))
            return at is not None and at <= now and not lineage.is_same_file(path, _protected(trainer))

        name = ""
        if trainer.is_global_zero:
            name = naming.first_usable(name_of, reserving(usable), 1)
        name = trainer.strategy.broadcast(name)
        return SavePlan(names=(name,), summary_extra=lineage.stopped_extra(self.run, name, now))

    def saved(self, trainer: Trainer, plan: SavePlan) -> None:
        """Take note of a file of the run's own."""
        self._saved[plan.names[0]] = trainer.progress.total_batches

    def give_way(self, trainer: Trainer, report: SaveReport, batches: int) -> None:
        """Delete the run's earlier files: a full save that it can go on from exactly is durable now.

        Args:
            trainer: The trainer.
            report: What was saved.
            batches: How many batches were trained in it.
        """
        if not self._earlier:
            return
        for path in (report.path, *report.names):
            self._earlier.pop(path, None)  # it was written over
        places = run_directories(trainer)
        if any(os.path.commonpath([place, report.path]) == place for place in places):
            self._delete(trainer, batches)

    def _delete(self, trainer: Trainer, batches: int, beside: str = "") -> None:
        """Delete those of up to so many batches, but for the file ``beside``; say which they were."""
        by_plugin = trainer.strategy.own_checkpoint_io is not None
        stays = os.path.realpath(beside)
        doomed = [
            path
            for path, at in self._earlier.items()
            if at <= batches and not (beside and os.path.realpath(path) == stays)
        ]
        deleted = [
            os.path.basename(path)
            for path in doomed
            if lineage.remove(
                path,
                inside=os.path.dirname(path),
                protected=_protected(trainer),
                delete=trainer.strategy.remove_checkpoint if by_plugin else None,
            )
        ]
        for path in doomed:
            del self._earlier[path]
        if deleted:
            rank_zero_info(f"deleted {', '.join(deleted)}: the run has gone on from there, and is saved")


def _directory(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "dirpath", None) or default_directory(trainer)
    return os.path.abspath(os.fspath(path))


def _protected(trainer: Trainer) -> str | None:
    return None if trainer.resumed_automatically else trainer.resumed_from
