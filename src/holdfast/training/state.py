"""What is in a checkpoint: the one place that knows. `capture` gathers it, `restore_*` put it back.

Top-level keys are Lightning's; what only holdfast knows is under "holdfast".
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.callbacks.timer import Timer
from holdfast.checkpoint.migrate import FORMAT_VERSION, LIGHTNING_VERSION
from holdfast.checkpoint.origin import is_url, title
from holdfast.checkpoint.payload import encode
from holdfast.errors import CheckpointIncompatible
from holdfast.training import rng
from holdfast.training.hparams import stored
from holdfast.training.progress import BATCH, END, VALIDATED
from holdfast.training.weights import load_weights
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


# -- capture -------------------------------------------------------------------------------------------------


def capture(trainer: Trainer, *, weights_only: bool, exact: bool) -> dict[str, Any]:
    """Everything that a run needs to go on, or with ``weights_only`` what a model needs to be built again.

    The tensors in it are the live ones: the engine takes the snapshot.

    Args:
        trainer: Whose run.
        weights_only: Leave out optimizers, schedulers, callbacks and the run's own state.
        exact: The run stands at a safe point: going on from here gives the run that never stopped.
    """
    module = trainer.lightning_module
    progress = trainer.progress
    payload: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": trainer.strategy.lightning_module_state_dict(),
        "loops": progress.lightning_loops(progress.global_step, _batches(trainer)),
    }
    left_out = _capture_hyperparameters(payload, module)
    datamodule = trainer.datamodule
    if datamodule is not None:
        left_out += _capture_hyperparameters(payload, datamodule)
    if not weights_only:
        payload["optimizer_states"] = [
            trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers
        ]
        payload["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        payload["callbacks"] = {}
        for callback in trainer.callbacks:
            state = callback.state_dict()
            if state:
                payload["callbacks"][callback.state_key] = state
        scaler = trainer.precision_plugin.state_dict()
        if scaler:
            payload[trainer.precision_plugin.state_key] = scaler
        if datamodule is not None:
            state = datamodule.state_dict()
            if state:
                payload[type(datamodule).__qualname__] = state
        payload["holdfast"] = _capture_run(trainer, exact)
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, payload)
    else:
        payload["holdfast"] = {"format_version": FORMAT_VERSION, "exact": False, "kind": "weights"}
        for callback in trainer.callbacks:
            callback.on_save_weights(trainer, module, payload)
    if left_out:
        payload["holdfast"]["omitted_hyper_parameters"] = left_out
    if datamodule is not None:
        datamodule.on_save_checkpoint(payload)
    module.on_save_checkpoint(payload)
    return payload


def _batches(trainer: Trainer) -> int:
    count = trainer.num_training_batches
    return int(count) if count != float("inf") else -1


def _capture_hyperparameters(payload: dict[str, Any], owner: Any) -> list[str]:
    """Put them into the payload; returns the names of those that a checkpoint cannot hold."""
    found = stored(owner)
    if found is None:
        return []
    name, kind, values = found
    payload[owner.CHECKPOINT_HYPER_PARAMS_NAME] = name
    payload[owner.CHECKPOINT_HYPER_PARAMS_KEY] = values
    if kind is not None:
        payload[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = kind
    networks = [str(key) for key in owner.hparams if key not in values]
    return networks + [path for path, _ in encode(values).omissions if "/" not in path]


def _capture_run(trainer: Trainer, exact: bool) -> dict[str, Any]:
    module, progress = trainer.lightning_module, trainer.progress
    loop = trainer.fit_loop
    modes = trainer.training_modes or {}
    progress.should_stop = trainer.should_stop
    progress.limits = limits_of(trainer)
    # An epoch that a limit cut short can be gone on with by a run that has a higher one.
    mid_epoch = progress.stage in (BATCH, VALIDATED) or (progress.stage == END and not progress.full_epoch)
    for logger in trainer.loggers:
        # Rows up to here reach the disk before the checkpoint that counts on them.
        logger.save()
    return {
        "format_version": FORMAT_VERSION,
        "kind": "full",
        "exact": exact,
        "seed": trainer.seed,
        "progress": progress.state_dict(),
        "data": None if loop is None or loop.stream is None else loop.stream.state(mid_epoch),
        "validation_data": None if loop is None else loop.validation_state(),
        "generators": [rng.capture()],
        "metrics": trainer.metrics.state_dict(module),
        "gradients": _capture_gradients(trainer),
        "eval_modules": [
            name for name, child in module.named_modules() if not modes.get(child, child.training)
        ],
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "loggers": [
            {"type": type(logger).__qualname__, "state": logger.state_dict()} for logger in trainer.loggers
        ],
        "environment": environment(),
    }


def limits_of(trainer: Trainer) -> list[Any]:
    """What the run ends at; one that goes on under other limits is meant to train on."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    durations = [timer.duration_s for timer in timers if timer.duration_s is not None]
    return [trainer.max_epochs, trainer.max_steps, *durations]


def _capture_gradients(trainer: Trainer) -> dict[str, Tensor] | None:
    """The gradients that the next batch goes on from; None where it starts by clearing them."""
    module, progress = trainer.lightning_module, trainer.progress
    mid_epoch = progress.stage in (BATCH, VALIDATED)
    half_window = mid_epoch and progress.batch % trainer.accumulate_grad_batches != 0
    if progress.batch == _batches(trainer):
        half_window = False  # the last batch of an epoch always steps
    own_rules = not module.automatic_optimization or is_overridden("optimizer_zero_grad", module)
    if not (half_window or own_rules):
        return None
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def environment() -> dict[str, Any]:
    """What else the bits of a run depend on; differences are named on resume."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


# -- restore, in the order in which a fit needs it -----------------------------------------------------------


_LISTS = {"optimizer_states": "optimizers", "lr_schedulers": "LR schedulers"}


def restore_model(trainer: Trainer, payload: dict[str, Any], source: str) -> set[str]:
    """Weights and data, after the hooks that may change the checkpoint; optimizers do not exist yet.

    Returns:
        The lists of states that a hook has emptied: what they are for is meant to start afresh.
    """
    held = {key for key in _LISTS if payload.get(key)}
    module, datamodule = trainer.lightning_module, trainer.datamodule
    if datamodule is not None:
        datamodule.on_load_checkpoint(payload)
        if type(datamodule).__qualname__ in payload:
            datamodule.load_state_dict(payload[type(datamodule).__qualname__])
    module.on_load_checkpoint(payload)
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, payload)
    if is_overridden("load_model_state_dict", trainer.strategy):
        trainer.strategy.load_model_state_dict(payload, strict=module.strict_loading)
    else:
        load_weights(module, payload["state_dict"], strict=module.strict_loading, source=source)
    return {key for key in held if key in payload and not payload[key]}


def restore_training(
    trainer: Trainer, payload: dict[str, Any], source: str, afresh: Collection[str] = ()
) -> None:
    """Optimizers, schedulers, scaler, callbacks, counters and metrics: all but the generators.

    Args:
        trainer: The trainer.
        payload: The checkpoint.
        source: The file's name, for messages.
        afresh: What `restore_model` returned.

    Raises:
        CheckpointIncompatible: it holds no such state, or for another number of optimizers.
    """
    run = payload["holdfast"]
    if "optimizer_states" not in payload or run.get("kind") == "weights":
        raise CheckpointIncompatible(
            f"{source} holds weights only; a run cannot go on from it. Load them with "
            f"{type(trainer.lightning_module).__name__}.load_from_checkpoint and start a new run."
        )
    for callback in trainer.callbacks:
        callback.on_restore_optimizers(trainer, trainer.lightning_module, payload)
    live_of: dict[str, list[Any]] = {
        "optimizer_states": trainer.optimizers,
        "lr_schedulers": trainer.lr_scheduler_configs,
    }
    for key, what in _LISTS.items():
        live, saved = live_of[key], payload[key]
        if key in afresh:
            rank_zero_info(f"on_load_checkpoint has emptied {key!r}: the {what} start afresh")
        elif len(live) != len(saved):
            raise CheckpointIncompatible(
                f"{source} holds the state of {len(saved)} {what}, but configure_optimizers returned "
                f"{len(live)}. Resume with the optimizers that the run was started with."
            )
    if trainer.strategy.lightning_restore_optimizer and "optimizer_states" not in afresh:
        _restore_optimizers(trainer, payload, source)
    # Where they start afresh, there is nothing to give them.
    for config, state in zip(trainer.lr_scheduler_configs, payload["lr_schedulers"], strict=False):
        config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(payload.get(trainer.precision_plugin.state_key, {}))
    _restore_callbacks(trainer, payload.get("callbacks") or {})
    progress = trainer.progress
    progress.load_state_dict(run["progress"])
    if progress.limits == limits_of(trainer):
        trainer.should_stop = progress.should_stop
    elif progress.stage == END and not progress.full_epoch and (run.get("data") or {}).get("begin"):
        # A limit had cut this epoch short, and now there is another: its other batches come first.
        progress.stage = VALIDATED
    if "metrics" in run:
        device, module = trainer.strategy.root_device, trainer.lightning_module
        trainer.metrics.load_state_dict(run["metrics"], device, module)
    for logger, saved in zip(trainer.loggers, run.get("loggers", []), strict=False):
        # Only a logger that writes on where that run wrote cuts its rows back to the checkpoint's.
        if saved["type"] == type(logger).__qualname__ and trainer.continues_version:
            logger.load_state_dict(saved["state"])


def _restore_optimizers(trainer: Trainer, payload: dict[str, Any], source: str) -> None:
    if is_overridden("load_optimizer_state_dict", trainer.strategy):
        trainer.strategy.load_optimizer_state_dict(payload)
        return
    for index, (optimizer, state) in enumerate(
        zip(trainer.optimizers, payload["optimizer_states"], strict=True)
    ):
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            raise CheckpointIncompatible(
                f"{source}: the state of optimizer {index} does not fit {type(optimizer).__name__}: {error}"
            ) from error


def _restore_callbacks(trainer: Trainer, states: Mapping[str, Any]) -> None:
    unclaimed = set(states) - {callback.state_key for callback in trainer.callbacks}
    by_class = {type(callback).__qualname__ for callback in trainer.callbacks} & unclaimed
    for callback in trainer.callbacks:
        key, name = callback.state_key, type(callback).__qualname__
        if key not in states and name in by_class:
            key = name  # before Lightning 1.5 a callback's state was known by its class alone
        if states.get(key) is not None:
            callback.load_state_dict(states[key])
    unclaimed -= by_class
    # A ModelCheckpoint whose interval was changed has another key and finds its state by itself.
    names = {type(callback).__qualname__ for callback in trainer.checkpoint_callbacks}
    unclaimed = {key for key in unclaimed if str(key).partition("{")[0] not in names}
    if unclaimed:
        rank_zero_warn(
            "The checkpoint holds the state of callbacks that this trainer does not have: "
            f"{sorted(map(str, unclaimed))}. Their state is left out."
        )


def restore_run(trainer: Trainer, run: dict[str, Any]) -> None:
    """What has to come last, just before the first batch: modes, gradients and every generator."""
    module = trainer.lightning_module
    if "eval_modules" in run:
        in_eval = set(run["eval_modules"])
        for name, child in module.named_modules():
            child.training = name not in in_eval
    if "frozen" in run:
        frozen = set(run["frozen"])
        for name, parameter in module.named_parameters():
            parameter.requires_grad = name not in frozen
    gradients = run.get("gradients")
    if gradients is not None:
        for name, parameter in module.named_parameters():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
    if "generators" in run:
        for problem in rng.restore(run["generators"][0]):
            rank_zero_warn(f"{problem}; this run will not be bit-identical to the one that never stopped.")


def describe_resume(trainer: Trainer, payload: dict[str, Any], path: str, skipped: list[str]) -> None:
    """Say what a resumed run starts from, what was passed over and why, and what makes it inexact."""
    run, progress = payload["holdfast"], trainer.progress
    for reason in skipped:
        rank_zero_info(f"passed over {reason}")
    if progress.stage == END:
        where = f"epoch {progress.epoch + 1}, batch 0"
    else:
        where = f"epoch {progress.epoch}, batch {progress.batch}"
    parts = ["weights", f"{len(trainer.optimizers)} optimizer(s)"]
    if trainer.lr_scheduler_configs:
        parts.append(f"{len(trainer.lr_scheduler_configs)} scheduler(s)")
    if trainer.precision_plugin.scaler is not None:
        parts.append("scaler")
    if payload.get("callbacks"):
        parts.append(f"{len(payload['callbacks'])} callback(s)")
    if "generators" in run:
        parts.append("generators")
    name = title(path) if is_url(path) else os.path.relpath(path)
    rank_zero_info(
        f"resumed from {name}  step {progress.global_step}  restored: {', '.join(parts)}  goes on at {where}"
    )
    if not run.get("exact"):
        rank_zero_info(
            "this checkpoint was not taken at a safe point (or is not holdfast's): the run goes on from "
            "it, but not bit-identical to one that never stopped"
        )
    saved, here = run.get("environment"), environment()
    if saved is not None and saved != here:
        differences = [
            f"{key}: {saved.get(key)!r} then, {here[key]!r} now"
            for key in here
            if saved.get(key) != here[key]
        ]
        rank_zero_warn(
            "The environment differs from the checkpoint's, so bits may too. " + "; ".join(differences)
        )
