"""What changed in PyTorch Lightning's checkpoints from 0.6 to 2.x, oldest first: a table of small functions.

A row looks at the payload rather than at its version, since plenty of files have none. Each function names
the change behind it. A payload in today's shape passes through all of them untouched. What 2.0 renamed within
"loops" needs no row: nothing under those names is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from holdfast.utilities.rank_zero import rank_zero_warn

Payload = dict[str, Any]


class Change(NamedTuple):
    """One change of the layout."""

    version: str
    """The version of Lightning that made it."""
    applies: Callable[[Payload], bool]
    """Whether the payload was written before it."""
    make: Callable[[Payload], None]
    """Make it, in the payload itself; what lies deeper is replaced, never changed."""


# -- 0.8, 0.9: hyperparameters -------------------------------------------------------------------------------


def _has_early_hyperparameters(payload: Payload) -> bool:
    return "hparams" in payload or "module_arguments" in payload


def _rename_hyperparameters(payload: Payload) -> None:
    """0.7 had "hparams", the attributes of the one argument hparams; 0.8 "module_arguments"; then today's."""
    arguments = "module_arguments" in payload or "hyper_parameters" in payload
    whole, each = payload.pop("hparams", None), payload.pop("module_arguments", None)
    merged: dict[Any, Any] = {}
    for values in (whole, each, payload.get("hyper_parameters")):
        merged.update(values if isinstance(values, Mapping) else getattr(values, "__dict__", {}))
    payload["hyper_parameters"] = merged
    payload.setdefault("hparams_name", "kwargs" if arguments else "hparams")


def _has_a_class_as_type(payload: Payload) -> bool:
    return any(isinstance(payload.get(key), type) for key in ("hparams_type", "datamodule_hparams_type"))


def _name_the_type(payload: Payload) -> None:
    """Lightning writes the class itself; its name says as much, and needs nothing imported."""
    for key in ("hparams_type", "datamodule_hparams_type"):
        if isinstance(payload.get(key), type):
            payload[key] = f"{payload[key].__module__}.{payload[key].__qualname__}"


# -- callbacks -----------------------------------------------------------------------------------------------

_AT_THE_TOP = {
    "checkpoint_callback_best_model_score": ("ModelCheckpoint", "best_model_score"),
    "checkpoint_callback_best": ("ModelCheckpoint", "best_model_score"),
    "checkpoint_callback_best_model_path": ("ModelCheckpoint", "best_model_path"),
    "early_stop_callback_wait": ("EarlyStopping", "wait_count"),
    "early_stop_callback_patience": ("EarlyStopping", "patience"),
}


def _has_callbacks_at_the_top(payload: Payload) -> bool:
    return any(key in payload for key in _AT_THE_TOP)


def _move_callbacks(payload: Payload) -> None:
    """0.10 gave callbacks a place of their own; until then the two that had a state kept it at the top."""
    _name_the_classes(payload)
    callbacks = dict(payload["callbacks"])
    for key, (name, field) in _AT_THE_TOP.items():
        if key in payload:
            callbacks[name] = {**inner(callbacks, name), field: payload.pop(key)}
    payload["callbacks"] = callbacks


def _has_classes_as_keys(payload: Payload) -> bool:
    return any(isinstance(key, type) for key in _states(payload))


def _name_the_classes(payload: Payload) -> None:
    """Until 1.5 the class itself was the key of a callback's state; now it is its name, and more."""
    payload["callbacks"] = {
        key.__qualname__ if isinstance(key, type) else key: state for key, state in _states(payload).items()
    }


_SINCE_1_9 = re.compile(r"(ModelCheckpoint\{.*), 'save_on_train_epoch_end': (?:True|False|None)\}", re.DOTALL)


def _has_longer_keys(payload: Payload) -> bool:
    return any(isinstance(key, str) and _SINCE_1_9.fullmatch(key) for key in _states(payload))


def _shorten_keys(payload: Payload) -> None:
    """1.9 took ``save_on_train_epoch_end`` out of ModelCheckpoint's key; two that differ in it stay apart."""
    states = _states(payload)
    shorter = {
        key: match[1] + "}" for key in states if isinstance(key, str) and (match := _SINCE_1_9.fullmatch(key))
    }
    taken = [shorter.get(key, key) for key in states]
    payload["callbacks"] = {
        shorter[key] if key in shorter and taken.count(shorter[key]) == 1 else key: state
        for key, state in states.items()
    }


def _states(payload: Payload) -> Mapping[Any, Any]:
    return inner(payload, "callbacks")


# -- loss scaling --------------------------------------------------------------------------------------------

_SCALERS = ("native_amp_scaling_state", "NativeMixedPrecisionPlugin", "MixedPrecisionPlugin")


def _has_an_old_scaler(payload: Payload) -> bool:
    return any(key in payload for key in _SCALERS)


def _rename_scaler(payload: Payload) -> None:
    """The scaler had a key of its own, and since 1.6 the name of its plugin, which changed twice."""
    for key in _SCALERS:
        if key in payload:
            payload.setdefault("MixedPrecision", payload[key])
            del payload[key]


def _has_apex(payload: Payload) -> bool:
    return "amp_scaling_state" in payload


def _drop_apex(payload: Payload) -> None:
    """2.0 dropped NVIDIA's apex, whose scaling state nothing else understands."""
    del payload["amp_scaling_state"]
    if not any(key in payload for key in (*_SCALERS, "MixedPrecision")):
        rank_zero_warn(
            "The checkpoint's loss scaling is apex's, which is no more: it is left out, and a scaler starts "
            "anew."
        )


# -- position ------------------------------------------------------------------------------------------------


def _has_no_loops(payload: Payload) -> bool:
    """Lightning's of before 1.6; in plain torch's and other makers' files "epoch" means what they like."""
    version = re.match(r"(\d+)\.(\d+)", str(payload.get("pytorch-lightning_version", "")))
    if version is not None:
        old = (int(version[1]), int(version[2])) < (1, 6)
    else:  # 0.7 and earlier wrote no version
        old = "hparams_name" in payload or "callbacks" in payload
    return old and not isinstance(payload.get("loops"), Mapping)


def _add_loops(payload: Payload) -> None:
    """1.6 keeps the position in "loops"; until then it was what comes next: epoch + 1 and global_step + 1.

    A file that was saved in the middle of an epoch says the same, and a run goes on from it with the next
    epoch, as it did then.
    """
    epoch, step = count(payload.get("epoch")), count(payload.get("global_step"))
    none = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    payload["loops"] = {
        "fit_loop": {
            "epoch_progress": {"current": {"ready": epoch, "processed": epoch, "completed": epoch}},
            "epoch_loop.batch_progress": {"current": none, "total": {"processed": step}},
            "epoch_loop.state_dict": {},
        }
    }


def _lacks_steps(payload: Payload) -> bool:
    loop = _fit_loop(payload)
    return bool(loop) and "_batches_that_stepped" not in inner(loop, "epoch_loop.state_dict")


def _add_steps(payload: Payload) -> None:
    """1.6.5 counts the batches that stepped, for the loggers' axis; until then it was the global step."""
    loop = _fit_loop(payload)
    steps = {"_batches_that_stepped": count(payload.get("global_step"))}
    changed = {**loop, "epoch_loop.state_dict": {**inner(loop, "epoch_loop.state_dict"), **steps}}
    payload["loops"] = {**payload["loops"], "fit_loop": changed}


def _fit_loop(payload: Payload) -> Mapping[str, Any]:
    return inner(payload, "loops", "fit_loop")


def count(value: Any) -> int:
    """A counter; 0 for what is not one, such as the None or "best" of somebody's own files."""
    return value if isinstance(value, int) else 0


def inner(mapping: Any, *keys: str) -> Mapping[Any, Any]:
    """The mapping below these keys; an empty one where there is none."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping if isinstance(mapping, Mapping) else {}


CHANGES: tuple[Change, ...] = (
    Change("0.9.0", _has_early_hyperparameters, _rename_hyperparameters),
    Change("0.10.0", _has_callbacks_at_the_top, _move_callbacks),
    Change("1.5.0", _has_classes_as_keys, _name_the_classes),
    Change("1.6.0", _has_no_loops, _add_loops),
    Change("1.6.5", _lacks_steps, _add_steps),
    Change("1.9.0", _has_longer_keys, _shorten_keys),
    Change("2.0.0", _has_apex, _drop_apex),
    Change("2.2.0", _has_an_old_scaler, _rename_scaler),
    Change("2.6.0", _has_a_class_as_type, _name_the_type),
)
