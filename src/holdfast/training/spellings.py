"""Arguments of `Trainer` as they were once spelled, and those of Lightning's that there are not: two tables.

An old spelling works and warns once, naming today's form. What is left out is refused by name, with what to
use instead.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec

from holdfast.errors import ArgumentError, ConfigError
from holdfast.utilities.rank_zero import rank_zero_deprecation
from holdfast.utilities.unknown_names import unexpected_argument

P = ParamSpec("P")
Translation = tuple[dict[str, Any], str]
"""Today's arguments for an old one, and how they are spelled."""

_RENAMED = {
    "replace_sampler_ddp": "use_distributed_sampler",
    "train_percent_check": "limit_train_batches",
    "val_percent_check": "limit_val_batches",
    "test_percent_check": "limit_test_batches",
    "row_log_interval": "log_every_n_steps",
    "default_save_path": "default_root_dir",
    "nb_sanity_val_steps": "num_sanity_val_steps",
    "max_nb_epochs": "max_epochs",
    "min_nb_epochs": "min_epochs",
}

_LEFT_OUT = {
    "amp_level": "Use precision='16-mixed'.",
    "auto_lr_find": "There is no tuner: try learning rates by runs with max_steps=.",
    "auto_scale_batch_size": "There is no tuner: try batch sizes by runs with fast_dev_run=True.",
    "auto_select_gpus": "Name the GPU: devices=[index].",
    "ipus": "Use accelerator='cpu' or 'gpu'.",
    "log_gpu_memory": "Log torch.cuda.memory_allocated() in on_train_batch_end.",
    "multiple_trainloader_mode": "Give fit a holdfast.utilities.CombinedLoader(loaders, mode=...).",
    "stochastic_weight_avg": "Use callbacks=[StochasticWeightAveraging(swa_lrs=...)].",
    "tpu_cores": "Use accelerator='cpu' or 'gpu'.",
    "track_grad_norm": "Log holdfast.utilities.grad_norm(self, 2) in on_before_optimizer_step.",
    "truncated_bptt_steps": "Split the batch in training_step, with automatic_optimization = False.",
}


def _checkpoint_callback(value: Any) -> Translation:
    if isinstance(value, (bool, type(None))):
        return {"enable_checkpointing": value}, f"enable_checkpointing={value}"
    return {"callbacks": [value]}, "callbacks=[...]"


def _early_stop_callback(value: Any) -> Translation:
    if isinstance(value, bool) or value is None:
        from holdfast.callbacks.early_stopping import EarlyStopping

        return (
            {"callbacks": [EarlyStopping("val_loss")] if value else []},
            "callbacks=[EarlyStopping('val_loss')]",
        )
    return {"callbacks": [value]}, "callbacks=[...]"


def _resume_from_checkpoint(value: Any) -> Translation:
    return {"resume_from_checkpoint": value}, f"trainer.fit(..., ckpt_path={value!r})"


def _weights_save_path(value: Any) -> Translation:
    path = None if value is None else os.fspath(value)
    return {"weights_save_path": path}, f"default_root_dir={path!r} or ModelCheckpoint(dirpath=...)"


def _gpus(value: Any) -> Translation:
    if value in (None, 0, "0", []):
        return {"accelerator": "cpu"}, "accelerator='cpu'"
    return {"accelerator": "gpu", "devices": value}, f"accelerator='gpu', devices={value!r}"


def _num_processes(value: Any) -> Translation:
    return {"accelerator": "cpu", "devices": value}, f"accelerator='cpu', devices={value!r}"


def _distributed(value: Any) -> Translation:
    """``accelerator="ddp"`` and its like, which said how processes work together, not where."""
    if value == "ddp_cpu":
        return {"accelerator": "cpu", "strategy": "ddp"}, "accelerator='cpu', strategy='ddp'"
    if value is None:
        return {}, "strategy='auto'"
    return {"strategy": value}, f"strategy={value!r}"


def _weights_summary(value: Any) -> Translation:
    if value is None:
        return {"enable_model_summary": False}, "enable_model_summary=False"
    from holdfast.callbacks.model_summary import ModelSummary

    depth = -1 if value == "full" else 1
    return {"callbacks": [ModelSummary(depth)]}, f"callbacks=[ModelSummary(max_depth={depth})]"


def _progress_bar_refresh_rate(value: Any) -> Translation:
    if value == 0:
        return {"enable_progress_bar": False}, "enable_progress_bar=False"
    return {}, "a progress bar among callbacks=, such as TQDMProgressBar(refresh_rate=...)"


def _reload_every_epoch(value: Any) -> Translation:
    times = int(bool(value))
    return {"reload_dataloaders_every_n_epochs": times}, f"reload_dataloaders_every_n_epochs={times}"


def _amp_backend(value: Any) -> Translation:
    if value != "native":
        raise ConfigError(
            f"Trainer(amp_backend={value!r}) is not there: torch's own is. Use precision='16-mixed'."
        )
    return {}, "precision='16-mixed'"


def _terminate_on_nan(value: Any) -> Translation:
    return {"detect_anomaly": bool(value)}, f"detect_anomaly={bool(value)}"


_OLD: dict[str, Callable[[Any], Translation]] = {
    "amp_backend": _amp_backend,
    "checkpoint_callback": _checkpoint_callback,
    "distributed_backend": _distributed,
    "early_stop_callback": _early_stop_callback,
    "gpus": _gpus,
    "num_processes": _num_processes,
    "progress_bar_refresh_rate": _progress_bar_refresh_rate,
    "reload_dataloaders_every_epoch": _reload_every_epoch,
    "resume_from_checkpoint": _resume_from_checkpoint,
    "terminate_on_nan": _terminate_on_nan,
    "weights_save_path": _weights_save_path,
    "weights_summary": _weights_summary,
}

# Old values of arguments that are still there: (argument, value) -> its translation.
_OLD_VALUES: dict[tuple[str, Any], Callable[[Any], Translation]] = {
    **{
        ("accelerator", value): _distributed
        for value in ("ddp", "ddp2", "ddp_cpu", "ddp_spawn", "ddp_sharded", "dp", "horovod")
    },
    **{
        ("precision", value): lambda value: ({"precision": "16-mixed"}, "precision='16-mixed'")
        for value in (16, "16")
    },
}


def today(given: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Today's arguments for the given ones; each old spelling is said once.

    Args:
        given: The arguments of a call.
        known: The arguments that there are today.

    Raises:
        ArgumentError: there is no such argument; the message names the nearest, or what to use instead.
        ConfigError: an old spelling and today's were given both.
    """
    arguments: dict[str, Any] = {}
    old: list[tuple[str, Any]] = []
    for name, value in given.items():
        hashable = isinstance(value, (str, int)) and not isinstance(value, bool)
        if name in _OLD or name in _RENAMED or (hashable and (name, value) in _OLD_VALUES):
            old.append((name, value))
        elif name in known:
            arguments[name] = value
        else:
            raise _unexpected(name, sorted(known))
    for name, value in old:
        if name in _RENAMED:
            meant, spelled = {_RENAMED[name]: value}, f"{_RENAMED[name]}={value!r}"
        else:
            translate = _OLD[name] if name in _OLD else _OLD_VALUES[name, value]
            meant, spelled = translate(value)
        _add(arguments, meant, name)
        rank_zero_deprecation(f"Trainer({name}={_brief(value)}) is the spelling of 1.x: use {spelled}.")
    return arguments


def _add(arguments: dict[str, Any], meant: dict[str, Any], name: str) -> None:
    for key, value in meant.items():
        there = arguments.get(key)
        if key == "callbacks":
            own = list(there) if isinstance(there, (list, tuple)) else [] if there is None else [there]
            arguments[key] = own + value
        elif key == "accelerator" and there in ("cpu", "gpu", "cuda", "auto"):
            continue  # gpus=1, accelerator="gpu" say the same
        elif there is not None and there != value:
            raise ConfigError(
                f"Trainer({name}=...) is the old spelling of {key}=, which is given as well, with another "
                f"value: {there!r}. Leave {name}= out."
            )
        else:
            arguments[key] = value


def _brief(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, os.PathLike, type(None))) else "..."


def _unexpected(name: str, known: list[str]) -> ArgumentError:
    if name in _LEFT_OUT:
        return ArgumentError(f"Trainer({name}=...) is not there. {_LEFT_OUT[name]}")
    return unexpected_argument("Trainer", name, known)


def takes_old_spellings(init: Callable[P, None]) -> Callable[P, None]:
    """Let ``Trainer.__init__`` be called with the spellings in the tables above."""
    parameters = inspect.signature(init).parameters
    known = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    hidden = {"resume_from_checkpoint", "weights_save_path"}

    @functools.wraps(init)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        trainer: Any = args[0]
        arguments = today(dict(kwargs), known)
        for name in hidden:
            setattr(trainer, name, arguments.pop(name, None))
        init(*args, **arguments)

    return wrapped
