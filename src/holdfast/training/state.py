"""What is in a checkpoint: the one place that knows. `capture` gathers it, `restore_*` put it back.

Top-level keys are Lightning's; what only holdfast knows is under "holdfast".
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.timer import Timer
from holdfast.checkpoint.migrate import FORMAT_VERSION, LIGHTNING_VERSION
from holdfast.checkpoint.origin import is_url, title
from holdfast.checkpoint.payload import encode
from holdfast.errors import CheckpointIncompatible
from holdfast.training import command, own_generators, rank_state, rng
from holdfast.training.averages import say_if_averaged
from holdfast.training.gradients import gradients
from holdfast.training.hparams import stored
from holdfast.training.merged_metrics import merge
from holdfast.training.metric_objects import found_in
from holdfast.training.model_changes import make_room
from holdfast.training.model_changes import restore as restore_changes
from holdfast.training.param_groups import groups_of, regroup
from holdfast.training.progress import BATCH, END, VALIDATED, Progress
from holdfast.training.weights import load_weights, unstorable_extra_states
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.optimizer_state import load_optimizer_state
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn
from holdfast.utilities.wrapped_names import plain_names, plain_state, put_buffers

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
    if not trainer.strategy.alone:
        trainer.strategy.check_gradients()
    payload: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": plain_state(trainer.strategy.lightning_module_state_dict(), module),
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
        _capture_model(payload, trainer, weights_only=False)
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, payload)
    else:
        payload["holdfast"] = {"format_version": FORMAT_VERSION, "exact": False, "kind": "weights"}
        _capture_model(payload, trainer, weights_only=True)
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


def _capture_model(payload: dict[str, Any], trainer: Trainer, *, weights_only: bool) -> None:
    """What of the model is not in its state_dict, or is there in a form that has to be known to load it."""
    loop = trainer.fit_loop
    changes = (
        {} if loop is None or loop.changes is None else loop.changes.state_dict(trainer.lightning_module)
    )
    if weights_only:
        changes = {key: value for key, value in changes.items() if key == "reshaped_buffers"}
    lost = unstorable_extra_states(payload["state_dict"])
    if lost:
        changes["omitted_extra_states"] = lost
    if changes:
        payload["holdfast"]["model"] = changes


def _capture_run(trainer: Trainer, exact: bool) -> dict[str, Any]:
    module, progress = trainer.lightning_module, trainer.progress
    loop = trainer.fit_loop
    modes = trainer.training_modes or {}
    plain = plain_names(module)
    progress.should_stop = trainer.should_stop
    progress.limits = limits_of(trainer)
    # An epoch that a limit cut short can be gone on with by a run that has a higher one.
    mid_epoch = progress.stage in (BATCH, VALIDATED) or (progress.stage == END and progress.cut_short)
    for logger in trainer.loggers_here:
        # Rows up to here reach the disk before the checkpoint that counts on them.
        logger.save()
    inside_window = _inside_window(trainer) or trainer.strategy.adds_up_apart
    run = {
        "format_version": FORMAT_VERSION,
        "kind": "full",
        "exact": exact,
        "run": trainer.preemption.files.run,
        "seed": trainer.seed,
        "progress": progress.state_dict(),
        "data": None if loop is None or loop.stream is None else loop.stream.state(mid_epoch),
        "validation_data": None if loop is None else loop.validation_state(),
        "generators": [rng.capture()],
        "metrics": trainer.metrics.state_dict(module),
        "gradients": gradients(trainer, half_window=inside_window),
        "param_groups": groups_of(trainer.optimizers, module),
        "eval_modules": list(
            dict.fromkeys(
                plain(name) for name, child in module.named_modules() if not modes.get(child, child.training)
            )
        ),
        "frozen": [
            plain(name) for name, parameter in module.named_parameters() if not parameter.requires_grad
        ],
        "loggers": [
            {"type": type(logger).__qualname__, "state": logger.state_dict()}
            for logger in trainer.loggers_here
        ],
        "own_generators": _capture_own_generators(trainer),
        "command": command.facts(trainer),
        "environment": command.environment(trainer.strategy.root_device),
    }
    rank_state.gather(trainer, run, inside_window=inside_window)
    return run


def limits_of(trainer: Trainer) -> list[Any]:
    """What the run ends at; one that goes on under other limits is meant to train on."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    durations = [timer.duration_s for timer in timers if timer.duration_s is not None]
    return [trainer.max_epochs, trainer.max_steps, *durations]


def _inside_window(trainer: Trainer) -> bool:
    """Whether the gradients of an accumulation window have been added up in part."""
    progress = trainer.progress
    if progress.stage not in (BATCH, VALIDATED) or progress.batch == _batches(trainer):
        return False  # the last batch of an epoch always steps
    return progress.batch % trainer.accumulate_grad_batches != 0


def _owners_of_generators(trainer: Trainer) -> dict[str, Any]:
    """Who may draw from a generator of its own while it trains, by a name that a resumed run gives it too."""
    callbacks = {f"callback {callback.state_key}": callback for callback in trainer.callbacks}
    return {**callbacks, "module": trainer.lightning_module}


def _capture_own_generators(trainer: Trainer) -> dict[str, Any]:
    states = {name: own_generators.capture(one) for name, one in _owners_of_generators(trainer).items()}
    return {name: state for name, state in states.items() if state}


# -- restore, in the order in which a fit needs it -----------------------------------------------------------


_LISTS = {"optimizer_states": "optimizers", "lr_schedulers": "LR schedulers"}


def restore_model(trainer: Trainer, payload: dict[str, Any], source: str) -> set[str]:
    """Weights and data, after the hooks that may change the checkpoint; optimizers do not exist yet.

    Returns:
        The lists of states that a hook has emptied: what they are for is meant to start afresh.
    """
    held = {key for key in _LISTS if payload.get(key)}
    module, datamodule = trainer.lightning_module, trainer.datamodule
    if trainer.strategy.shards_model:
        from holdfast.training import sharded_loading

        sharded_loading.place_weights(trainer, payload)
    if datamodule is not None:
        datamodule.on_load_checkpoint(payload)
        if type(datamodule).__qualname__ in payload:
            datamodule.load_state_dict(payload[type(datamodule).__qualname__])
    module.on_load_checkpoint(payload)
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, payload)
    if trainer.state.fn == "fit":
        say_if_averaged(payload, source)
    if trainer.strategy.shards_model:
        # What a hook has put there is whole.
        sharded_loading.spread_weights(trainer, payload)
    if is_overridden("load_model_state_dict", trainer.strategy):
        trainer.strategy.load_model_state_dict(payload, strict=module.strict_loading)
    else:
        own = payload["holdfast"].get("model") or {}
        make_room(module, own, payload["state_dict"])
        load_weights(
            module,
            payload["state_dict"],
            strict=module.strict_loading,
            source=source,
            omitted=own.get("omitted_extra_states", ()),
        )
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
    # What the differences to it are told from, when the loaders are there and the payload is gone.
    run["hyper_parameters"], run["afresh"] = command.note_of_file(trainer, payload), sorted(afresh)
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
    for optimizer in trainer.optimizers:
        # Torch warns of a scheduler that steps before its optimizer; this one did step, in another process.
        optimizer._opt_called = bool(payload["global_step"])
    trainer.precision_plugin.load_state_dict(payload.get(trainer.precision_plugin.state_key, {}))
    run["unclaimed_callbacks"] = _restore_callbacks(trainer, payload.get("callbacks") or {})
    progress = trainer.progress
    progress.load_state_dict(run["progress"])
    if progress.limits == limits_of(trainer):
        trainer.should_stop = progress.should_stop
    elif _was_cut_short(progress, run) and (
        trainer.max_steps == -1 or progress.global_step < trainer.max_steps
    ):
        # A limit had cut this epoch short, and now there is another: its other batches come first.
        progress.stage = VALIDATED
    if "metrics" in run:
        device, module = trainer.strategy.root_device, trainer.lightning_module
        if "metrics_of_ranks" in run:
            run["metrics"] = merge(
                run.pop("metrics_of_ranks"), found_in(module), trainer.global_rank, trainer.world_size
            )
        trainer.metrics.load_state_dict(run["metrics"], device, module)
    for logger, saved in zip(trainer.loggers, run.get("loggers", []), strict=False):
        # Only a logger that writes on where that run wrote cuts its rows back to the checkpoint's.
        if saved["type"] == type(logger).__qualname__ and logger in trainer.continued_loggers:
            logger.load_state_dict(saved["state"])


def _restore_optimizers(trainer: Trainer, payload: dict[str, Any], source: str) -> None:
    if trainer.strategy.shards_model:
        from holdfast.training import sharded_loading

        sharded_loading.place_optimizers(trainer, payload)
    if is_overridden("load_optimizer_state_dict", trainer.strategy):
        trainer.strategy.load_optimizer_state_dict(payload)
        return
    groups = payload["holdfast"].get("param_groups") or groups_of(
        trainer.optimizers, trainer.lightning_module
    )
    for index, (optimizer, state) in enumerate(
        zip(trainer.optimizers, payload["optimizer_states"], strict=True)
    ):
        try:
            regroup(optimizer, groups[index], state, trainer.lightning_module)
            load_optimizer_state(optimizer, state, trainer.lightning_module, payload["state_dict"])
        except ValueError as error:
            raise CheckpointIncompatible(
                f"{source}: the state of optimizer {index} does not fit {type(optimizer).__name__}: {error}"
            ) from error


def _restore_callbacks(trainer: Trainer, states: Mapping[str, Any]) -> list[str]:
    """Give each callback its state; returns the keys of those that nobody here has a use for."""
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
    return sorted(map(str, unclaimed))


def restore_run(trainer: Trainer, run: dict[str, Any]) -> None:
    """What has to come last, just before the first batch: modes, gradients and every generator."""
    module = trainer.lightning_module
    plain = plain_names(module)
    if "eval_modules" in run:
        in_eval = set(run["eval_modules"])
        for name, child in module.named_modules():
            child.training = plain(name) not in in_eval
    if "frozen" in run:
        frozen = set(run["frozen"])
        for name, parameter in module.named_parameters():
            parameter.requires_grad = plain(name) not in frozen
    kept = run.get("gradients")
    if trainer.strategy.shards_model:
        from holdfast.training import sharded_loading

        kept = sharded_loading.place_gradients(trainer, run, inside_window=_inside_window(trainer))
    if kept is not None:
        for name, parameter in module.named_parameters():
            gradient = kept.get(plain(name))
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
    restore_changes(module, run.get("model") or {})
    put_buffers(module, run.get("buffers") or {})
    trainer.strategy.resume_training(
        inside_window=_inside_window(trainer), reduction_order=run.get("reduction_order")
    )
    for name, owner in _owners_of_generators(trainer).items():
        own_generators.restore(owner, run.get("own_generators", {}).get(name, {}))
    if "generators" in run:
        for problem in rank_state.restore_generators(run["generators"][0]):
            rank_zero_warn(f"{problem}; this run will not be bit-identical to the one that never stopped.")


def _was_cut_short(progress: Progress, run: dict[str, Any]) -> bool:
    epoch_is_known = bool((run.get("data") or {}).get("begin"))
    # Older files say only whether it was full.
    cut_short = run["progress"].get("cut_short", not progress.full_epoch)
    return progress.stage == END and cut_short and epoch_is_known


def describe_resume(trainer: Trainer, payload: dict[str, Any], path: str, skipped: list[str]) -> None:
    """Say what a resumed run starts from, where it goes on, and what was passed over or left out, and why."""
    progress = trainer.progress
    for reason in skipped:
        rank_zero_info(f"passed over {reason}")
    if progress.stage == END:
        where = f"epoch {progress.epoch + 1}, batch 0"
    else:
        where = f"epoch {progress.epoch}, batch {progress.batch}"
    restored, left_out = _parts_restored(trainer, payload)
    name = title(path) if is_url(path) else os.path.relpath(path)
    line = f"resumed from {name}  step {progress.global_step}  restored: {', '.join(restored)}"
    if left_out:
        line += f"  not restored: {', '.join(left_out)}"
    rank_zero_info(f"{line}  goes on at {where}")


def _parts_restored(trainer: Trainer, payload: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The parts of a run that the checkpoint gave back, and those that it did not, each with the reason."""
    run, restored, left_out = payload["holdfast"], ["weights"], []
    for key, what, live in (
        ("optimizer_states", "optimizer(s)", trainer.optimizers),
        ("lr_schedulers", "scheduler(s)", trainer.lr_scheduler_configs),
    ):
        if key in run["afresh"]:
            left_out.append(f"{what} (on_load_checkpoint has emptied {key!r})")
        elif live:
            restored.append(f"{len(live)} {what}")
    scaler = trainer.precision_plugin.scaler
    if scaler is not None and payload.get(trainer.precision_plugin.state_key):
        restored.append("scaler")
    elif scaler is not None:
        left_out.append("scaler (the checkpoint holds none)")
    states, unclaimed = payload.get("callbacks") or {}, run["unclaimed_callbacks"]
    if len(states) > len(unclaimed):
        restored.append(f"{len(states) - len(unclaimed)} callback(s)")
    left_out += [f"{key} (no such callback in this trainer)" for key in unclaimed]
    saved = {str(key).partition("{")[0] for key in states}
    for callback in trainer.callbacks:
        name = type(callback).__qualname__
        if name not in saved and callback.state_dict():
            left_out.append(f"{name} (the checkpoint holds no state of it)")
    if "generators" in run:
        restored.append("generators")
    else:
        left_out.append("generators (the checkpoint holds none)")
    return restored, left_out
