"""The files that a checkpoint callback keeps: what it publishes of them, its state, and what it deletes."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.callbacks import lineage
from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.callbacks.checkpoint_view import View, rank, worst_score
from holdfast.callbacks.save_line import save_line
from holdfast.checkpoint import catalog, commit, reserved
from holdfast.checkpoint.checkpoint_io import writes_own_format
from holdfast.checkpoint.retention import Found, left_behind
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


@dataclasses.dataclass
class CheckpointPlan(SavePlan):
    """A `SavePlan` with what is published and deleted once the save is durable.

    Args:
        step: The global step of the save.
        view: What is published after it.
        evict: Paths that make way for it.
        score: The value that it was ranked on; None if it wasn't.
        saved_step: The step that the next save must differ from.
        undo: The bookkeeping of before, in case the save fails.
        because: The exception that it was saved on, if any.
        asked: Why it was asked for, in case it has to be asked for again.
        cut_short: Nothing is deleted for it: with more time the run goes on from before this, where those
            were still the best.
        log_step: Where it is on the loggers' axis.
    """

    step: int = 0
    view: View = dataclasses.field(default_factory=View)
    evict: tuple[str, ...] = ()
    score: Tensor | None = None
    saved_step: int = 0
    undo: tuple[int | None, bool] = (None, False)
    because: str = ""
    asked: frozenset[str] = frozenset()
    cut_short: bool = False
    log_step: int = 0


class KeptCheckpoints(Checkpoint):
    """Keep track of a run's checkpoints, so that it ends with the files of a run that was never killed.

    What is public here shows what is on disk: it changes, and files are deleted, only after the newer file
    is durable. Never deleted are the file that the user resumed from, anything outside ``dirpath``, and
    directories.

    The run's own files carry its id (see `lineage`). When it goes on after a kill:

    - Files that the checkpoint lists are looked up, in ``dirpath`` if that has moved. If one is missing or
      was overwritten since, the best are made again from the summaries of the files of up to the resumed
      step.
    - Files of *later* steps (the run was killed after writing them, or was sent back to an earlier
      checkpoint) don't count. When the run gets to that step again it writes over them.
    - A name that a kill kept from being given, such as ``last``, is given.
    - Files that a kill kept from being deleted go when the run goes on from a later file that it found by
      itself, and otherwise after its first save.
    - Files of later steps that were not written over go after a save of the resumed run is durable at their
      step or a later one. Until then they may be the newest there is, and stay.
    """

    FILE_EXTENSION = catalog.SUFFIX

    def __init__(self, dirpath: str | None, monitor: str | None, mode: str, save_top_k: int) -> None:
        super().__init__()
        self.dirpath = dirpath
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value: Tensor = torch.tensor(worst_score(mode))
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.last_model_path = ""

        self._run: str | None = None
        self._plan: CheckpointPlan | None = None
        self._saved_step = 0
        self._triggered_step = 0
        self._ranked_version: int | None = None
        self._deferred = False
        self._leftovers: list[Found] = []
        self._evict: list[str] = []
        self._state_loaded = self._took_stock = False
        self._state_dirpath: str | None = None
        self._told_directory = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the directory: rank 0 decides, every rank has it."""
        if stage == "fit":
            chosen = self.dirpath or (default_directory(trainer) if trainer.is_global_zero else "")
            directory = trainer.strategy.broadcast(chosen)
            self.dirpath = os.path.abspath(directory)
            self._took_stock = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take stock for a run that was already done when it was resumed: no training starts in it."""
        if trainer.resumed_from is not None and not self._took_stock:
            KeptCheckpoints.on_train_start(self, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take stock of the directory when the run goes on from a checkpoint."""
        self._took_stock = True
        resumed_from = trainer.resumed_from
        if resumed_from is not None:
            stock = self._take_stock(trainer, resumed_from) if trainer.is_global_zero else (None, None, [])
            self._run, view, self._leftovers = trainer.strategy.broadcast(stock)
            assert view is not None
            self._publish(view)
            if trainer.is_global_zero and _protected(trainer) is None:
                # What is older than the checkpoint that was just read and verified is the newest nowhere.
                kept = {*view.paths(), resumed_from}
                deleted = self._sweep(trainer, before_step=trainer.global_step, keep=kept)
                if writes_own_format(trainer.strategy.own_checkpoint_io):
                    # Whose a file is only the plugin can tell, but these are known to have made way.
                    evicted = [path for path in self._evict if path not in kept and os.path.lexists(path)]
                    deleted += [path for path in evicted if self._remove(trainer, path)]
                if deleted:
                    names = ", ".join(os.path.basename(path) for path in deleted)
                    rank_zero_info(f"deleted {names}, which a kill had kept from being deleted")
        elif self._run is None or trainer.global_step == 0:
            # What this callback saved before, for another trainer, is none of the new run's.
            self._run = trainer.strategy.broadcast(lineage.new_run_id())
            self._leftovers = []
            self._saved_step = self._triggered_step = 0
            self._ranked_version, self._deferred = None, False
        # Where the count of logged values began anew, the old count says nothing.
        logged = trainer.metric_versions.get(self.monitor or "", 0)
        if self._ranked_version is not None and logged < self._ranked_version:
            self._ranked_version = None
        self._state_loaded = False

    def committed(self, trainer: Trainer, plan: SavePlan, report: Any) -> None:
        """Publish, let the loggers have the file, delete what has to go, and say so in one line."""
        assert isinstance(plan, CheckpointPlan)
        before, self._plan = self._view(), None
        reserved.give_up(plan.names)
        self._publish(plan.view)
        self._saved_step = plan.saved_step
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)
        deleted = self._delete(trainer, plan)
        trainer.checkpoint_stats.deleted += len(deleted)
        if not self._told_directory:
            self._told_directory = True
            rank_zero_info(f"checkpoints go to {self.dirpath}")
        rank_zero_info(
            save_line(
                plan.names,
                step=plan.step,
                report=report,
                monitor=self.monitor,
                score=None if plan.score is None else plan.score.item(),
                before=before,
                after=plan.view,
                save_top_k=self.save_top_k,
                deleted=deleted,
                because=plan.because,
            )
        )

    def rolled_back(self, trainer: Trainer, plan: SavePlan) -> None:
        """Forget the plan; what is published still is what is on disk."""
        assert isinstance(plan, CheckpointPlan)
        self._plan = None
        reserved.give_up(plan.names)
        self._ranked_version, self._deferred = plan.undo

    def state_dict(self) -> dict[str, Any]:
        """Return the state as of after the planned save, or as published when none is planned."""
        view = self._view() if self._plan is None else self._plan.view
        return {
            "monitor": self.monitor,
            "best_model_score": view.best_model_score,
            "best_model_path": view.best_model_path,
            "current_score": view.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(view.best_k_models),
            "kth_best_model_path": view.kth_best_model_path,
            "kth_value": view.kth_value,
            "last_model_path": view.last_model_path,
            "run": self._run,
            "saved_step": self._saved_step if self._plan is None else self._plan.saved_step,
            "triggered_step": self._triggered_step,
            "ranked_version": self._ranked_version,
            "deferred": self._deferred,
            "evict": [] if self._plan is None else list(self._plan.evict),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back; what it says about files is checked when training starts."""
        self._publish(View.from_state(state_dict, self._view()))
        self._run = state_dict.get("run")
        self._saved_step = int(state_dict.get("saved_step", 0))
        self._triggered_step = int(state_dict.get("triggered_step", 0))
        self._ranked_version = state_dict.get("ranked_version")
        self._deferred = bool(state_dict.get("deferred", False))
        self._evict = list(state_dict.get("evict", ()))
        self._plan = None
        self._state_loaded = True
        self._state_dirpath = state_dict.get("dirpath")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adopt the state of the same monitor and mode when only the interval was changed."""
        states = checkpoint.get("callbacks") or {}
        if self.state_key in states:
            return
        taken = {callback.state_key for callback in trainer.checkpoint_callbacks}
        same = f"{type(self).__qualname__}{{'monitor': {self.monitor!r}, 'mode': {self.mode!r},"
        for key, state in states.items():
            if isinstance(key, str) and key.startswith(same) and key not in taken:
                self.load_state_dict(state)
                return

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Tell whether the file exists, as rank 0 sees it."""
        return bool(trainer.strategy.broadcast(os.path.exists(filepath)))

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Tell whether a checkpoint with the score ``current`` would be among the best now."""
        if current is None or self.save_top_k == 0:
            return False
        return rank(self._view(), current, monitor=self.monitor, k=self.save_top_k, mode=self.mode).entered

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write ``best_k_models`` as YAML, path to score; default: ``best_k_models.yaml`` in ``dirpath``."""
        import yaml

        path = os.path.join(self.dirpath or "", "best_k_models.yaml") if filepath is None else filepath
        text = yaml.safe_dump({name: score.item() for name, score in self.best_k_models.items()})
        with commit.replacing(os.fspath(path)) as replacement:
            commit.write_all(replacement.fd, text.encode())

    def _claims(self, trainer: Trainer, step: int) -> lineage.Claims:
        others = (one for one in trainer.checkpoint_callbacks if isinstance(one, KeptCheckpoints))
        plans = (one._plan for one in others if one is not self and one._plan is not None)
        return lineage.Claims(
            run=self._run,
            step=step,
            used=frozenset(self._view().paths()),
            reserved=frozenset(name for plan in plans for name in plan.names),
            protected=_protected(trainer),
            keeps_all=self.save_top_k == -1,
        )

    def _delete(self, trainer: Trainer, plan: CheckpointPlan) -> list[str]:
        if plan.cut_short:
            return []
        kept = {*plan.view.paths(), *plan.names}
        doomed = [path for path in plan.evict if path not in kept]
        deleted = [path for path in doomed if self._remove(trainer, path)]
        return deleted + self._sweep(trainer, before_step=plan.step + 1, keep=kept)

    def _remove(self, trainer: Trainer, path: str) -> bool:
        by_plugin = trainer.strategy.own_checkpoint_io is not None
        return lineage.remove(
            path,
            inside=self.dirpath or "",
            protected=_protected(trainer),
            delete=trainer.strategy.remove_checkpoint if by_plugin else None,
        )

    def _sweep(self, trainer: Trainer, *, before_step: int, keep: set[str]) -> list[str]:
        """Delete what earlier lives of the run left behind, of steps before ``before_step``."""
        if not self._leftovers or self._run is None or self.save_top_k == -1:
            return []
        doomed = left_behind(self._leftovers, run=self._run, before_step=before_step, keep=keep)
        self._leftovers = [found for found in self._leftovers if found.step >= before_step]
        return [path for path in doomed if self._remove(trainer, path)]

    def _take_stock(self, trainer: Trainer, resumed_from: str) -> tuple[str, View, list[Found]]:
        """Set what the checkpoint remembers against what the directory holds."""
        assert self.dirpath is not None
        present = self._view()
        run = self._run if self._state_loaded else None
        if writes_own_format(trainer.strategy.own_checkpoint_io):
            # Only the user's plugin can read what is there: what the checkpoint remembers stands.
            return run or lineage.new_run_id(), present, []
        found = lineage.describe_all(
            self.dirpath,
            also=present.paths(),
            recursive=self._has_subdirectories(),
            suffix=self.FILE_EXTENSION,
            run=run,
        )
        if run is None:
            origin = lineage.describe(resumed_from)
            run = (origin.run if origin is not None else None) or lineage.new_run_id()
        if _protected(trainer) is None:
            stayed = self._state_dirpath in (None, self.dirpath)
            directory = self.dirpath if stayed else os.path.dirname(resumed_from)
            given = lineage.give_missing_names(resumed_from, run, trainer.global_step, directory)
            found.update(lineage.describe_all("", also=given, run=run))
        view = present.relocated(
            found,
            directory=self.dirpath,
            moved_from=self._state_dirpath or self.dirpath,
            run=run,
            step=trainer.global_step,
            k=self.save_top_k if self.monitor is not None else 0,
            mode=self.mode,
            complete=self._state_loaded,
            written_since=lineage.written_since(resumed_from, found, trainer.global_step),
        )
        return run, view, [one for one in found.values() if one.run == run]

    def _has_subdirectories(self) -> bool:
        return False

    def _view(self) -> View:
        return View(**{field.name: getattr(self, field.name) for field in dataclasses.fields(View)})

    def _publish(self, view: View) -> None:
        for field in dataclasses.fields(View):
            setattr(self, field.name, getattr(view, field.name))


def _protected(trainer: Trainer) -> str | None:
    """Name the file that the user resumed from; one that the run found by itself is a file like any other."""
    return None if trainer.resumed_automatically else trainer.resumed_from


def local_directory(dirpath: str | os.PathLike[str], who: str) -> str:
    """Return the absolute path of the directory that the callback ``who`` was given.

    Raises:
        ConfigError: It is an address, not a local directory.
    """
    path = os.fspath(dirpath)
    if "://" in path and not path.startswith("file://"):
        raise ConfigError(
            f"{who}(dirpath={path!r}) is not a local directory: give one, and copy what is in it."
        )
    return os.path.realpath(os.path.expanduser(path.removeprefix("file://")))


def default_directory(trainer: Trainer) -> str:
    """Return ``checkpoints`` in the first logger's version directory, or else in the root directory."""
    return os.path.join(*version_directory(trainer), "checkpoints")


def version_directory(trainer: Trainer) -> tuple[str, str]:
    """Return the directory of the first logger's experiment and, in it, the name of its version's.

    Without a logger, or one that has no version, the name is "".
    """
    instead = trainer.weights_save_path
    if not trainer.loggers:
        return instead or trainer.default_root_dir, ""
    logger = trainer.loggers[0]
    version = logger.version
    if version is not None and not isinstance(version, str):
        version = f"version_{version}"
    root = instead or logger.save_dir or trainer.default_root_dir
    return os.path.join(root, str(logger.name or "")), version or ""
