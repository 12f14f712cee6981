"""`load_from_checkpoint`: a module or datamodule built again from a file that was checked first."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.checkpoint import origin
from holdfast.checkpoint.load import load_mapped
from holdfast.checkpoint.mapped import Loaded
from holdfast.checkpoint.migrate import upgrade
from holdfast.errors import CheckpointIncompatible
from holdfast.training.averages import check_choice, chosen_weights
from holdfast.training.declared import (
    as_declared,
    build_dataclass,
    declared_types,
    is_dataclass,
    is_inert,
)
from holdfast.training.hooks import CheckpointHooks
from holdfast.training.hparams import KWARGS, is_config, with_values
from holdfast.training.hparams_file import read_hparams_file
from holdfast.training.model_changes import make_room
from holdfast.training.run import configure_model
from holdfast.training.weights import load_weights
from holdfast.utilities.parsing import AttributeDict
from holdfast.utilities.rank_zero import rank_zero_warn
from holdfast.utilities.unknown_names import did_you_mean


def build_from_checkpoint(
    cls: type[Any],
    source: origin.Source,
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    overrides: Mapping[str, Any],
    which_weights: str | None = None,
) -> Any:
    """`LightningModule.load_from_checkpoint`, and a datamodule's.

    Args:
        cls: What to build.
        source: A path, a URL or an open file; the state of optimizers in it is read for a hook alone.
        map_location: As `checkpoint.load.load` takes it; the module goes where its first weight went.
        hparams_file: Read instead of the saved hyperparameters.
        strict: Whether every key must match; None means the built module's ``strict_loading``.
        overrides: Arguments for ``__init__`` that win over the saved ones.
        which_weights: As `averages.chosen_weights` takes it.
    """
    check_choice(which_weights)
    title = origin.title(source)
    # A hook of the user's gets to see the checkpoint, and may want any part of it.
    shown = cls.on_load_checkpoint is not CheckpointHooks.on_load_checkpoint
    skip = () if shown else ("optimizer_states",)
    loaded = load_mapped(source, map_location=map_location, skip=skip)
    loaded.payload = upgrade(loaded.payload, source=title)
    try:
        return _built(cls, loaded, title, hparams_file, strict, overrides, which_weights)
    finally:
        loaded.release()


def _built(
    cls: type[Any],
    loaded: Loaded,
    title: str,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    overrides: Mapping[str, Any],
    which_weights: str | None,
) -> Any:
    payload = loaded.payload
    saved = payload.get(cls.CHECKPOINT_HYPER_PARAMS_KEY)
    name = payload.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    kind = payload.get(cls.CHECKPOINT_HYPER_PARAMS_TYPE)
    if hparams_file is not None:
        saved, kind = read_hparams_file(hparams_file), None
    if saved is not None and not isinstance(saved, Mapping) and not is_config(saved):
        saved = vars(saved)
    own = payload.get("holdfast")
    left_out = own.get("omitted_hyper_parameters", ()) if isinstance(own, Mapping) else ()
    built: Any = instantiate(cls, saved or {}, name, overrides, kind=kind, left_out=left_out)
    if not issubclass(cls, nn.Module):
        built.on_load_checkpoint(payload)
        if cls.__qualname__ in payload:
            built.load_state_dict(payload[cls.__qualname__])
        return built
    configure_model(built)
    payload["state_dict"] = chosen_weights(payload, which_weights, os.path.basename(title))
    built.on_load_checkpoint(payload)
    if strict is None:
        strict = built.strict_loading
    weights = payload["state_dict"]
    changes = own.get("model") or {} if isinstance(own, Mapping) else {}
    make_room(built, changes, weights)
    loaded.check()
    load_weights(
        built,
        weights,
        strict=strict,
        source=os.path.basename(title),
        omitted=changes.get("omitted_extra_states", ()),
    )
    first = next((value for value in weights.values() if isinstance(value, Tensor)), None)
    return built.to(torch.device("cpu") if first is None else first.device)


# -- building ------------------------------------------------------------------------------------------------


def instantiate(
    cls: type[Any],
    saved: Any,
    name: str | None,
    overrides: Mapping[str, Any],
    *,
    kind: str | None = None,
    left_out: Iterable[str] = (),
) -> Any:
    """Build ``cls`` from saved hyperparameters and overrides, less what ``__init__`` does not take.

    Args:
        cls: The class to build.
        saved: The checkpoint's ``hyper_parameters``.
        name: Its ``hparams_name``: the argument that takes them all as one object, or "kwargs".
        overrides: Arguments given by the caller.
        kind: Its ``hparams_type``: what that object was, by name.
        left_out: Arguments that the checkpoint could not hold.

    Raises:
        CheckpointIncompatible: ``__init__`` wants an argument that is neither saved nor given.
    """
    parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in _VARIADIC]
    unmet = [key for key in required if key not in saved and key not in overrides]
    if saved and (unmet == ["hparams"] or (name is None and len(unmet) == 1)):
        # Lightning lost the name, or self.hparams.update(...) filled them: there is one place that they fit.
        name = unmet[0]
    if name and name != KWARGS and name in parameters:
        values = {key: value for key, value in overrides.items() if key in parameters}
        # What it needs besides, such as the arguments of a second save_hyperparameters().
        values |= {key: saved[key] for key in required if key not in values and key in saved}
        if name not in values:
            whole = with_values(_own(saved), overrides)
            values[name] = _as_it_was(whole, kind, cls, name)
    else:
        hints = declared_types(cls.__init__)
        known = {str(key): as_declared(saved[key], hints.get(str(key))) for key in saved}
        lost = {key for key, value in known.items() if is_inert(value)}
        _warn_of_defaults(cls, {*lost, *left_out} - set(overrides), parameters)
        values = {key: value for key, value in known.items() if key not in lost} | dict(overrides)
        if not takes_any:
            _warn_of_typos(cls, overrides, parameters)
            values = {key: value for key, value in values.items() if key in parameters}
    missing = [key for key in required if key not in values]
    if missing:
        raise CheckpointIncompatible(
            f"{cls.__name__}.load_from_checkpoint: __init__ needs {', '.join(map(repr, missing))}, which the "
            f"checkpoint's hyperparameters {sorted(map(str, saved))} do not hold. Give it as a keyword "
            f"argument, or call self.save_hyperparameters() in __init__ before training."
        )
    leading = [p for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    positional = [values.pop(p.name, p.default) for p in leading]
    return cls(*positional, **values)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _own(saved: Any) -> Any:
    return saved if is_config(saved) else AttributeDict({str(key): saved[key] for key in saved})


def _as_it_was(whole: Any, kind: str | None, cls: type[Any], name: str) -> Any:
    """The one object that ``__init__`` takes: what it was in training, or one with the same attributes."""
    if is_config(whole):
        return whole
    if kind is not None and kind.rpartition(".")[2] == "Namespace":
        return argparse.Namespace(**whole)
    # A type that the program itself names may be built; one that only the file names never is.
    declared = declared_types(cls.__init__).get(name)
    if kind is None and declared is argparse.Namespace:
        return argparse.Namespace(**whole)
    return build_dataclass(declared, whole) if is_dataclass(declared) else whole


def _warn_of_defaults(cls: type[Any], lost: Iterable[str], parameters: Mapping[str, Any]) -> None:
    """Say which arguments are their defaults because the checkpoint could not hold what they were."""
    for key in sorted(lost):
        if key in parameters and parameters[key].default is not inspect.Parameter.empty:
            rank_zero_warn(
                f"{cls.__name__}.load_from_checkpoint: the checkpoint could not hold {key!r}, so it is "
                f"__init__'s default. Give {key}=... for another."
            )


def _warn_of_typos(cls: type[Any], overrides: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    for key in overrides:
        hint = "" if key in parameters else did_you_mean(key, parameters, cutoff=0.7)
        if hint:
            rank_zero_warn(
                f"{cls.__name__}.load_from_checkpoint({key}=...): __init__ takes no {key!r}, so it is left "
                f"out.{hint}"
            )
