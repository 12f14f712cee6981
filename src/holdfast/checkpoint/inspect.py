"""An account of what a checkpoint file holds, as one plain dict: nothing of it is run, no tensor is read."""

from __future__ import annotations

import argparse
import collections
import math
from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint.contents import Contents
from holdfast.checkpoint.foreign_types import Opaque
from holdfast.checkpoint.inert import TensorFacts
from holdfast.checkpoint.model_tensors import Module, models_in, module_tree, tensors_in

_MOST_VALUES = 5_000
_MOST_TEXT = 1_000
_MAX_DEPTH = 12
_HYPERPARAMETERS = (
    "hyper_parameters",
    "module_arguments",
    "hparams",
)  # today's key and Lightning's early ones


def describe(contents: Contents, *, tensors: bool = False) -> dict[str, Any]:
    """What a file holds, in values that JSON has.

    Args:
        contents: the file, opened.
        tensors: list each tensor of the payload as well.
    """
    value, summary = contents.value, contents.summary
    top = value if isinstance(value, Mapping) else {}
    own = _mapping(top.get("holdfast"))
    account: dict[str, Any] = {
        "path": contents.name,
        "size_bytes": contents.size_bytes,
        "maker": contents.maker,
        "format": contents.form,
        "step": _count(summary.step if summary else top.get("global_step")),
        "epoch": _count(summary.epoch if summary else top.get("epoch")),
        "metrics": plain(summary.metrics) if summary else {},
        "saved_at": summary.saved_at if summary else None,
        "exact": summary.exact if summary else False,
        "kind": summary.kind if summary else None,
        "lightning_version": plain(top.get("pytorch-lightning_version")),
        "models": [_model(key, found) for key, found in models_in(value).items()],
        "hyper_parameters": _first(top, *_HYPERPARAMETERS),
        "datamodule_hyper_parameters": _first(top, "datamodule_hyper_parameters"),
        "optimizers": _optimizers(top, own),
        "schedulers": _schedulers(top, own),
        "callbacks": [str(key)[:_MOST_TEXT] for key in _mapping(top.get("callbacks"))],
        "position": plain(_mapping(own.get("progress"))),
        "environment": plain(_mapping(own.get("environment"))),
        "parts": _parts(value),
        "omissions": [{"path": path, "reason": reason} for path, reason in contents.omissions],
        "inert_classes": contents.inert,
        "refused_names": contents.unlisted if contents.maker == "holdfast" else [],
        "metadata": plain(contents.metadata),
    }
    if tensors:
        account["tensors"] = _tensors(value)
    return account


def _first(top: Mapping[Any, Any], *keys: str) -> Any:
    return plain(next((top[key] for key in keys if top.get(key) is not None), {}))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _model(key: str, tensors: Mapping[str, TensorFacts]) -> dict[str, Any]:
    tree = module_tree(tensors)
    dtypes: collections.Counter[str] = collections.Counter()
    modules = list(tree.walk())
    for module in modules:
        for leaf, tensor in module.tensors.items():
            dtypes[tensor.dtype] += 0 if leaf in module.ties else tensor.numel
    ties = [
        [first, f"{module.name}.{leaf}".lstrip(".")]
        for module in modules
        for leaf, first in module.ties.items()
    ]
    return {
        "key": key,
        "tensors": len(tensors),
        "values": tree.values,
        "size_bytes": tree.size_bytes,
        "dtypes": dict(dtypes),
        "modules": [_module(module) for module in modules],
        "tied": ties,
    }


def _module(module: Module) -> dict[str, Any]:
    own = {name: [tensor.dtype, list(tensor.shape)] for name, tensor in module.tensors.items()}
    return {"name": module.name, "values": module.values, "size_bytes": module.size_bytes, "tensors": own}


def _optimizers(top: Mapping[Any, Any], own: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Lightning's list, or what a loop of one's own keeps under "optimizer"."""
    states = top.get("optimizer_states")
    if not isinstance(states, list):
        states = [state for key, state in top.items() if "optim" in str(key) and _is_optimizer(state)]
    found = []
    for index, state in enumerate(states):
        if not _is_optimizer(state):
            continue
        groups = []
        for group in state["param_groups"]:
            rest = {key: value for key, value in _mapping(group).items() if key != "params"}
            params = _mapping(group).get("params")
            count = len(params) if isinstance(params, (list, tuple)) else 0
            groups.append({"parameters": count, "options": plain(rest)})
        number, size_bytes = _sizes(state)
        name = _class_of(own, "optimizers", index)
        found.append({"class": name, "groups": groups, "tensors": number, "size_bytes": size_bytes})
    return found


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and "state" in state and isinstance(state.get("param_groups"), list)


def _schedulers(top: Mapping[Any, Any], own: Mapping[Any, Any]) -> list[dict[str, Any]]:
    states = top.get("lr_schedulers")
    if not isinstance(states, list):
        return []
    return [
        {"class": _class_of(own, "schedulers", index), "state": plain(state)}
        for index, state in enumerate(states)
        if isinstance(state, Mapping)
    ]


def _class_of(own: Mapping[Any, Any], kind: str, index: int) -> str | None:
    known = _mapping(own.get("command")).get(kind)
    about = known[index] if isinstance(known, list) and index < len(known) else None
    name = _mapping(about).get("class")
    return name[:200] if isinstance(name, str) else None


def _sizes(value: Any, seen: set[Any] | None = None) -> tuple[int, int]:
    """How many tensors a value holds, and their bytes; those in ``seen`` add none."""
    seen = set() if seen is None else seen
    number = size_bytes = 0
    for _, tensor in tensors_in(value):
        number += 1
        if tensor.identity is None or tensor.identity not in seen:
            size_bytes += tensor.size_bytes
            seen.add(tensor.identity)
    return number, size_bytes


def _parts(value: Any) -> list[dict[str, Any]]:
    """The payload's top-level keys and what their tensors take; a shared one counts for the first."""
    if not isinstance(value, Mapping):
        return []
    seen: set[Any] = set()
    found = []
    for key, part in value.items():
        number, size_bytes = _sizes(part, seen)
        if number or not isinstance(part, (Mapping, list)) or part:
            found.append({"key": str(key)[:_MOST_TEXT], "tensors": number, "size_bytes": size_bytes})
    return found


def _tensors(value: Any) -> list[dict[str, Any]]:
    first: dict[Any, str] = {}
    rows = []
    for path, tensor in tensors_in(value):
        name = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
        known = None if tensor.identity is None else first.setdefault(tensor.identity, name)
        rows.append({
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "size_bytes": tensor.size_bytes,
            "layout": tensor.layout,
            "device": tensor.location,
            "same_as": known if known != name else None,
        })  # fmt: skip
    return rows


def plain(value: Any) -> Any:
    """A value as JSON has it, cut where it is large; numbers that JSON lacks become text ("nan")."""
    return _Plain().of(value, 0)


class _Plain:
    def __init__(self) -> None:
        self.left = _MOST_VALUES

    def of(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > _MAX_DEPTH:
            return "..."
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return (
                int(value) if value.bit_length() <= 2000 else f"a whole number of {value.bit_length()} bits"
            )
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, str):
            return value if len(value) <= _MOST_TEXT else f"{value[:_MOST_TEXT]}..."
        if isinstance(value, (bytes, bytearray)):
            return f"{len(value)} bytes"
        if type(value) is TensorFacts:
            return {"tensor": value.dtype, "shape": list(value.shape)}
        if isinstance(value, Opaque):
            return {"class": value.qualified_name[:_MOST_TEXT]}
        if isinstance(value, (argparse.Namespace, Mapping)):
            pairs = (value if isinstance(value, Mapping) else vars(value)).items()
            return {_text(key): self.of(member, depth + 1) for key, member in self._some(pairs)}
        if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            return [self.of(member, depth + 1) for member in self._some(value)]
        shape = getattr(value, "shape", None)
        if shape is not None:  # a NumPy array
            return {"array": str(value.dtype), "shape": list(shape)}
        return _text(value)

    def _some(self, members: Any) -> list[Any]:
        return [member for member, _ in zip(members, range(max(0, self.left) + 1), strict=False)]


def _text(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 2000:
        return f"a whole number of {value.bit_length()} bits"
    return str(value)[:_MOST_TEXT]
