"""A payload taken apart into what goes into shards and the rest, and put together again.

Putting together needs no torch.
"""

from __future__ import annotations

import collections
import copy
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint.itemsizes import ITEMSIZES
from holdfast.checkpoint.sharded_tensors import Key, key_of, titled

if TYPE_CHECKING:
    import torch

_TAKEN = ("state_dict", "optimizer_states")
_MAX_DEPTH = 100


def split(payload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take out of a payload what is saved in shards; returns the rest and the tensors by their keys.

    These are the tensors under ``state_dict`` and ``optimizer_states``, and DTensors wherever they are. In
    the rest None stands in their places. A key is its path as JSON: ``'["state_dict","net.0.weight"]'``.
    The payload itself stays as it is; the rest shares with it what did not have to be changed.
    """
    tensors: dict[str, torch.Tensor] = {}
    rest = {
        key: _without(value, (key,), key in _TAKEN, tensors, set()) if type(key) is str else value
        for key, value in payload.items()
    }
    return rest, tensors


def join(rest: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put the tensors that `split` took out back into the rest, which itself stays as it is.

    Raises:
        ValueError: there is no place for one of them.
    """
    tree: dict[Any, Any] = {}
    for key, tensor in tensors.items():
        at, path = tree, json.loads(key)
        for part in path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ValueError(f"{titled(path)} lies within another tensor")
        if path[-1] in at:
            raise ValueError(f"{titled(path)} holds other tensors")
        at[path[-1]] = tensor
    made = _with(dict(rest), tree, ())
    assert isinstance(made, dict)
    return made


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor; where nobody has made one, nothing is imported to find out."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def _is_storable(value: torch.Tensor) -> bool:
    import torch

    if is_dtensor(value):
        return True
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        return False
    if value.is_meta or value.is_quantized or value.is_conj() or value.is_neg():
        return False
    return str(value.dtype)[6:] in ITEMSIZES and not str(value.dtype).startswith(("torch.q", "torch.bits"))


def _without(value: Any, path: Key, taken: bool, tensors: dict[str, torch.Tensor], active: set[int]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        if (taken or is_dtensor(value)) and _is_storable(value):
            tensors[key_of(path)] = value
            return None
        return value
    kind = type(value)
    if kind not in (dict, collections.OrderedDict, list, tuple) or len(path) > _MAX_DEPTH:
        return value
    if id(value) in active:
        return value
    active.add(id(value))
    items = value.items() if isinstance(value, dict) else enumerate(value)
    changed = {}
    for part, member in items:
        if type(part) in (str, int):
            other = _without(member, (*path, part), taken, tensors, active)
            if other is not member:
                changed[part] = other
    active.discard(id(value))
    return _changed(value, changed) if changed else value


def _changed(value: Any, members: Mapping[Any, Any]) -> Any:
    """A copy of a container with other members in some places."""
    if isinstance(value, tuple):
        return tuple(members.get(index, member) for index, member in enumerate(value))
    made = copy.copy(value)  # which keeps a state dict's _metadata
    for part, member in members.items():
        made[part] = member
    return made


def _with(value: Any, tree: dict[Any, Any], path: Key) -> Any:
    changed = {}
    for part, inside in tree.items():
        if isinstance(value, dict):
            there = part in value
        else:
            there = isinstance(value, (list, tuple)) and type(part) is int and 0 <= part < len(value)
        if not there:
            raise ValueError(f"there is no place for {titled((*path, part))}")
        if isinstance(inside, dict):
            changed[part] = _with(value[part], inside, (*path, part))
        elif value[part] is not None:
            raise ValueError(f"the place of {titled((*path, part))} is taken")
        else:
            changed[part] = inside
    return _changed(value, changed)
