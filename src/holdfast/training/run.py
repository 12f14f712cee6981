"""How a request to the trainer runs, from attaching the model to closing the loggers."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from holdfast.callbacks.base import Callback
from holdfast.checkpoint import catalog, origin
from holdfast.errors import ArgumentError, ConfigError
from holdfast.training import command, configuration, exactness, rank_state, state
from holdfast.training.alone import alone
from holdfast.training.checkpoint_stats import CheckpointStats
from holdfast.training.configured import read_configuration
from holdfast.training.continued_logs import open_loggers, settle_versions
from holdfast.training.evaluation import EvaluationLoop
from holdfast.training.hooks import call, profiled
from holdfast.training.in_flight import settle
from holdfast.training.loops import FitLoop
from holdfast.training.model_changes import ModelChanges
from holdfast.training.optimizer import LightningOptimizer
from holdfast.training.preemption import Preempted
from holdfast.training.progress import RunningStage, TrainerFn, TrainerStatus
from holdfast.training.requirements import (
    check_fit,
    check_step_arguments,
    refuse_removed_hooks,
    say_half_a_validation,
)
from holdfast.training.resume import Resolved, resolve
from holdfast.training.saving import take_part
from holdfast.training.sources import find_loader, find_train_loader, has_loader
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer

T = TypeVar("T")

WATCHERS: ContextVar[tuple[Callback, ...]] = ContextVar("watchers", default=())
"""Callbacks that every fit gets besides its own: how `holdfast.testing` watches a run it did not write."""

# What is asked -> (stage, kind of loader, the step that the module must have)
_EVALUATIONS = {
    TrainerFn.VALIDATING: (RunningStage.VALIDATING, "val", "validation_step"),
    TrainerFn.TESTING: (RunningStage.TESTING, "test", "test_step"),
    TrainerFn.PREDICTING: (RunningStage.PREDICTING, "predict", "predict_step"),
}


def guarded(trainer: Trainer, fn: TrainerFn, run: Callable[[], T]) -> T:
    """Run a request; whatever ends it, callbacks hear of it and loggers write out what they have.

    Raises:
        Preempted: a signal has asked the fit to stop.
    """
    return alone(trainer, fn, lambda: _requested(trainer, fn, run))


def _requested(trainer: Trainer, fn: TrainerFn, run: Callable[[], T]) -> T:
    trainer.save_requests.clear()
    if fn is not TrainerFn.FITTING:
        result = _guarded(trainer, fn, run)
    else:
        with trainer.preemption.listening(trainer):
            result = _guarded(trainer, fn, run)
    trainer.strategy.after_request(trainer, partial(take_part, trainer))
    return result


def _guarded(trainer: Trainer, fn: TrainerFn, run: Callable[[], T]) -> T:
    trainer.state.fn, trainer.state.status = fn, TrainerStatus.RUNNING
    trainer.state.stage = RunningStage.TRAINING if fn is TrainerFn.FITTING else _EVALUATIONS[fn][0]
    trainer.should_stop = False
    trainer.finalized_loggers = []
    trainer.metrics.begin()
    try:
        result = run()
        if trainer.profiler.active:
            trainer.profiler.describe()
        trainer.strategy.teardown()
    except BaseException as error:
        # First of all: other processes wait for this one.
        behind = trainer.strategy.explain(error)
        trainer.state.status = TrainerStatus.INTERRUPTED
        trainer.broke_off = trainer.broke_off or fn is TrainerFn.FITTING
        if trainer.model is not None:
            _tell_of(trainer, behind)
        if behind is not error:
            raise behind from error
        raise
    else:
        trainer.state.status = TrainerStatus.FINISHED
        return result
    finally:
        for loop in (trainer.fit_loop, trainer.evaluation_loop):
            if loop is not None:
                loop.close()
        trainer.state.stage = None
        if trainer.profiler.active:
            trainer.profiler.teardown(stage=str(fn))
        if trainer.model is not None:
            trainer.model._results = None
        for callback in trainer.callbacks:
            callback._module = None
        if fn is TrainerFn.FITTING:
            trainer.engine.close()


def _tell_of(trainer: Trainer, error: BaseException) -> None:
    """Tell everybody how the run ended; whoever fails at that keeps nobody else from hearing of it."""

    def tell(what: str, told: Callable[..., Any], *args: Any) -> None:
        try:
            told(*args)
        except Exception as problem:  # the error that ended the run is the one to raise
            rank_zero_warn(f"The run ended with {type(error).__name__}, and {what} failed: {problem}")

    # The other processes are elsewhere, or gone; what is still to be saved rank 0 saves by itself.
    trainer.strategy.alone = trainer.world_size > 1 and not isinstance(error, Preempted)
    # Before anybody judges what is still to be saved.
    tell("saving it", settle, trainer)
    for callback in trainer.callbacks:
        name = f"{type(callback).__name__}.on_exception"
        tell(name, callback.on_exception, trainer, trainer.lightning_module, error)
    if trainer.datamodule is not None:
        tell(f"{type(trainer.datamodule).__name__}.on_exception", trainer.datamodule.on_exception, error)
    if trainer.preemption.ends_otherwise(trainer, error):
        trainer.save_requests.clear()
    # Wherever it happened, it was not at a safe point.
    tell("saving it", lambda: trainer.safe_point(exact=False))
    tell("saving it", settle, trainer)
    tell(f"{type(trainer.strategy).__name__}.teardown", trainer.strategy.teardown)
    status = "interrupted" if isinstance(error, (KeyboardInterrupt, Preempted)) else "failed"
    for logger in trainer.loggers_here:
        if logger not in trainer.finalized_loggers:
            tell(f"{type(logger).__name__}.finalize", logger.finalize, status)
    trainer.strategy.alone = False


def _attach(trainer: Trainer, model: LightningModule, datamodule: Any) -> None:
    refuse_removed_hooks(model)
    trainer.model = model
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    trainer.metrics.connect(trainer)
    model._results = None if trainer.barebones else trainer.metrics.train
    trainer.datamodule = datamodule
    if datamodule is not None:
        datamodule.trainer = trainer
    watchers = [one for one in WATCHERS.get() if one not in trainer.callbacks]
    if watchers and trainer.state.fn is TrainerFn.FITTING:
        trainer.callbacks = configuration.ordered([*trainer.callbacks, *watchers])
    own = model.configure_callbacks()
    own = [own] if isinstance(own, Callback) else list(own or [])
    if own:
        replaced = {type(callback) for callback in own}
        kept = [callback for callback in trainer.callbacks if type(callback) not in replaced]
        trainer.callbacks = configuration.ordered(kept + own)
    for callback in trainer.callbacks:
        callback._module = model


def _setup(trainer: Trainer, stage: TrainerFn) -> None:
    model, datamodule = trainer.lightning_module, trainer.datamodule
    if trainer.profiler.active:
        trainer.profiler.setup(stage=str(stage), local_rank=trainer.local_rank, log_dir=trainer.log_dir)
    _prepare_data(trainer)
    if datamodule is not None:
        datamodule.setup(stage=stage)
    call(trainer, "setup", stage, only="callbacks")
    model.setup(stage=stage)
    with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
        configure_model(model)
    # Before weights are restored: a float64 weight would lose bits in a float32 module.
    trainer.strategy.setup(trainer)


def _prepare_data(trainer: Trainer) -> None:
    """Have data prepared by one process of each machine, or of the job, while the others wait. Ranks: all."""
    owners: list[Any] = [
        one for one in (trainer.datamodule, trainer.model) if is_overridden("prepare_data", one)
    ]
    for owner in owners:
        rank = trainer.local_rank if getattr(owner, "prepare_data_per_node", True) else trainer.global_rank
        if rank == 0:
            owner.prepare_data()
    if owners:
        trainer.strategy.barrier("prepare_data")


def configure_model(model: LightningModule) -> None:
    """Let the module build what its ``__init__`` left for later."""
    if is_overridden("configure_sharded_model", model):
        rank_zero_deprecation(
            f"{type(model).__name__}.configure_sharded_model is the old name of configure_model: rename it."
        )
        model.configure_sharded_model()
    if is_overridden("configure_model", model):
        model.configure_model()


def _close(trainer: Trainer, stage: TrainerFn) -> None:
    """Finalize the loggers, each once, and tear down; one that fails keeps nobody else from it."""
    problems: list[Exception] = []
    for logger in trainer.loggers_here:
        trainer.finalized_loggers.append(logger)
        try:
            logger.finalize("success")
        except Exception as problem:
            problems.append(problem)
    _teardown(trainer, stage)
    for other in problems[1:]:
        rank_zero_warn(f"Another logger failed to finalize: {type(other).__name__}: {other}")
    if problems:
        raise problems[0]


def _teardown(trainer: Trainer, stage: TrainerFn) -> None:
    if trainer.datamodule is not None:
        trainer.datamodule.teardown(stage=stage)
    call(trainer, "teardown", stage, only="callbacks")
    trainer.lightning_module.teardown(stage=stage)


# -- fit -----------------------------------------------------------------------------------------------------


def fit(
    trainer: Trainer,
    model: LightningModule,
    train: Any,
    val: Any,
    datamodule: Any,
    ckpt_path: str | os.PathLike[str] | None,
) -> None:
    """Train; see `Trainer.fit`. The checkpoint is read and verified before anything else happens."""
    _attach(trainer, model, datamodule)
    check_fit(trainer, model, train)
    trainer.fit_loop = trainer.evaluation_loop = None
    trainer.evaluation_loops.pop("validation", None)
    trainer.seed = trainer.strategy.broadcast(torch.initial_seed())
    trainer.broke_off = False
    trainer.checkpoint_stats = CheckpointStats()
    trainer.enable_validation = (
        bool(trainer.limit_val_batches)
        and is_overridden("validation_step", model)
        and has_loader(trainer, "val", val)
    )
    if trainer.limit_val_batches:
        say_half_a_validation(trainer, model, val)
    resolved = resolve(trainer, ckpt_path, for_fit=True)
    trainer.resumed_automatically = ckpt_path in ("auto", "last")
    if resolved is not None:
        trainer.engine.not_before_s = catalog.entry(resolved.path).saved_at
    _continue_in(trainer, resolved, ckpt_path)
    resumed = None if resolved is None else resolved.payload["holdfast"]
    if resumed is not None:
        rank_state.take_part(resumed, rank=trainer.global_rank, world_size=trainer.world_size)
        # Before anything can ask for a loader, whose batches are seeded from it.
        trainer.seed = resumed.get("seed", trainer.seed)
    # The hooks of setup may ask how many steps there will be.
    trainer.fit_loop = FitLoop(
        trainer,
        lambda: find_train_loader(trainer, train),
        lambda: find_loader(trainer, "val", val),
        resumed,
    )
    _setup(trainer, TrainerFn.FITTING)
    trainer.fit_loop.changes = ModelChanges(model)
    trainer.preemption.leave_untrained(trainer)
    source = "" if resolved is None else os.path.basename(resolved.path)
    if resolved is not None:
        resolved.check()
        afresh = state.restore_model(trainer, resolved.payload, source)
    _make_optimizers(trainer, model)
    trainer.fit_loop.command = command.note(trainer)
    if resolved is not None:
        state.restore_training(trainer, resolved.payload, source, afresh)
        state.describe_resume(trainer, resolved.payload, resolved.path, resolved.skipped)
    if resumed is not None:
        loop = trainer.fit_loop
        loop.in_force = command.in_force(resumed.get("command") or {}, loop.command, afresh)
    trainer.preemption.begin(trainer, resumed)
    if resolved is not None:
        # All of it is in place now, and optimizer state need not be in memory twice.
        resolved.payload.clear()
        resolved.release()
    _train(trainer, resumed)
    trainer.engine.wait()
    settle(trainer)
    _close(trainer, TrainerFn.FITTING)


def _make_optimizers(trainer: Trainer, model: LightningModule) -> None:
    action = f"[LightningModule]{type(model).__name__}.configure_optimizers"
    trainer.optimizers, trainer.lr_scheduler_configs = read_configuration(
        profiled(trainer, action, model.configure_optimizers)(), automatic=model.automatic_optimization
    )
    _, trainer.optimizers, _ = trainer.precision_plugin.connect(
        model, trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    )
    trainer.wrapped_optimizers = [LightningOptimizer(optimizer, trainer) for optimizer in trainer.optimizers]


def _train(trainer: Trainer, resumed: dict[str, Any] | None) -> None:
    """From the logs to the last hook of fit; all that a checkpoint brought is in place."""
    loop = trainer.fit_loop
    assert loop is not None
    # A run that is already done leaves its logs as they are, unless a hook raises its limits.
    done = loop.nothing_left
    if not done:
        exactness.before_anything_is_written(trainer, resumed)
        open_loggers(trainer)
    watched: AbstractContextManager[Any] = (
        torch.autograd.set_detect_anomaly(True) if trainer.detect_anomaly else nullcontext()
    )
    with watched:
        call(trainer, "on_fit_start")
        if done and not loop.nothing_left:
            open_loggers(trainer)
        loop.sanity_check()
        trainer.preemption.leave_untrained(trainer)
        loop.run()
        call(trainer, "on_fit_end")


def _absolute(path: str) -> str:
    return path if origin.is_url(path) else os.path.abspath(path)


def _as_given(resolved: Resolved, ckpt_path: Any) -> Any:
    """What ``trainer.ckpt_path`` shows: the path as it was given, or the one that a word stood for."""
    return _absolute(resolved.path) if ckpt_path in ("best", "last", "auto") else ckpt_path


def _continue_in(trainer: Trainer, resolved: Resolved | None, ckpt_path: Any) -> None:
    """Point loggers at the version that the checkpoint came from, before anything is written."""
    trainer.resumed_from = trainer.ckpt_path = None
    if resolved is not None:
        trainer.resumed_from = _absolute(resolved.path)
        trainer.ckpt_path = _as_given(resolved, ckpt_path)
    trainer.continued_loggers = settle_versions(trainer, resolved, automatic=ckpt_path == "auto")


# -- validate, test, predict ---------------------------------------------------------------------------------


def evaluate(
    trainer: Trainer,
    fn: TrainerFn,
    model: LightningModule | None,
    dataloaders: Any,
    datamodule: Any,
    ckpt_path: str | os.PathLike[str] | None,
    *,
    verbose: bool = False,
    keep_outputs: bool = False,
) -> Any:
    """Validate, test or predict; see the methods of `Trainer`."""
    stage, kind, step = _EVALUATIONS[fn]
    if model is None:
        if trainer.model is None:
            raise ArgumentError(
                f"trainer.{fn}(): there is no model. Give it one: only after fit it may be left out, and is "
                "that fit's."
            )
        model = trainer.model
        datamodule = trainer.datamodule if datamodule is None and dataloaders is None else datamodule
        best: Any = getattr(trainer.checkpoint_callback, "best_model_path", None)
        if ckpt_path is None and best:
            ckpt_path = "best"
    _attach(trainer, model, datamodule)
    trainer.seed = trainer.strategy.broadcast(trainer.seed)
    predicts = fn is TrainerFn.PREDICTING
    if not is_overridden(step, model) and not (predicts and is_overridden("forward", model)):
        raise ConfigError(f"{type(model).__name__} has no {step}. trainer.{fn} needs it.")
    check_step_arguments(model, step)
    if not has_loader(trainer, kind, dataloaders):
        raise ConfigError(
            f"There is no data for trainer.{fn}: give dataloaders=, a datamodule, or define "
            f"{type(model).__name__}.{kind}_dataloader."
        )
    resolved = resolve(trainer, ckpt_path, for_fit=False)
    trainer.ckpt_path = None if resolved is None else _as_given(resolved, ckpt_path)
    settle_versions(trainer, None, automatic=False)
    _setup(trainer, fn)
    if resolved is not None:
        resolved.check()
        state.restore_model(trainer, resolved.payload, os.path.basename(resolved.path))
        resolved.release()
        path = resolved.path
        rank_zero_info(f"weights from {origin.title(path) if origin.is_url(path) else os.path.relpath(path)}")
    open_loggers(trainer)
    trainer.state.stage = stage
    argument = f"limit_{kind}_batches"
    loop = EvaluationLoop(
        trainer, stage, find_loader(trainer, kind, dataloaders), (getattr(trainer, argument), argument)
    )
    trainer.evaluation_loop = trainer.evaluation_loops[loop.prefix] = loop
    results = loop.run(0, keep_outputs=keep_outputs)
    _close(trainer, fn)
    if predicts:
        trainer.predictions = results[0] if keep_outputs and len(results) == 1 else results
        return trainer.predictions if keep_outputs else None
    if verbose and trainer.is_global_zero:
        from holdfast.training.results_table import show

        show(str(fn), results)
    return results
