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

from holdfast.callbacks import lineage, monitored, naming, triggers
from holdfast.callbacks.checkpoint_spellings import takes_old_spellings
from holdfast.callbacks.checkpoint_view import rank
from holdfast.callbacks.kept_checkpoints import CheckpointPlan, local_directory
from holdfast.callbacks.named_checkpoints import NamedCheckpoints
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn
from holdfast.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from holdfast.callbacks.base import SavePlan
    from holdfast.checkpoint.report import SaveReport
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class ModelCheckpoint(NamedCheckpoints):
    """Save while training, and once a save is durable delete what it makes superfluous.

    Saves are *requested* in hooks and decided at the loop's safe point, from the values of that moment:

    - A monitored value is fresh or not used: if it was not logged anew since it was last ranked, nothing
      is ranked. A step or time interval that comes due meanwhile is made up for when validation next ends.
    - NaN never ranks above a number. A tie keeps the older.
    - ``last`` is the newest save, also when that one is not among the best. A run that ends before its
      interval was ever due saves it at its end.
    - What an exception leaves, possibly in the middle of a batch, never takes the place of a good file, and
      nothing makes way for it. The resumed run puts its own save of that name there.
    - ``best_model_path`` and its siblings change, and files are deleted, only after the newer file is
      durable. A run that is killed and resumed ends with the same files (see `KeptCheckpoints`).

    Args:
        dirpath: Where to save; default: ``checkpoints`` in the logger's version directory, or else in the
            trainer's ``default_root_dir``.
        filename: Template such as ``"{epoch:02d}-{val_loss:.2f}"``; default ``"{epoch}-{step}"``.
        monitor: The logged name to rank by; None ranks nothing and lets newer replace older.
        verbose: Say also what was not saved, and why.
        save_last: Keep the newest save under the name ``last`` too; it shares its bytes with the other
            name where the file system allows it. "link" is accepted and means the same.
        save_top_k: How many of the best to keep; -1 for all, 0 for none. None, the default of 1.0, is 1.
        save_on_exception: When an exception ends the run, save what was trained since the last save, under
            a name that no other file has. Leaving at a safe point, as a signal makes it, is no exception.
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
        background: Write while training goes on: it stands still for a snapshot only, and what is public
            here changes at the first safe point after the file is durable, before the next save and before
            training ends. Saves on an exception, of what a signal ends, and at the very end of a fit are
            always in the foreground, as are those that share a file with a callback that wants that.
        on_error: What a save that fails leads to. "raise": the error, at the next safe point; what is due by
            then is saved before. "retry": the same after three attempts, each with a new file. "warn": one
            warning, and the next save that is due tries again. Older files stay in any case.
        log_cost: Send what each save cost to the loggers, as ``checkpoint/blocked_s`` and so on. Times differ
            from run to run, and so do the logs then.

    Raises:
        ArgumentError: There is no such argument.
        ConfigError: An argument, or a combination of them, cannot work.
    """

    @takes_old_spellings
    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int | None = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        background: bool = True,
        on_error: Literal["raise", "warn", "retry"] = "raise",
        log_cost: bool = False,
    ) -> None:
        save_top_k = 1 if save_top_k is None else save_top_k
        super().__init__(
            None if dirpath is None else local_directory(dirpath, "ModelCheckpoint"),
            monitor,
            mode,
            save_top_k,
            filename=None if filename is None else os.fspath(filename),
            auto_insert_metric_name=auto_insert_metric_name,
            enable_version_counter=enable_version_counter,
        )
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
        if on_error not in ("raise", "warn", "retry"):
            raise ConfigError(f"ModelCheckpoint(on_error={on_error!r}) must be 'raise', 'warn' or 'retry'.")
        self._interval_s = None if train_time_interval is None else train_time_interval.total_seconds()
        self._every_n_train_steps, self._every_n_epochs = triggers.resolve_intervals(
            every_n_train_steps, every_n_epochs, self._interval_s
        )
        self._train_time_interval = train_time_interval
        naming.check_template(self._template)
        self.verbose = verbose
        self.save_last = save_last
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.background = background
        self.on_error = on_error
        self.log_cost = log_cost
        self._save_on_train_epoch_end = save_on_train_epoch_end

        self._asked: set[str] = set()
        self._exception = ""
        self._names_checked = False
        self._nan_said = False
        self._validated = False
        self._epoch_ended = False
        self._started_s = 0.0

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and take stock of the directory when the run goes on from a checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._started_s = time.monotonic()
        self._validated = self._epoch_ended = self._names_checked = False
        self._asked.clear()

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
        if triggers.due_at_step(step, self._triggered_step, self._every_n_train_steps):
            self._triggered_step = step
            self._request(trainer, "interval")
        elif self._interval_s is not None:
            if not triggers.due_at_time(time.monotonic(), self._started_s, self._interval_s):
                return
            self._started_s = math.inf  # until it is done
            if not triggers.posted(trainer, self):
                self.time_is_due(trainer)

    def time_is_due(self, trainer: Trainer) -> None:
        """Request a save, since the time interval is over; with several processes all do it at once."""
        self._started_s = time.monotonic()
        self._triggered_step = trainer.global_step
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
        """Request a save when epochs are judged here, or ``last`` if training ends with nothing saved."""
        self._epoch_ended = True
        due = self._judges_training_epochs(trainer) and triggers.due_at_epoch(
            trainer.current_epoch, self._every_n_epochs
        )
        if due or not self.save_last or self._saved_step or self._plan is not None:
            self._request(trainer, "interval" if due else "names")
        else:
            self._request(trainer, "end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which names were not logged, where validation, which might have, never ran."""
        if self.verbose:
            rank_zero_info(str(trainer.checkpoint_stats))
        if not self._names_checked and not trainer.fast_dev_run:
            why = ", and training ended before validation ran"
            missing = self._unlogged(monitored.candidates(trainer), why)
            if missing is not None:
                rank_zero_warn(missing)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Request a save of its own kind, if exceptions are saved or a save had come due just then."""
        due = bool(self._asked - {"names", "end"})
        self._asked = {"nothing"}
        if (self.save_on_exception or due) and trainer.state.fn == "fit":
            self._exception = type(exception).__name__
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
            outcome, self._names_checked, self._ranked_version, self._deferred = trainer.strategy.broadcast(
                (outcome, self._names_checked, self._ranked_version, self._deferred)
            )
        if isinstance(outcome, ConfigError):
            raise outcome
        self._plan = outcome
        return outcome

    def _decide(self, trainer: Trainer, asked: set[str]) -> CheckpointPlan | None:
        metrics = monitored.candidates(trainer)
        step = trainer.global_step
        if "exception" in asked:
            return self._plan_exception(trainer, metrics, step)
        if "nothing" in asked:
            return None
        self._check_names(trainer, metrics)
        only_last = "end" in asked and asked <= {"names", "end"} and self._ends_here(trainer)
        if (asked and asked <= {"names", "end"} and not only_last) or (
            step == self._saved_step and "deferred" not in asked
        ):
            return None

        before = self._view()
        undo = self._ranked_version, self._deferred
        places = 0 if only_last else self.save_top_k
        score = None if places == 0 else self._fresh_score(trainer, metrics)
        if self.monitor is not None and places != 0:
            # An interval that found nothing to rank is made up for when validation ends.
            self._deferred = score is None and self._every_n_epochs == 0
            self._tell_unranked(score, step)
        ranking = rank(before, score, monitor=self.monitor, k=places, mode=self.mode)
        claims = self._claims(trainer, step)
        names: list[str] = []
        if ranking.entered:
            names.append(self._first_usable(metrics, None, lambda path: claims.allow(path, ranking.evict)))
        if self.save_last:
            last = self._first_usable(
                metrics,
                self.CHECKPOINT_NAME_LAST,
                lambda path: path in names or claims.allow_last(path, before.last_model_path),
            )
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
                # Only a callback that is driven by hand saves before its run has begun.
                run=self._run or lineage.new_run_id(),
                names=names,
                score=score.item() if score is not None and ranking.entered else None,
            ),
            step=step,
            view=view,
            evict=tuple(path for path in evict if path and path not in kept),
            score=score,
            # Saved only because training ends: if it goes on after all, it ends another time.
            saved_step=self._saved_step if only_last else step,
            undo=undo,
            background=self.background,
            on_error=self.on_error,
            asked=frozenset(asked),
            cut_short=trainer.preemption.cut_short,
            log_step=trainer.progress.log_step if self.log_cost else 0,
        )

    def committed(self, trainer: Trainer, plan: SavePlan, report: SaveReport) -> None:
        """Publish, delete and say so; then log what it cost, where that is wanted."""
        super().committed(trainer, plan, report)
        if self.log_cost and isinstance(plan, CheckpointPlan):
            trainer.log_to_loggers(_cost(report), plan.log_step, with_epoch=False)

    def discarded(self, trainer: Trainer, plan: SavePlan) -> None:
        """Ask again, for the same reasons."""
        assert isinstance(plan, CheckpointPlan)
        self._asked |= plan.asked or {"interval"}
        trainer.request_save(self)

    def _ends_here(self, trainer: Trainer) -> bool:
        return trainer.fit_loop is not None and trainer.fit_loop.finished

    def _plan_exception(
        self, trainer: Trainer, metrics: dict[str, Tensor], step: int
    ) -> CheckpointPlan | None:
        if step == self._saved_step:
            return None
        claims = self._claims(trainer, step)
        name = self._first_usable(metrics, None, claims.allow_on_exception, counted=True)
        return CheckpointPlan(
            names=(name,),
            weights_only=self.save_weights_only,
            metrics={key: float(value) for key, value in metrics.items()},
            summary_extra=lineage.exception_extra(self.state_key, run=self._run or lineage.new_run_id()),
            step=step,
            because=self._exception,
            view=self._view(),
            saved_step=self._saved_step,
            undo=(self._ranked_version, self._deferred),
            on_error=self.on_error,
            cut_short=trainer.preemption.cut_short,
        )

    def _check_names(self, trainer: Trainer, metrics: Mapping[str, Tensor]) -> None:
        """Refuse names that were never logged, once everything that logs has had its turn."""
        everything_ran = self._epoch_ended and (self._validated or not trainer.enable_validation)
        if self._names_checked or not everything_ran:
            return
        missing = self._unlogged(metrics)
        if missing is None:
            self._names_checked = True
        elif not monitored.validation_is_off(trainer):
            raise ConfigError(missing)

    def _unlogged(self, metrics: Mapping[str, Tensor], why: str = "") -> str | None:
        templates = [(f"ModelCheckpoint(filename={self.filename!r})", self._template)]
        if self.save_last:
            last = self.CHECKPOINT_NAME_LAST
            templates.append((f"{type(self).__name__}.CHECKPOINT_NAME_LAST = {last!r}", last))
        ranks_by = None if self.save_top_k == 0 else self.monitor
        return monitored.unlogged(metrics, monitor=ranks_by, templates=templates, why=why)

    def _fresh_score(self, trainer: Trainer, metrics: Mapping[str, Tensor]) -> Tensor | None:
        """Return the monitored value, or None if there is none that was not ranked before."""
        if self.monitor is None or self.monitor not in metrics:
            return None
        version = monitored.version(trainer, self.monitor)
        if version is not None:
            if version == self._ranked_version:
                return None
            self._ranked_version = version
        score = metrics[self.monitor]
        if math.isnan(score.item()) and not self._nan_said:
            self._nan_said = True
            rank_zero_warn(
                f"{self.monitor} is NaN at step {trainer.global_step}: a checkpoint with NaN never ranks "
                "above one with a number.",
            )
        return score

    def _tell_unranked(self, score: Tensor | None, step: int) -> None:
        if self.verbose and score is None:
            rank_zero_info(f"step {step}: {self.monitor} has no value that is new, so nothing is ranked")


def _cost(report: SaveReport) -> dict[str, Tensor]:
    values = {
        "blocked_s": report.blocked_s,
        "waited_s": report.waited_s,
        "durable_s": report.durable_s,
        "size_bytes": float(report.size_bytes),
        "gb_per_s": report.gb_per_s,
    }
    return {f"checkpoint/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
