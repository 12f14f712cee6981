"""Generators of random numbers that objects keep to themselves: found, so that no resume forgets one."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from holdfast.training import rng

_MAX_DEPTH = 6
_MAX_OBJECTS = 2000
_MAX_ITEMS = 16
"""Of a list or a dict: transforms are few, rows are many."""

# What is referred to weakly first: it may be gone, and then it answers no question about its type.
_NOT_ENTERED = (
    *weakref.ProxyTypes, str, bytes, int, float, complex, type(None), torch.Tensor, type, types.ModuleType,
)  # fmt: skip
_NO_GENERATORS = {bool, int, float, str, type(None), list, tuple, dict, OrderedDict, set, torch.nn.Parameter}
"""What nearly all attributes of a network are, so that a save need not look at each of them for long."""

# What these do with an attribute, they do before the first item is asked for.
_BEFORE_READING = {"__init__", "__new__", "__post_init__", "__setstate__", "__repr__", "__str__", "__len__"}


def is_generator(value: Any) -> bool:
    """Whether it is a generator of torch, NumPy or Python, other than the global ones."""
    cls = type(value)  # not what it says itself: what is referred to weakly may be gone, and says nothing
    if cls in _NO_GENERATORS:
        return False
    if issubclass(cls, torch.Generator):
        return value is not torch.default_generator
    if issubclass(cls, random.Random):
        # One of the system's has no state.
        return value is not random._inst and not issubclass(cls, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    known = issubclass(cls, (numpy.random.Generator, numpy.random.RandomState))
    return known and value is not numpy.random.mtrand._rand


def kind_of(generator: Any) -> str:
    """What messages call it."""
    cls = type(generator)
    return f"{cls.__module__.partition('.')[0].lstrip('_')}'s {cls.__name__}"


def held_by(owner: Any) -> Iterator[tuple[str, Any]]:
    """The generators among an object's own attributes; of a network, among those of all its modules."""
    parts = owner.named_modules() if isinstance(owner, torch.nn.Module) else [("", owner)]
    for path, part in parts:
        for name, value in getattr(part, "__dict__", {}).items():
            if is_generator(value):
                yield f"{path}.{name}" if path else name, value


def capture(owner: Any) -> dict[str, Any]:
    """The states of what `held_by` finds."""
    return {path: rng.state_of(generator) for path, generator in held_by(owner)}


def restore(owner: Any, states: Mapping[str, Any]) -> None:
    """Put back what `capture` gave; a generator that is no longer there is passed over."""
    for path, generator in held_by(owner):
        if path in states:
            rng.set_state_of(generator, states[path])


# -- what reading data may draw from -------------------------------------------------------------------------


def reachable(root: Any, name: str) -> list[tuple[str, Any]]:
    """The generators that an object may draw from when it is read or called, each with the way to it.

    Looked through are attributes that a method other than ``__init__`` uses, collections, functions with
    their closures, partial objects, and the globals that methods and functions use.

    Args:
        root: A dataset, a collate function or the like.
        name: What the way begins with.
    """
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [(name, root, 0)]
    while waiting and len(seen) < _MAX_OBJECTS:
        path, value, depth = waiting.pop(0)
        if id(value) in seen or isinstance(value, _NOT_ENTERED):
            continue
        seen.add(id(value))
        if is_generator(value):
            found.append((path, value))
        elif depth < _MAX_DEPTH:
            waiting += [(path + step, inner, depth + 1) for step, inner in _parts_or_none(value)]
    return found


def _parts_or_none(value: Any) -> list[tuple[str, Any]]:
    try:
        return _parts(value)
    except (
        Exception
    ):  # an object of anybody's may raise anything when it is looked at, and has nothing to tell
        return []


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", value[key]) for key in list(value)[:_MAX_ITEMS]]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", inner) for index, inner in enumerate(value[:_MAX_ITEMS])]
    if isinstance(value, functools.partial):
        parts = [(".func", value.func), *((f".args[{i}]", one) for i, one in enumerate(value.args))]
        return parts + [(f".{key}", one) for key, one in value.keywords.items()]
    if isinstance(value, types.MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    return _of_object(value)


def _of_function(function: types.FunctionType) -> list[tuple[str, Any]]:
    bound = inspect.getclosurevars(function).nonlocals
    parts = [*bound.items(), *(function.__kwdefaults__ or {}).items()]
    parts += [(f"argument {index}", one) for index, one in enumerate(function.__defaults__ or ())]
    return [(f".{name}", one) for name, one in parts] + _globals_of(function)


@functools.lru_cache(maxsize=512)
def _used_attributes(cls: type) -> frozenset[str]:
    return frozenset(name for method in _methods(cls) for name in _names(method.__code__))


def of_methods(cls: type) -> list[tuple[str, Any]]:
    """The global generators that a class's methods use, each with its name."""
    return [(name.lstrip("."), found) for method in _methods(cls) for name, found in _globals_of(method)]


def _globals_of(function: types.FunctionType) -> list[tuple[str, Any]]:
    known = function.__globals__
    return [(f".{name}", known[name]) for name in _names(function.__code__) if is_generator(known.get(name))]


def _of_object(value: Any) -> list[tuple[str, Any]]:
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return []
    cls: Any = type(value)
    used = _used_attributes(cls)
    parts = [(f".{name}", inner) for name, inner in attributes.items() if name in used or name == "_modules"]
    return parts + [(f".{name}", found) for name, found in of_methods(cls)]


@functools.lru_cache(maxsize=512)
def _methods(cls: type) -> list[types.FunctionType]:
    """All methods and properties of a class that may run while its objects are read."""
    found: list[types.FunctionType] = []
    for base in cls.__mro__:
        for name, member in vars(base).items():
            if isinstance(member, property):
                member = member.fget
            elif isinstance(member, (staticmethod, classmethod)):
                member = member.__func__
            inner = inspect.unwrap(member) if isinstance(member, types.FunctionType) else None
            if isinstance(inner, types.FunctionType) and name not in _BEFORE_READING:
                found.append(inner)
    return found


def _names(code: types.CodeType) -> list[str]:
    """Names of attributes and globals in a function, and in the functions within it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names
