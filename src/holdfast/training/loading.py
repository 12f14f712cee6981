"""`load_from_checkpoint`: a module or datamodule built again from a file that was checked first."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.checkpoint import origin
from holdfast.checkpoint.load import load
from holdfast.checkpoint.migrate import upgrade
from holdfast.errors import CheckpointIncompatible
from holdfast.training.hparams import KWARGS, is_config, with_values
from holdfast.training.hparams_file import read_hparams_file
from holdfast.training.weights import load_weights
from holdfast.utilities.parsing import AttributeDict
from holdfast.utilities.rank_zero import rank_zero_warn


def build_from_checkpoint(
    cls: type[Any],
    source: origin.Source,
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    overrides: Mapping[str, Any],
) -> Any:
    """`LightningModule.load_from_checkpoint`, and a datamodule's.

    Args:
        cls: What to build.
        source: A path, a URL or an open file; the state of optimizers in it is not read.
        map_location: As `checkpoint.load.load` takes it; the module goes where its first weight went.
        hparams_file: Read instead of the saved hyperparameters.
        strict: Whether every key must match; None means the built module's ``strict_loading``.
        overrides: Arguments for ``__init__`` that win over the saved ones.
    """
    title = origin.title(source)
    payload = upgrade(load(source, map_location=map_location, skip=("optimizer_states",)), source=title)
    saved = payload.get(cls.CHECKPOINT_HYPER_PARAMS_KEY)
    name = payload.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    kind = payload.get(f"{cls.CHECKPOINT_HYPER_PARAMS_NAME.removesuffix('name')}type")
    if hparams_file is not None:
        saved, kind = read_hparams_file(hparams_file), None
    if saved is not None and not isinstance(saved, Mapping) and not is_config(saved):
        saved = vars(saved)
    built: Any = instantiate(cls, saved or {}, name, overrides, kind=kind)
    if not issubclass(cls, nn.Module):
        built.on_load_checkpoint(payload)
        if cls.__qualname__ in payload:
            built.load_state_dict(payload[cls.__qualname__])
        return built
    from holdfast.training.run import configure_model

    configure_model(built)
    built.on_load_checkpoint(payload)
    if strict is None:
        strict = built.strict_loading
    weights = payload["state_dict"]
    load_weights(built, weights, strict=strict, source=os.path.basename(title))
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
) -> Any:
    """Build ``cls`` from saved hyperparameters and overrides, less what ``__init__`` does not take.

    Args:
        cls: The class to build.
        saved: The checkpoint's ``hyper_parameters``.
        name: Its ``hparams_name``: the argument that takes them all as one object, or "kwargs".
        overrides: Arguments given by the caller.
        kind: Its ``hparams_type``: what that object was, by name.

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
        values = {**{str(key): saved[key] for key in saved}, **overrides}
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
    declared = _declared(cls.__init__).get(name)
    if kind is None and declared is argparse.Namespace:
        return argparse.Namespace(**whole)
    return _dataclass(declared, whole) if _is_dataclass(declared) else whole


def _declared(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # an annotation that cannot be looked up, such as one under TYPE_CHECKING
        return dict(getattr(function, "__annotations__", {}))


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    hints = _declared(kind)
    taken = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values}
    for key, value in taken.items():
        if _is_dataclass(hints.get(key)) and isinstance(value, Mapping):
            taken[key] = _dataclass(hints[key], value)
    return kind(**taken)


def _warn_of_typos(cls: type[Any], overrides: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    for key in overrides:
        near = [] if key in parameters else difflib.get_close_matches(key, parameters, n=1, cutoff=0.7)
        if near:
            rank_zero_warn(
                f"{cls.__name__}.load_from_checkpoint({key}=...): __init__ takes no {key!r}, so it is left "
                f"out. Did you mean {near[0]!r}?"
            )
