"""A dict of live objects as a payload, and a payload back into the live objects: all of it, or none of it.

What may be in the dict: anything with ``state_dict()`` and ``load_state_dict()``, tensors, generators of
random numbers, plain values, and dicts and lists of these. What a value is called in messages and in the
file is its path: ``models/encoder``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from holdfast.checkpoint import payload as payloads
from holdfast.errors import ConfigError
from holdfast.utilities import seed
from holdfast.utilities.wrapped_names import plain_state

MODULE, OPTIMIZER, OBJECT, LOADER = "module", "optimizer", "object", "loader"
TENSOR, GENERATOR, VALUE, DICT, LIST = "tensor", "generator", "value", "dict", "list"
_MAX_DEPTH = 50


class Leaf(NamedTuple):
    """One thing in the dict that is saved as a whole: its path, what it is, and the thing itself."""

    path: str
    kind: str
    value: Any


class Captured(NamedTuple):
    """A dict of live objects in the form in which it is saved.

    Attributes:
        values: the same keys; tensors share memory with the live ones.
        kinds: what each path is.
        omitted: the reason, by path, of what cannot be stored.
    """

    values: dict[str, Any]
    kinds: dict[str, str]
    omitted: dict[str, str]


def kind_of(value: Any, depth: int = 0) -> str:
    """What a value is: one of the words above."""
    if isinstance(value, (bool, int, float, str, bytes, type(None), type)):
        return VALUE
    if isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, nn.Module):
        return MODULE
    if isinstance(value, Optimizer):
        return OPTIMIZER
    if _is_generator(value):
        return GENERATOR
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return LOADER if isinstance(value, DataLoader) else OBJECT
    if isinstance(value, (dict, list, tuple)):
        if depth > _MAX_DEPTH:
            raise ConfigError(f"The state is nested more than {_MAX_DEPTH} levels deep, or contains itself.")
        inside = value.values() if isinstance(value, dict) else value
        if any(kind_of(one, depth + 1) != VALUE for one in inside):
            return DICT if isinstance(value, dict) else LIST
    return VALUE


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def joined(path: str, key: Any) -> str:
    """The path of what lies under a key."""
    return f"{path}/{key}" if path else str(key)


def leaves(state: Any, path: str = "") -> Iterator[Leaf]:
    """Everything in a state that is saved as a whole, in order.

    Raises:
        ConfigError: it is not a dict with text keys; or a plain value lies beside live objects in a tuple, so
            that it could not be put back.
    """
    if not path:
        if not isinstance(state, dict):
            raise ConfigError(
                f"The state is a {type(state).__name__}; give a dict of what is to be saved, such as "
                '{"model": model, "optimizer": optimizer, "epoch": epoch}.'
            )
        for key in state:
            if not isinstance(key, str) or not key or "/" in key:
                raise ConfigError(f"The state has the key {key!r}; keys are text without a slash.")
    for key, value in items_of(state):
        kind, where = kind_of(value), joined(path, key)
        if kind in (DICT, LIST):
            yield from leaves(value, where)
        elif kind == VALUE and isinstance(state, tuple):
            raise ConfigError(
                f"{where} is a plain value in a tuple, where it could not be put back: use a list or a dict."
            )
        else:
            yield Leaf(where, kind, value)


def capture(state: dict[str, Any], places: dict[str, Any] | None = None) -> Captured:
    """The state as it is now, without copying a tensor.

    Args:
        state: The live objects.
        places: Kept from call to call: where the states of generators were put the last time.

    Raises:
        ConfigError: as `leaves`.
    """
    for _ in leaves(state):
        pass  # refuses what could not be put back
    kinds: dict[str, str] = {}
    omitted: dict[str, str] = {}
    values = _captured(state, "", kinds, omitted, {} if places is None else places)
    return Captured(values, kinds, omitted)


def _captured(
    holder: Any, path: str, kinds: dict[str, str], omitted: dict[str, str], places: dict[str, Any]
) -> Any:
    made: dict[Any, Any] = {}
    for key, value in items_of(holder):
        where, kind = joined(path, key), kind_of(value)
        kinds[where] = kind
        reason = _unstorable(value) if kind == VALUE else None
        if reason is not None:
            omitted[where] = reason
        elif kind in (DICT, LIST):
            made[key] = _captured(value, where, kinds, omitted, places)
        elif kind == GENERATOR:
            made[key] = places[where] = seed.in_the_place_of(places.get(where), seed.state_of(value))
        else:
            made[key] = _state_of(kind, value)
    return made if isinstance(holder, dict) else [made.get(index) for index in range(len(holder))]


def items_of(holder: Any) -> list[tuple[Any, Any]]:
    """What a dict or a list holds, with the key of each."""
    return list(holder.items() if isinstance(holder, dict) else enumerate(holder))


def _unstorable(value: Any) -> str | None:
    """Why nothing of a value can be stored, or None."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return None
    if isinstance(value, DataLoader):
        return "a DataLoader has no state_dict(); torchdata's StatefulDataLoader has"
    return next((reason for path, reason in payloads.encode(value).omissions if not path), None)


def _state_of(kind: str, value: Any) -> Any:
    if kind == MODULE:
        module = bare(value)
        return plain_state(module.state_dict(), module)
    if kind in (OPTIMIZER, OBJECT, LOADER):
        return value.state_dict()
    return value


def bare(module: nn.Module) -> nn.Module:
    """The module that `DistributedDataParallel` or `DataParallel` was given, or the module itself."""
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    return module


def late_tensors(state: dict[str, Any]) -> list[Tensor]:
    """The tensors that only a step of an optimizer in the state changes.

    These are the parameters that require a gradient and sit in its groups, and what it keeps for them. Left
    out are optimizers whose step may be part of a CUDA graph (``capturable``: replaying it runs no hook), or
    that have a mode for evaluation (which exchanges weights outside of their steps), and embeddings with
    ``max_norm``, which a forward pass rescales.
    """
    found: dict[int, Tensor] = {}
    rescaled: set[int] = set()
    for leaf in leaves(state):
        if leaf.kind == MODULE:
            rescaled |= {
                id(part.weight)
                for part in leaf.value.modules()
                if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None
            }
        elif leaf.kind == OPTIMIZER and not steps_otherwise(leaf.value):
            for group in leaf.value.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        found[id(parameter)] = parameter
                        kept = leaf.value.state.get(parameter)
                        found.update((id(one), one) for one in _tensors(kept))
    return [tensor for key, tensor in found.items() if key not in rescaled]


def steps_otherwise(optimizer: Any) -> bool:
    """Whether an optimizer may change weights where no hook of a step is called."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper has an eval() of its own
    return callable(getattr(inner, "eval", None)) or any(
        group.get("capturable") for group in inner.param_groups
    )


def size_bytes(values: Any) -> int:
    """About how much memory a captured state takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(values))


def expected_bytes(state: dict[str, Any]) -> int:
    """About how much memory a state takes once its optimizers have made theirs; calls no ``state_dict``."""
    total = 0
    for leaf in leaves(state):
        if leaf.kind == TENSOR:
            total += leaf.value.numel() * leaf.value.element_size()
        elif leaf.kind == MODULE:
            total += size_bytes([*leaf.value.parameters(), *leaf.value.buffers()])
        elif leaf.kind == OPTIMIZER:
            defaults = getattr(leaf.value, "defaults", {})
            copies = (
                2 + bool(defaults.get("amsgrad")) if "betas" in defaults else bool(defaults.get("momentum"))
            )
            total += copies * size_bytes([group["params"] for group in leaf.value.param_groups])
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
