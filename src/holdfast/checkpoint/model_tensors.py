"""The tensors of a payload by name, and the modules of a model that the names tell of."""

from __future__ import annotations

import collections
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint.foreign_types import Opaque
from holdfast.checkpoint.inert import TensorFacts

_MAX_DEPTH = 100
_MAX_LEVELS = 30


def tensors_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TensorFacts]]:
    """Every tensor in a payload with the path to it; a container that is shared counts once."""
    seen: set[int] = set()
    pending = [(path, value)]
    while pending:
        at, found = pending.pop()
        if type(found) is TensorFacts:
            yield at, found
            continue
        if len(at) < _MAX_DEPTH:
            inside = list(_inside(found))
            if inside and id(found) not in seen:
                seen.add(id(found))
                pending += [((*at, name), member) for name, member in reversed(inside)]


def _inside(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key)[:500], member) for key, member in value.items()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return [(str(index), member) for index, member in enumerate(value)]
    if isinstance(value, Opaque):
        if _is_module(value.state):  # a torch.nn.Module, saved whole
            parts = (value.state.get(kind) for kind in ("_parameters", "_buffers", "_modules"))
            return [pair for part in parts if isinstance(part, Mapping) for pair in _inside(part)]
        return [("args", value.args), ("state", value.state), ("items", value.items)]
    return vars(value).items() if type(value).__name__ in ("Namespace", "SimpleNamespace") else ()


def _is_module(state: Any) -> bool:
    return isinstance(state, Mapping) and "_parameters" in state and "_modules" in state


def models_in(value: Any) -> dict[str, dict[str, TensorFacts]]:
    """The weights in a payload: for each model the key that it is under, and its tensors by dotted name.

    A state_dict by itself is under "". Where nothing looks like a model's weights, all tensors are there
    under "".
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("state_dict"), Mapping):
            return {"state_dict": _named(value["state_dict"])}
        if not _is_state_dict(value):
            pairs = ((key, part) for key, part in value.items() if isinstance(key, str) and key)
            found = {key: _named(part) for key, part in pairs if _holds_weights(part)}
            if found:
                return found
    return {"": _named(value)}


def _holds_weights(part: Any) -> bool:
    return _is_state_dict(part) or (isinstance(part, Opaque) and _is_module(part.state))


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(type(member) is TensorFacts for member in value.values())


def _named(value: Any) -> dict[str, TensorFacts]:
    named: dict[str, TensorFacts] = {}
    for path, tensor in tensors_in(value):
        named[unlike(".".join(path), named)] = tensor
    return named


def unlike(name: str, taken: Container[str]) -> str:
    """A name that is not taken: 1 and "1" are two keys, and are written alike."""
    while name in taken:
        name += "'"
    return name


@dataclass
class Module:
    """A module of a model, as the names of its tensors tell of it.

    Attributes:
        name: the whole name; "" for the model.
        tensors: its own, by the last part of their names.
        ties: for each of these that is another name of a tensor further up, that one's whole name.
        children: the modules in it, by the next part of their names.
        values: numbers in it and in its children, each counted once however often it is named.
        size_bytes: their bytes.
    """

    name: str
    tensors: dict[str, TensorFacts] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    children: dict[str, Module] = field(default_factory=dict)
    values: int = 0
    size_bytes: int = 0

    def walk(self) -> Iterator[Module]:
        """This module and all in it, in the order of their names in the file."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def shape(self) -> tuple[Any, ...]:
        """Equal for two modules that are built alike."""
        own = tuple((name, t.dtype, t.shape, self.ties.get(name)) for name, t in self.tensors.items())
        return own, tuple((name, child.shape()) for name, child in self.children.items())


def module_tree(tensors: Mapping[str, TensorFacts]) -> Module:
    """The modules of a model from its tensors' dotted names."""
    top = Module("")
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        *places, leaf = name.split(".", _MAX_LEVELS)
        path = [top]
        for depth, place in enumerate(places):
            whole = ".".join(places[: depth + 1])
            path.append(path[-1].children.setdefault(place, Module(whole)))
        path[-1].tensors[leaf] = tensor
        known = first.get(tensor.identity) if tensor.identity is not None else None
        if known is not None:
            path[-1].ties[leaf] = known
            continue
        first[tensor.identity] = name
        for module in path:
            module.values += tensor.numel
            module.size_bytes += tensor.size_bytes
    return top
