"""Save the model as it trains, and keep the best ones, the newest one, or all."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from holdfast.callbacks import lineage, naming, triggers
from holdfast.callbacks.base import STEP_OUTPUT, Checkpoint, SavePlan
from holdfast.callbacks.checkpoint_view import View, as_scalar, rank
from holdfast.callbacks.save_line import save_line
from holdfast.checkpoint.retention import Found, left_behind
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info, warn_once

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer

EXCEPTION_PREFIX = "exception"


@dataclasses.dataclass
class CheckpointPlan(SavePlan):
    """A `SavePlan` with what `ModelCheckpoint` publishes and deletes once the save is durable."""

    step: int = 0
    view: View = dataclasses.field(default_factory=View)
    evict: tuple[str, ...] = ()
    score: Tensor | None = None
    saved_step: int = 0
    undo: tuple[int | None, bool] = (None, False)


class ModelCheckpoint(Checkpoint):
    """Save while training, and once a save is durable delete what it makes superfluous.

    Saves are *requested* in hooks and decided at the loop's safe point, from the values of that moment:

    - A monitored value is fresh or not used: if it was not logged anew since it was last ranked, nothing
      is ranked. A step or time interval that comes due meanwhile is made up for when validation next ends.
    - NaN never ranks above a number. A tie keeps the older.
    - ``last`` is the newest save, also when that one is not among the best.
    - ``best_model_path`` and its siblings change, and files are deleted, only after the newer file is
      durable. Never deleted are the file that the run was resumed from by name, anything outside
      ``dirpath``, and directories.

    After a kill, the resumed run ends with the files and the attributes of a run that never stopped. Its
    own files carry the run's id (see `lineage`), and for them these rules hold:

    - Files that the checkpoint lists are looked up, in ``dirpath`` if that has moved. If one is missing or
      was overwritten since, the best are made again from the summaries of the files of up to the resumed
      step.
    - Files of *later* steps (the run was killed after writing them, or was sent back to an earlier
      checkpoint) don't count: when the run gets to that step again it writes over them.
    - Files that a kill kept from being deleted, and later ones that were not written over, go after a save
      of the resumed run is durable at their step or a later one. Until then they may be the newest there
      is, and stay.

    Args:
        dirpath: Where to save; default: ``checkpoints`` in the logger's version directory, or else in the
            trainer's ``default_root_dir``.
        filename: Template such as ``"{epoch:02d}-{val_loss:.2f}"``; default ``"{epoch}-{step}"``.
        monitor: The logged name to rank by; None ranks nothing and lets newer replace older.
        verbose: Say also what was not saved, and why.
        save_last: Keep the newest save under the name ``last`` too; it shares its bytes with the other
            name where the file system allows it. "link" is accepted and means the same.
        save_top_k: How many of the best to keep; -1 for all, 0 for none.
        save_on_exception: When an exception ends the run, save under a name of its own, if the state is
            one that can be resumed from.
        save_weights_only: Leave out everything that only resuming needs.
        mode: "min" or "max": which end of ``monitor`` is better.
        auto_insert_metric_name: Put ``name=`` before each value in the file name.
        every_n_train_steps: Save at every global step that this divides.
        train_time_interval: Save at the first batch end after this much time; decided by rank 0.
        every_n_epochs: Save after every this many epochs; the default interval, with 1.
        save_on_train_epoch_end: Save when the training epoch ends rather than when validation does;
            default: if validation runs once at the end of every epoch, or never.
        enable_version_counter: Put ``-v1``, ``-v2`` ... behind a name that another file has. If False,
            that file is overwritten.

    Raises:
        ConfigError: An argument, or a combination of them, cannot work.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        super().__init__()
        if save_top_k < -1:
            raise ConfigError(
                f"ModelCheckpoint(save_top_k={save_top_k}) means nothing: -1 keeps all, 0 none, k the best k."
            )
        if monitor is None and save_top_k not in (-1, 0, 1):
            raise ConfigError(
                f"ModelCheckpoint(save_top_k={save_top_k}) has nothing to rank by: give monitor=, the name "
                "of a logged value, or save_top_k=-1 to keep all, 0 none, 1 the newest."
            )
        if mode not in ("min", "max"):
            raise ConfigError(f"ModelCheckpoint(mode={mode!r}) must be 'min' or 'max'.")
        if save_last not in (None, True, False, "link"):
            raise ConfigError(
                f"ModelCheckpoint(save_last={save_last!r}) must be True, False, None or 'link'."
            )
        self._interval_s = None if train_time_interval is None else train_time_interval.total_seconds()
        self._every_n_train_steps, self._every_n_epochs = triggers.resolve_intervals(
            every_n_train_steps, every_n_epochs, self._interval_s
        )
        self._train_time_interval = train_time_interval
        self.dirpath = _local_directory(dirpath)
        self.filename = None if filename is None else os.fspath(filename)
        naming.template_keys(self.filename or naming.DEFAULT_TEMPLATE)
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter

        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.last_model_path = ""

        self._run: str | None = None
        self._plan: CheckpointPlan | None = None
        self._saved_step = 0
        self._triggered_step = 0
        self._ranked_version: int | None = None
        self._deferred = False
        self._asked: set[str] = set()
        self._names_checked = False
        self._validated = False
        self._epoch_ended = False
        self._started_s = 0.0
        self._leftovers: list[Found] = []
        self._state_loaded = False
        self._state_dirpath: str | None = None
        self._told_directory = False

    @property
    def state_key(self) -> str:
        """Lightning's key: the class with what tells one ModelCheckpoint from another."""
        values = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self._every_n_train_steps,
            "every_n_epochs": self._every_n_epochs,
            "train_time_interval": self._train_time_interval,
        }
        return f"{type(self).__qualname__}{values!r}"

    @property
    def every_n_epochs(self) -> int:
        """Epochs between saves; 0 when another interval is in force."""
        return self._every_n_epochs

    def uses_hook(self, name: str) -> bool:
        """Leave the batch hook out when no interval needs it: then a step costs nothing."""
        if (
            name == "on_train_batch_end"
            and type(self).on_train_batch_end is ModelCheckpoint.on_train_batch_end
        ):
            return self._every_n_train_steps >= 1 or self._interval_s is not None
        return super().uses_hook(name)

    # ---- hooks: they only request -------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the directory: rank 0 decides, every rank has it."""
        if stage == "fit":
            directory = trainer.strategy.broadcast(self.dirpath or _default_directory(trainer))
            self.dirpath = os.path.abspath(directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take stock of the directory when the run goes on from a checkpoint."""
        self._started_s = time.monotonic()
        self._validated = self._epoch_ended = self._names_checked = False
        self._asked.clear()
        resumed_from = getattr(trainer, "resumed_from", None)
        if resumed_from is not None:
            outcome = self._take_stock(trainer, resumed_from) if trainer.is_global_zero else None
            self._run, view, self._leftovers = trainer.strategy.broadcast(outcome)
            self._publish(view)
            # Where the count of logged values began anew, the old count says nothing.
            versions = getattr(trainer, "metric_versions", {})
            if self._ranked_version is not None and versions.get(self.monitor, 0) < self._ranked_version:
                self._ranked_version = None
        elif self._run is None:
            self._run = trainer.strategy.broadcast(lineage.new_run_id())
        self._state_loaded = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Request a save when the step or time interval is due."""
        step = trainer.global_step
        due = triggers.due_at_step(step, self._triggered_step, self._every_n_train_steps)
        if self._interval_s is not None:
            now_s = time.monotonic()
            late = triggers.due_at_time(now_s, self._started_s, self._interval_s)
            if trainer.world_size > 1:
                late = trainer.strategy.broadcast(late)
            if late:
                self._started_s = now_s
                due = True
        if due:
            self._triggered_step = step
            self._request(trainer, "interval")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Request a save when epochs are judged here, or when an interval waits for a fresh value."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated = True
        due = not self._judges_training_epochs(trainer) and triggers.due_at_epoch(
            trainer.current_epoch, self._every_n_epochs
        )
        self._request(trainer, "deferred" if self._deferred else "interval" if due else "names")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Request a save when epochs are judged here."""
        self._epoch_ended = True
        due = self._judges_training_epochs(trainer) and triggers.due_at_epoch(
            trainer.current_epoch, self._every_n_epochs
        )
        self._request(trainer, "interval" if due else "names")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Request a save under a name of its own, if that was asked for."""
        if self.save_on_exception and trainer.state.fn == "fit":
            self._request(trainer, "exception")

    def _request(self, trainer: Trainer, why: str) -> None:
        if trainer.fast_dev_run or trainer.sanity_checking or (why == "names" and self._names_checked):
            return
        self._asked.add(why)
        trainer.request_save(self)

    def _judges_training_epochs(self, trainer: Trainer) -> bool:
        return triggers.saves_on_train_epoch_end(
            self._save_on_train_epoch_end,
            validates=trainer.enable_validation,
            val_check_interval=trainer.val_check_interval,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        )

    # ---- the safe point -----------------------------------------------------------------------------

    def plan_save(self, trainer: Trainer) -> CheckpointPlan | None:
        """Decide on rank 0 what is saved now, and tell every rank; nothing asked for means: save.

        Raises:
            ConfigError: ``monitor`` or the file name asks for a value that was never logged, and by now
                everything that logs has run.
        """
        asked, self._asked = self._asked, set()
        outcome: CheckpointPlan | ConfigError | None = None
        if trainer.is_global_zero:
            try:
                outcome = self._decide(trainer, asked)
            except ConfigError as error:
                outcome = error
        if trainer.world_size > 1:
            outcome, bookkeeping = trainer.strategy.broadcast((outcome, self._bookkeeping()))
            self._names_checked, self._ranked_version, self._deferred = bookkeeping
        if isinstance(outcome, ConfigError):
            raise outcome
        self._plan = outcome
        return outcome

    def committed(self, trainer: Trainer, plan: SavePlan, report: Any) -> None:
        """Publish, let the loggers have the file, delete what has to go, and say so in one line."""
        assert isinstance(plan, CheckpointPlan)
        before, self._plan = self._view(), None
        self._publish(plan.view)
        self._saved_step = plan.saved_step
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)
        deleted = self._delete(trainer, plan)
        if not self._told_directory:
            self._told_directory = True
            rank_zero_info(f"checkpoints go to {self.dirpath}")
        rank_zero_info(
            save_line(
                plan.names,
                step=plan.step,
                size_bytes=report.size_bytes,
                seconds=report.durable_s,
                monitor=self.monitor,
                score=None if plan.score is None else plan.score.item(),
                before=before,
                after=plan.view,
                save_top_k=self.save_top_k,
                deleted=deleted,
            )
        )

    def rolled_back(self, trainer: Trainer, plan: SavePlan) -> None:
        """Forget the plan; what is published still is what is on disk."""
        assert isinstance(plan, CheckpointPlan)
        self._plan = None
        self._ranked_version, self._deferred = plan.undo

    def _decide(self, trainer: Trainer, asked: set[str]) -> CheckpointPlan | None:
        metrics = self._candidates(trainer)
        step = trainer.global_step
        if "exception" in asked:
            return self._plan_exception(trainer, metrics, step)
        self._check_names(trainer, metrics)
        if asked == {"names"} or (step == self._saved_step and "deferred" not in asked):
            return None

        before = self._view()
        undo = self._ranked_version, self._deferred
        score = self._fresh_score(trainer, metrics)
        if self.monitor is not None and self.save_top_k != 0:
            # An interval that found nothing to rank is made up for when validation ends.
            self._deferred = score is None and self._every_n_epochs == 0
            self._tell_unranked(score, step)
        ranking = rank(before, score, monitor=self.monitor, k=self.save_top_k, mode=self.mode)
        names = []
        if ranking.entered:
            names.append(self._choose_name(trainer, metrics, step, before, ranking.evict))
        if self.save_last:
            last = self._choose_last(trainer, metrics, before, names)
            if last not in names:
                names.append(last)
        if not names:
            return None
        view = ranking.after(names[0] if ranking.entered else None, score, self.mode)
        evict = list(ranking.evict)
        if self.save_last:
            view = dataclasses.replace(view, last_model_path=last)
            evict.append(before.last_model_path)
        kept = {*view.paths(), *names}
        return CheckpointPlan(
            names=tuple(names),
            weights_only=self.save_weights_only,
            metrics={key: float(value) for key, value in metrics.items()},
            summary_extra=lineage.summary_extra(
                self.state_key,
                run=self._run,
                name=names[0],
                score=score.item() if score is not None and ranking.entered else None,
            ),
            step=step,
            view=view,
            evict=tuple(path for path in evict if path and path not in kept),
            score=score,
            saved_step=step,
            undo=undo,
        )

    def _plan_exception(
        self, trainer: Trainer, metrics: dict[str, Tensor], step: int
    ) -> CheckpointPlan | None:
        if step == self._saved_step:
            return None

        def name_of(version: int | None) -> str:
            stem = naming.format_checkpoint_name(
                naming.DEFAULT_TEMPLATE,
                metrics,
                prefix=EXCEPTION_PREFIX,
                ver=version,
                join_char=self.CHECKPOINT_JOIN_CHAR,
                equals_char=self.CHECKPOINT_EQUALS_CHAR,
            )
            return os.path.join(self.dirpath or "", stem + self.FILE_EXTENSION)

        name = naming.first_usable(name_of, lambda path: not os.path.lexists(path), self.STARTING_VERSION)
        return CheckpointPlan(
            names=(name,),
            weights_only=self.save_weights_only,
            metrics={key: float(value) for key, value in metrics.items()},
            # Without the run's id: such a file is never ranked, overwritten or swept up.
            summary_extra=lineage.summary_extra(self.state_key, run=None, name=name, score=None),
            step=step,
            view=self._view(),
            saved_step=self._saved_step,
            undo=(self._ranked_version, self._deferred),
        )

    def _candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        metrics = {name: as_scalar(value) for name, value in trainer.callback_metrics.items()}
        for name, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            logged = metrics.get(name)
            metrics[name] = torch.tensor(value if logged is None else int(logged.item()))
        return metrics

    def _check_names(self, trainer: Trainer, metrics: Mapping[str, Tensor]) -> None:
        """Refuse names that were never logged, once everything that logs has had its turn."""
        everything_ran = self._epoch_ended and (self._validated or not trainer.enable_validation)
        if self._names_checked or not everything_ran:
            return
        if self.monitor is not None and self.monitor not in metrics:
            raise ConfigError(
                f"ModelCheckpoint(monitor={self.monitor!r}) has nothing to go by: no such value was logged."
                f"{naming.nearest(self.monitor, metrics)}"
            )
        for key in self._template_keys():
            if key not in metrics:
                raise ConfigError(
                    f"ModelCheckpoint(filename={self.filename!r}) asks for {key!r}: no such value was logged."
                    f"{naming.nearest(key, metrics)}"
                )
        self._names_checked = True

    def _fresh_score(self, trainer: Trainer, metrics: Mapping[str, Tensor]) -> Tensor | None:
        """Return the monitored value, or None if there is none that was not ranked before."""
        if self.monitor is None or self.save_top_k == 0 or self.monitor not in metrics:
            return None
        versions: Mapping[str, int] | None = getattr(trainer, "metric_versions", None)
        if versions is not None and self.monitor in trainer.callback_metrics:
            version = versions.get(self.monitor, 0)
            if version == self._ranked_version:
                return None
            self._ranked_version = version
        score = metrics[self.monitor]
        if math.isnan(score.item()):
            warn_once(
                ("ModelCheckpoint", "nan", self.state_key),
                f"{self.monitor} is NaN at step {trainer.global_step}: a checkpoint with NaN never ranks "
                "above one with a number.",
            )
        return score

    def _tell_unranked(self, score: Tensor | None, step: int) -> None:
        if self.verbose and score is None:
            rank_zero_info(f"step {step}: {self.monitor} has no value that is new, so nothing is ranked")

    # ---- names --------------------------------------------------------------------------------------

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """Fill the template: the path in ``dirpath``, with the extension.

        Args:
            metrics: A number or 0-dim tensor per name.
            filename: The template; default: this callback's.
            ver: A version to put behind, as ``-v1``.
            prefix: A text to put in front.

        Raises:
            ConfigError: The template asks for a name that is not in ``metrics``.
        """
        name = naming.format_checkpoint_name(
            filename or self.filename or naming.DEFAULT_TEMPLATE,
            metrics,
            auto_insert_metric_name=self.auto_insert_metric_name,
            prefix=prefix,
            ver=ver,
            join_char=self.CHECKPOINT_JOIN_CHAR,
            equals_char=self.CHECKPOINT_EQUALS_CHAR,
        )
        return os.path.join(self.dirpath or "", name + self.FILE_EXTENSION)

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Tell whether the file exists, as rank 0 sees it."""
        return bool(trainer.strategy.broadcast(os.path.exists(filepath)))

    def _template_keys(self) -> list[str]:
        last = self.CHECKPOINT_NAME_LAST if self.save_last else ""
        return naming.template_keys(self.filename or naming.DEFAULT_TEMPLATE) + naming.template_keys(last)

    def _choose_name(
        self, trainer: Trainer, metrics: dict[str, Tensor], step: int, before: View, evict: tuple[str, ...]
    ) -> str:
        protected = _protected(trainer)
        free = {path for path in evict if not lineage.is_same_file(path, protected)}
        used = before.paths()

        def mine_to_overwrite(path: str) -> bool:
            if path in used or lineage.is_same_file(path, protected):
                return False
            found = lineage.describe(path)
            if found is None or self._run is None or found.run != self._run:
                return False
            return found.step >= step or self.save_top_k != -1

        return self._first_usable(
            metrics, None, lambda path: path in free or not os.path.lexists(path) or mine_to_overwrite(path)
        )

    def _choose_last(
        self, trainer: Trainer, metrics: dict[str, Tensor], before: View, names: list[str]
    ) -> str:
        used = before.paths() - {before.last_model_path}

        def usable(path: str) -> bool:
            if path in names or path == before.last_model_path or not os.path.lexists(path):
                return True
            found = None if path in used else lineage.describe(path)
            return found is not None and self._run is not None and found.run == self._run

        return self._first_usable(metrics, self.CHECKPOINT_NAME_LAST, usable)

    def _first_usable(self, metrics: dict[str, Tensor], filename: str | None, usable: Any) -> str:
        # Before everything that logs has run, a name without a value yet is not a mistake.
        blanks = {key: torch.tensor(math.nan) for key in self._template_keys() if key not in metrics}

        def name_of(version: int | None) -> str:
            return os.path.abspath(self.format_checkpoint_name({**blanks, **metrics}, filename, ver=version))

        if not self._enable_version_counter:
            return name_of(None)
        return naming.first_usable(name_of, usable, self.STARTING_VERSION)

    # ---- what is there, and what goes ----------------------------------------------------------------

    def _delete(self, trainer: Trainer, plan: CheckpointPlan) -> list[str]:
        kept = {*plan.view.paths(), *plan.names}
        doomed = [path for path in plan.evict if path not in kept]
        if self._leftovers and self._run is not None and self.save_top_k != -1:
            doomed += left_behind(self._leftovers, run=self._run, step=plan.step, keep={*kept, *doomed})
        self._leftovers = [found for found in self._leftovers if found.step > plan.step]
        protected = _protected(trainer)
        return [
            path for path in doomed if lineage.remove(path, inside=self.dirpath or "", protected=protected)
        ]

    def _take_stock(self, trainer: Trainer, resumed_from: str) -> tuple[str, View, list[Found]]:
        """Set what the checkpoint remembers against what the directory holds."""
        assert self.dirpath is not None
        recursive = "/" in (self.filename or "")
        present = self._view()
        found = lineage.describe_all(self.dirpath, also=present.paths(), recursive=recursive)
        run = self._run if self._state_loaded else None
        if run is None:
            origin = lineage.describe(resumed_from)
            run = (origin.run if origin is not None else None) or lineage.new_run_id()
        view = present.relocated(
            found,
            directory=self.dirpath,
            moved_from=self._state_dirpath or self.dirpath,
            run=run,
            step=trainer.global_step,
            k=self.save_top_k if self.monitor is not None else 0,
            mode=self.mode,
            complete=self._state_loaded,
        )
        return run, view, [one for one in found.values() if one.run == run]

    # ---- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as of after the planned save, or as published when none is planned."""
        view = self._view() if self._plan is None else self._plan.view
        saved_step = self._saved_step if self._plan is None else self._plan.saved_step
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
            "saved_step": saved_step,
            "triggered_step": self._triggered_step,
            "ranked_version": self._ranked_version,
            "deferred": self._deferred,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back; what it says about files is checked when training starts."""
        self._publish(View.from_state(state_dict, self._view()))
        self._run = state_dict.get("run")
        self._saved_step = int(state_dict.get("saved_step", 0))
        self._triggered_step = int(state_dict.get("triggered_step", 0))
        self._ranked_version = state_dict.get("ranked_version")
        self._deferred = bool(state_dict.get("deferred", False))
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

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write ``best_k_models`` as YAML, path to score; default: ``best_k_models.yaml`` in ``dirpath``."""
        import yaml

        path = os.path.join(self.dirpath or "", "best_k_models.yaml") if filepath is None else filepath
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump({name: score.item() for name, score in self.best_k_models.items()}, file)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Tell whether a checkpoint with the score ``current`` would be among the best now."""
        if current is None or self.save_top_k == 0:
            return False
        return rank(self._view(), current, monitor=self.monitor, k=self.save_top_k, mode=self.mode).entered

    def _bookkeeping(self) -> tuple[bool, int | None, bool]:
        return self._names_checked, self._ranked_version, self._deferred

    def _view(self) -> View:
        return View(**{field.name: getattr(self, field.name) for field in dataclasses.fields(View)})

    def _publish(self, view: View) -> None:
        for field in dataclasses.fields(View):
            setattr(self, field.name, getattr(view, field.name))


def _protected(trainer: Trainer) -> str | None:
    """Name the file that the user resumed from; one that the run found by itself is a file like any other."""
    if getattr(trainer, "resumed_automatically", False):
        return None
    path: str | None = getattr(trainer, "resumed_from", None)
    return path


def _local_directory(dirpath: str | os.PathLike[str] | None) -> str | None:
    if dirpath is None:
        return None
    path = os.fspath(dirpath)
    if "://" in path and not path.startswith("file://"):
        raise ConfigError(
            f"ModelCheckpoint(dirpath={path!r}) is not a local directory: give one, and copy what is in it."
        )
    return os.path.realpath(os.path.expanduser(path.removeprefix("file://")))


def _default_directory(trainer: Trainer) -> str:
    if not trainer.loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    root = logger.save_dir or trainer.default_root_dir
    return os.path.join(root, str(logger.name or ""), version, "checkpoints")
