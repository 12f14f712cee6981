"""What is in a checkpoint: the one place that knows. `capture` gathers it, `restore_*` put it back.

Top-level keys are Lightning's; what only holdfast knows is under "holdfast".
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from holdfast.checkpoint.load import load
from holdfast.checkpoint.migrate import FORMAT_VERSION, LIGHTNING_VERSION, upgrade
from holdfast.errors import CheckpointIncompatible, ConfigError
from holdfast.training import rng
from holdfast.training.hooks import is_overridden
from holdfast.training.hparams import instantiate
from holdfast.training.progress import BATCH, END, VALIDATED
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
        "state_dict": module.state_dict(),
        "loops": progress.lightning_loops(progress.global_step, _batches(trainer)),
    }
    _capture_hyperparameters(payload, module, "hparams_name", "hyper_parameters")
    datamodule = trainer.datamodule
    if datamodule is not None:
        _capture_hyperparameters(
            payload, datamodule, "datamodule_hparams_name", "datamodule_hyper_parameters"
        )
    if not weights_only:
        payload["optimizer_states"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
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
    if datamodule is not None:
        datamodule.on_save_checkpoint(payload)
    module.on_save_checkpoint(payload)
    return payload


def _batches(trainer: Trainer) -> int:
    count = trainer.num_training_batches
    return int(count) if count != float("inf") else -1


def _capture_hyperparameters(payload: dict[str, Any], owner: Any, name_key: str, values_key: str) -> None:
    if owner.hparams:
        payload[name_key] = owner._hparams_name
        payload[values_key] = dict(owner.hparams)


def _capture_run(trainer: Trainer, exact: bool) -> dict[str, Any]:
    module, progress = trainer.lightning_module, trainer.progress
    loop = trainer.fit_loop
    modes = trainer.training_modes or {}
    progress.should_stop = trainer.should_stop
    progress.limits = [trainer.max_epochs, trainer.max_steps]
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


# -- weights -------------------------------------------------------------------------------------------------


def load_weights(module: nn.Module, state_dict: Mapping[str, Any], *, strict: bool, source: str) -> None:
    """Load weights; what does not fit is listed whole, and nothing is loaded unless it all can be.

    Args:
        module: Where to.
        state_dict: From what.
        strict: Whether every key must be on both sides. Shapes must match either way.
        source: The file's name, for the message.

    Raises:
        CheckpointIncompatible: keys or shapes do not match, or with ``strict=False`` not one key does.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    misshapen = [
        f"{key}: {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
        for key, value in state_dict.items()
        if key in own
        and isinstance(value, Tensor)
        and isinstance(own[key], Tensor)
        and value.shape != own[key].shape
        and not isinstance(own[key], UninitializedTensorMixin)
    ]
    name = type(module).__name__
    parts = []
    if missing and strict:
        parts.append(f"{len(missing)} missing from the file:\n  " + "\n  ".join(missing))
    if unexpected and strict:
        parts.append(
            f"{len(unexpected)} in the file that the model does not have:\n  " + "\n  ".join(unexpected)
        )
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape:\n  " + "\n  ".join(misshapen))
    if own and state_dict and len(missing) == len(own):
        first, there = next(iter(own)), next(iter(state_dict))
        raise CheckpointIncompatible(
            f"{source} does not fit {name}: not one of its {len(state_dict)} keys is the model's. The "
            f"model has "
            f"{first!r}, the file has {there!r}. Is it the right file, or is there a prefix to strip?"
        )
    if parts:
        advice = "" if misshapen else "\nstrict=False loads what matches."
        raise CheckpointIncompatible(f"{source} does not fit {name}. Keys " + "\nKeys ".join(parts) + advice)
    # Through the module's own method: it, or a child, may have overridden it.
    module.load_state_dict(state_dict, strict=strict)


def build_from_checkpoint(
    cls: type[Any],
    path: str | os.PathLike[str],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    overrides: Mapping[str, Any],
) -> Any:
    """`LightningModule.load_from_checkpoint`, and a datamodule's."""
    payload = upgrade(
        load(path, map_location=map_location or "cpu", skip=("optimizer_states",)), source=os.fspath(path)
    )
    is_module = issubclass(cls, nn.Module)
    prefix = "" if is_module else "datamodule_"
    saved = payload.get(prefix + ("hyper_parameters"))
    if hparams_file is not None:
        saved = _read_hparams_file(hparams_file)
    if saved is not None and not isinstance(saved, Mapping):
        saved = vars(saved)
    built = instantiate(cls, saved or {}, payload.get(prefix + "hparams_name"), overrides)
    if not is_module:
        built.on_load_checkpoint(payload)
        if cls.__qualname__ in payload:
            built.load_state_dict(payload[cls.__qualname__])
        return built
    if is_overridden("configure_model", built):
        built.configure_model()
    built.on_load_checkpoint(payload)
    if strict is None:
        strict = built.strict_loading
    load_weights(built, payload["state_dict"], strict=strict, source=os.path.basename(os.fspath(path)))
    if map_location is not None and not callable(map_location) and not isinstance(map_location, dict):
        built.to(map_location)
    return built


def _read_hparams_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    import yaml

    if not os.fspath(path).endswith((".yaml", ".yml")):
        raise ConfigError(f"hparams_file={os.fspath(path)!r}: expected a .yaml file.")
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    return dict(values or {})


# -- restore, in the order in which a fit needs it -----------------------------------------------------------


def restore_model(trainer: Trainer, payload: dict[str, Any], source: str) -> None:
    """Weights and data, after the hooks that may change the checkpoint; optimizers do not exist yet."""
    module, datamodule = trainer.lightning_module, trainer.datamodule
    if datamodule is not None:
        datamodule.on_load_checkpoint(payload)
        if type(datamodule).__qualname__ in payload:
            datamodule.load_state_dict(payload[type(datamodule).__qualname__])
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, payload)
    module.on_load_checkpoint(payload)
    load_weights(module, payload["state_dict"], strict=module.strict_loading, source=source)


def restore_training(trainer: Trainer, payload: dict[str, Any], source: str) -> None:
    """Optimizers, schedulers, scaler, callbacks, counters and metrics: all but the generators.

    Raises:
        CheckpointIncompatible: it holds no such state, or for another number of optimizers.
    """
    run = payload["holdfast"]
    if "optimizer_states" not in payload or run.get("kind") == "weights":
        raise CheckpointIncompatible(
            f"{source} holds weights only; a run cannot go on from it. Load them with "
            f"{type(trainer.lightning_module).__name__}.load_from_checkpoint and start a new run."
        )
    for what, live, saved in (
        ("optimizers", trainer.optimizers, payload["optimizer_states"]),
        ("LR schedulers", trainer.lr_scheduler_configs, payload["lr_schedulers"]),
    ):
        if len(live) != len(saved):
            raise CheckpointIncompatible(
                f"{source} holds the state of {len(saved)} {what}, but configure_optimizers returned "
                f"{len(live)}. Resume with the optimizers that the run was started with."
            )
    for index, (optimizer, state) in enumerate(
        zip(trainer.optimizers, payload["optimizer_states"], strict=True)
    ):
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            raise CheckpointIncompatible(
                f"{source}: the state of optimizer {index} does not fit {type(optimizer).__name__}: {error}"
            ) from error
    for config, state in zip(trainer.lr_scheduler_configs, payload["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(payload.get(trainer.precision_plugin.state_key, {}))
    _restore_callbacks(trainer, payload.get("callbacks") or {})
    progress = trainer.progress
    progress.load_state_dict(run["progress"])
    if progress.limits == [trainer.max_epochs, trainer.max_steps]:
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


def _restore_callbacks(trainer: Trainer, states: Mapping[str, Any]) -> None:
    for callback in trainer.callbacks:
        state = states.get(callback.state_key)
        if state is not None:
            callback.load_state_dict(state)
    unclaimed = set(states) - {callback.state_key for callback in trainer.callbacks}
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
    rank_zero_info(
        f"resumed from {os.path.relpath(path)}  step {progress.global_step}  "
        f"restored: {', '.join(parts)}  goes on at {where}"
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
