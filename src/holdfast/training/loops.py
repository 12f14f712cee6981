"""The fit loop: epochs, batches, and the two kinds of safe point at which a checkpoint can be taken.

A safe point lies after all hooks of a batch (and again after the validation that followed it), or after all
hooks and schedulers of an epoch. Hooks and callbacks only request; nothing is saved anywhere else. A resumed
run enters exactly behind the safe point that its checkpoint was taken at.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Checkpoint
from holdfast.callbacks.early_stopping import EarlyStopping
from holdfast.training import agreed, ended, estimate, exactness, rng, state
from holdfast.training.combined import CombinedStream
from holdfast.training.configured import step_schedulers
from holdfast.training.data import BatchStream, batch_size_of
from holdfast.training.evaluation import EvaluationLoop
from holdfast.training.fit_data import FitData
from holdfast.training.hooks import bind, call, may_log, profile, profiled
from holdfast.training.in_flight import beside_batches, leave_batches
from holdfast.training.loop_view import LoopView
from holdfast.training.model_changes import ModelChanges
from holdfast.training.optimization import make_optimization
from holdfast.training.progress import BATCH, END, START, VALIDATED, RunningStage
from holdfast.training.saving import end_of_fit
from holdfast.training.transfer import make_transfer
from holdfast.training.validation_schedule import Stopwatch
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_NO_BATCH = object()


class FitLoop(LoopView):
    """Trains until a limit is reached; made anew for every fit.

    Args:
        trainer: The trainer.
        load_train: Gives the training loader; called when it is needed first.
        load_val: Gives the validation loader or loaders; likewise.
        resumed: The "holdfast" part of the checkpoint that the run goes on from, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        load_train: Callable[[], Any],
        load_val: Callable[[], Any],
        resumed: dict[str, Any] | None,
    ) -> None:
        self.trainer = trainer
        self.progress = trainer.progress
        self.data = FitData(trainer, load_train, load_val, resumed)
        self._resumed = resumed
        self.stopwatch: Stopwatch | None = None
        self.command: dict[str, Any] = {}
        """What the fit was started with; see `command.note`."""
        self.in_force: dict[str, Any] = {}
        """What a checkpoint's state has put in the place of that; see `command.in_force`."""
        self.changes: ModelChanges | None = None
        """What training changes of the model besides its state_dict; watched once the model is set up."""

    def setup_data(self) -> None:
        """Make the training loader and count its batches; does nothing the second time."""
        self.data.setup()

    @property
    def stream(self) -> BatchStream | CombinedStream | None:
        """The training data; None until it was needed."""
        return self.data.stream

    @property
    def batches(self) -> int | float:
        """Training batches in an epoch; infinite before the loader is there, or where it cannot tell."""
        return self.data.batches

    @property
    def validation(self) -> EvaluationLoop | None:
        """The validation loop; None until it was needed."""
        return self.data.validation

    @property
    def validation_interval(self) -> int | float:
        """Training batches between validation runs; infinite where only the end of the data can tell."""
        return self.data.validation_interval

    @functools.cached_property
    def transfer(self) -> Callable[[Any, int], Any] | None:
        """What brings a batch to the device; None where there is nothing to do."""
        return make_transfer(self.trainer)

    def validation_state(self) -> list[dict[str, Any]] | None:
        """What validation's loaders draw their next run from, besides the generators that each run seeds."""
        return self.data.state_of_validation()

    def close(self) -> None:
        """Stop the loaders' worker processes."""
        self.data.close()

    # -- the run ---------------------------------------------------------------------------------------------

    def sanity_check(self) -> None:
        """A few validation batches before training, on seeds of their own, leaving no metric behind."""
        trainer = self.trainer
        if not trainer.enable_validation or not trainer.num_sanity_val_steps or self._resumed is not None:
            return
        limit = trainer.num_sanity_val_steps
        trainer.state.stage = RunningStage.SANITY_CHECKING
        call(trainer, "on_sanity_check_start", only="callbacks")
        validation = self.data.make_validation()
        validation.stage = RunningStage.SANITY_CHECKING
        with rng.apart(rng.derive(trainer.seed, "sanity check")):
            validation.run(0, float("inf") if limit == -1 else limit)
        call(trainer, "on_sanity_check_end", only="callbacks")
        trainer.metrics.forget()
        validation.stage = RunningStage.VALIDATING

    @property
    def finished(self) -> bool:
        """Nothing is left to train, before or after any epoch."""
        trainer, progress = self.trainer, self.progress
        if trainer.max_steps != -1 and progress.global_step >= trainer.max_steps:
            return True
        epochs_done = progress.epoch + (1 if progress.stage == END else 0)
        if trainer.max_epochs is not None and trainer.max_epochs != -1 and epochs_done >= trainer.max_epochs:
            return True
        return trainer.should_stop and self.may_stop()

    def may_stop(self) -> bool:
        """Whether ``min_epochs`` and ``min_steps`` are done."""
        trainer, progress = self.trainer, self.progress
        epochs_done = progress.epoch + (progress.stage == END)
        return epochs_done >= (trainer.min_epochs or 0) and progress.global_step >= (trainer.min_steps or 0)

    def _epoch_has_to_end(self) -> bool:
        """Whether the run was killed after its last batch, and before the end of that batch's epoch."""
        progress = self.progress
        mid_epoch = self._resumed is not None and progress.stage in (BATCH, VALIDATED)
        # With another max_epochs or max_steps than then, it is a run that had trained on.
        return mid_epoch and progress.limits[:2] == state.limits_of(self.trainer)[:2]

    def run(self) -> None:
        """Train from where the progress stands until a limit is reached."""
        trainer, progress = self.trainer, self.progress
        progress.loaders = self.data.asked  # what a checkpoint brought is in it by now
        if trainer.limit_train_batches == 0 or trainer.max_epochs == 0 or trainer.max_steps == 0:
            return
        only_ends = self.finished and self._epoch_has_to_end()
        if self.finished and not only_ends:
            self.setup_data()
            rank_zero_info(ended.why_finished(trainer))
            self._stand_where_it_ended()
            return
        self.setup_data()
        if self.batches == 0:
            rank_zero_warn("The training loader has no batches: nothing is trained.")
            return
        trainer.state.stage = RunningStage.TRAINING
        if trainer.enable_validation and not self.data.validation_waits:
            self.data.make_validation()
        exactness.before_first_batch(trainer, self._resumed)
        # On a resume it is called anew, and so are its logs.
        trainer.metrics.train.drop("on_train_start")
        call(trainer, "on_train_start")
        trainer.metrics.show_start()
        self._prepare()
        estimate.before_first_batch(trainer)
        trainer.preemption.leave_untrained(trainer)
        while only_ends or not self.finished:  # a hook may have said to stop already
            only_ends = False
            with profile(trainer, "run_training_epoch"):
                self._run_epoch()
        call(trainer, "on_train_end")

    def _stand_where_it_ended(self) -> None:
        """Put back all that a finished run's checkpoint holds, so that it can be saved again as it is."""
        progress, resumed, self._resumed = self.progress, self._resumed, None
        self.trainer.batch_idx = max(progress.batch - 1, 0)
        if self.trainer.enable_validation and not self.data.validation_waits:
            self.data.make_validation()
        if resumed is not None and progress.stage in (BATCH, VALIDATED):
            self._resume_in_epoch(resumed, nothing_left=True)
        elif resumed is not None:
            self._resume_between_epochs(resumed)

    def _prepare(self) -> None:
        """Look up once all that the steps of this fit need."""
        trainer = self.trainer
        if isinstance(trainer.val_check_interval, timedelta):
            self.stopwatch = agreed.stopwatch(trainer, trainer.val_check_interval)
        self.optimization = make_optimization(trainer)
        self.batch_starts = bind(trainer, "on_train_batch_start")
        self.batch_ends = bind(trainer, "on_train_batch_end")
        automatic = trainer.lightning_module.automatic_optimization
        configs = trainer.lr_scheduler_configs if automatic else []
        self.step_schedules = any(c.interval == "step" and not c.reduce_on_plateau for c in configs)
        self.step_plateaus = any(c.interval == "step" and c.reduce_on_plateau for c in configs)
        self.epoch_schedules = any(c.interval == "epoch" and not c.reduce_on_plateau for c in configs)
        self.epoch_plateaus = any(c.interval == "epoch" and c.reduce_on_plateau for c in configs)

    # -- an epoch --------------------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        resumed, self._resumed = self._resumed, None
        progress.cut_short = False
        mid_epoch = resumed is not None and progress.stage in (BATCH, VALIDATED)
        if resumed is not None and not mid_epoch:
            self._resume_between_epochs(resumed)
        every = trainer.check_val_every_n_epoch
        self.validates_this_epoch = trainer.enable_validation and (
            every is None or (progress.epoch + 1) % every == 0
        )
        if mid_epoch:
            assert resumed is not None
            self.accumulate = trainer.accumulate_grad_batches
            batches = self._resume_in_epoch(resumed)
            trainer.preemption.leave_untrained(trainer)
            done = progress.batch
            trainer.batch_idx = done - 1
            trainer.metrics.train.fx = "on_train_batch_end"  # the hook that ran last
            is_last = done >= self.batches
            if math.isinf(self.batches):
                assert self.stream is not None
                first = self.stream.look_ahead(batches, _NO_BATCH)
                is_last = first is _NO_BATCH
                batches = batches if is_last else itertools.chain((first,), batches)
            stops = False
            if progress.stage == BATCH:
                stops = self._after_batch(done - 1, is_last, done % self.accumulate == 0 or is_last)
            progress.cut_short = not is_last and (stops or self._stops_here())
            if not is_last and not progress.cut_short:
                self._run_batches(batches)
        else:
            progress.batch, progress.samples, progress.stage = 0, 0, START
            trainer.batch_idx = 0
            self.data.reload()
            call(trainer, "on_train_epoch_start")
            # A hook may have set another one for this epoch.
            self.accumulate = trainer.accumulate_grad_batches
            assert self.stream is not None
            progress.cut_short = self._stops_here()
            if not progress.cut_short:
                self._run_batches(self.stream.start(progress.epoch))
        self._end_epoch()

    def _resume_between_epochs(self, resumed: dict[str, Any]) -> None:
        progress = self.progress
        if progress.stage == END:
            progress.epoch, progress.batch, progress.stage = progress.epoch + 1, 0, START
        data = resumed.get("data")
        assert self.stream is not None
        if data is not None:
            self.stream.restore_begin(data["now"])
        state.restore_run(self.trainer, resumed)

    def _resume_in_epoch(self, resumed: dict[str, Any], *, nothing_left: bool = False) -> Iterator[Any]:
        progress, data = self.progress, resumed.get("data")
        assert self.stream is not None
        if data is None or data.get("begin") is None:
            # Another maker's file: the position is known, the order of the rows is not.
            begin = self.stream.begin_state()
            data = {"begin": begin, "now": begin}
        self.data.translate_position(data)
        nothing_left = nothing_left or progress.batch >= self.batches
        batches = self.stream.resume(progress.epoch, progress.batch, data, nothing_left=nothing_left)
        state.restore_run(self.trainer, resumed)
        return batches

    def _run_batches(self, batches: Iterator[Any]) -> None:
        trainer, progress = self.trainer, self.progress
        stream, results = self.stream, trainer.metrics.train
        logs = bool(trainer.loggers) and trainer.log_every_n_steps > 0
        assert stream is not None
        optimization, transfer, accumulate = self.optimization, self.transfer, self.accumulate
        starts, ends, every = self.batch_starts, self.batch_ends, trainer.log_every_n_steps
        count, index = self.batches, progress.batch
        endless, length = math.isinf(count), stream.length()
        if index >= count:
            return
        # Whether something may have to happen between two batches besides a save.
        watched = self.validates_this_epoch or self.step_plateaus or trainer.max_steps != -1
        fetch = profiled(trainer, "[_TrainingEpochLoop].train_dataloader_next", next)
        batch = fetch(batches, _NO_BATCH)
        trainer.preemption.leave_untrained(trainer)
        trainer.checkpoint_stats.steps_begin(progress, writing=bool(trainer.saves_in_flight))
        while batch is not _NO_BATCH:
            trainer.batch_idx = index
            # Only data that cannot tell its length has to be asked for one batch more to know the last one.
            following = stream.look_ahead(batches, _NO_BATCH) if endless else None
            is_last = following is _NO_BATCH or index + 1 == count
            steps = is_last or (index + 1) % accumulate == 0
            if is_last and count == length:
                stream.finish(batches)
            if transfer is not None:
                batch = transfer(batch, 0)
            results.batch, results.batch_size = batch, None
            if starts:
                results.fx = "on_train_batch_start"
                answers = [hook(batch, index) for hook in starts]
                if -1 in answers:
                    if self.epoch_schedules:
                        step_schedulers(trainer, "epoch", plateau=False)
                    break
            outputs = optimization.run(
                batch, index, zero=index % accumulate == 0, step=steps, divide_by=accumulate
            )
            if steps and self.step_schedules:
                step_schedulers(trainer, "step", plateau=False)
            if is_last and self.epoch_schedules:
                step_schedulers(trainer, "epoch", plateau=False)
            progress.batch = index + 1
            progress.total_batches += 1
            progress.stage = BATCH
            if ends:
                results.fx = "on_train_batch_end"
                for hook in ends:
                    hook(outputs, batch, index)
            if logs and steps and ((progress.batches_that_stepped + 1) % every == 0 or self._stops_by_itself):
                self._log_step()
            if trainer.save_requests:
                self._count_samples(batch)
                trainer.safe_point()
            if watched or trainer.should_stop or trainer.save_requests:
                if self._after_batch(index, is_last, steps):
                    progress.cut_short = not is_last
                    return
            else:
                progress.stage = VALIDATED
                if steps:
                    progress.batches_that_stepped += 1
            if is_last:
                return
            index += 1
            batch = following if endless else fetch(batches, _NO_BATCH)
        if length is not None and index < count and batch is _NO_BATCH:
            rank_zero_warn(f"The training loader promised {int(count)} batches and gave {index}.")

    def _count_samples(self, batch: Any) -> None:
        # Batches of one epoch hold the same number of rows, but for the last. There is none after a resume.
        if batch is not None:
            self.progress.samples = self.progress.batch * batch_size_of(batch) * self.trainer.world_size

    def _log_step(self) -> None:
        trainer = self.trainer
        metrics = trainer.metrics.step(trainer.metrics.train, lambda entry: entry.logger)
        if metrics:
            trainer.metrics.logged.update(metrics)
            trainer.log_to_loggers(metrics, self.progress.batches_that_stepped)

    def _after_batch(self, index: int, is_last: bool, stepped: bool) -> bool:
        """What follows a batch and its safe point; returns whether the epoch is cut short here."""
        trainer, progress, every = self.trainer, self.progress, self.trainer.log_every_n_steps
        ends = trainer.preemption.time_over and trainer.should_stop and self.may_stop()
        if ends and stepped and every and (progress.batches_that_stepped + 1) % every:
            # Behind the file that a run with more time goes on from, which does not stop here.
            self._log_step()
        if self.validates_this_epoch and self._validation_due(index, is_last):
            self._validate(stepped)
        if stepped:
            if self.step_plateaus:
                step_schedulers(trainer, "step", plateau=True)
            progress.batches_that_stepped += 1
        progress.stage = VALIDATED
        if trainer.save_requests:
            self._count_samples(trainer.metrics.train.batch)
            trainer.safe_point()
        return self._stops_here()

    @property
    def _stops_by_itself(self) -> bool:
        return self.trainer.should_stop and not self.trainer.preemption.time_over

    def _stops_here(self) -> bool:
        trainer = self.trainer
        if trainer.should_stop and self.may_stop():
            return True
        return trainer.max_steps != -1 and self.progress.global_step >= trainer.max_steps

    def _validation_due(self, index: int, is_last: bool) -> bool:
        trainer, interval = self.trainer, self.data.validation_interval
        if self.stopwatch is not None:
            self.progress.since_validation_s = self.stopwatch.elapsed_s()
            return self.stopwatch.due()
        if is_last and math.isinf(interval):
            return True
        if trainer.should_stop and self.may_stop():
            return True
        if math.isinf(interval):
            return False
        done = self.progress.total_batches if trainer.check_val_every_n_epoch is None else index + 1
        return done % interval == 0

    def _validate(self, stepped: bool) -> None:
        trainer, progress = self.trainer, self.progress
        validation = self.data.fresh_validation()
        if self.stopwatch is not None:
            self.stopwatch.restart()
            self.progress.since_validation_s = 0.0
        if validation.skip:
            return
        if stepped:
            call(trainer, "on_validation_model_zero_grad", only="module")
        with beside_batches(trainer), rng.apart(rng.derive(trainer.seed, "validation", progress.validations)):
            validation.run(progress.validations)
        progress.validations += 1
        agreed.stops(trainer)

    def _end_epoch(self) -> None:
        trainer, progress, metrics = self.trainer, self.progress, self.trainer.metrics
        leave_batches(trainer)
        self._count_samples(metrics.train.batch)
        metrics.train.batch = metrics.train.batch_size = None
        metrics.end(metrics.train, more=functools.partial(may_log, trainer, "on_train_epoch_end"))
        progress.full_epoch = progress.batch >= self.batches or math.isinf(self.batches)
        self._call_epoch_end()
        to_log = metrics.publish(metrics.train)
        if self.epoch_plateaus and progress.full_epoch:
            step_schedulers(trainer, "epoch", plateau=True)
        trainer.log_to_loggers(to_log, progress.batches_that_stepped - 1)
        metrics.end_epoch()
        progress.stage = END
        agreed.stops(trainer)
        if trainer.save_requests:
            trainer.safe_point()
        if self.finished:  # what is read in on_train_end is what is durable
            end_of_fit(trainer)
        progress.epoch, progress.batch, progress.stage = progress.epoch + 1, 0, START

    def _call_epoch_end(self) -> None:
        """``on_train_epoch_end``: callbacks, the module, last the callbacks that judge what these logged."""
        trainer, results = self.trainer, self.trainer.metrics.train
        results.fx = "on_train_epoch_end"
        using = [callback for callback in trainer.callbacks if callback.uses_hook("on_train_epoch_end")]
        judges = [callback for callback in using if isinstance(callback, (Checkpoint, EarlyStopping))]
        for callback in (one for one in using if one not in judges):
            callback.on_train_epoch_end(trainer, trainer.lightning_module)
        call(trainer, "on_train_epoch_end", only="module")
        trainer.metrics.end_hooks(results)
        for callback in judges:
            callback.on_train_epoch_end(trainer, trainer.lightning_module)
        results.fx = None
