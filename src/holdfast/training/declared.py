"""Saved values as the types that a program's own annotations name: what the file names is never looked up."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint.foreign_types import Opaque


def declared_types(function: Any) -> dict[str, Any]:
    """The types that a function or a class is annotated with, by name; as far as they can be looked up."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # an annotation that cannot be looked up, such as one under TYPE_CHECKING
        return dict(getattr(function, "__annotations__", {}))


def is_dataclass(kind: Any) -> bool:
    """Whether it is a dataclass, not an object of one."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def is_inert(value: Any) -> bool:
    """Whether it only stands for an object, or a class, that the file could not give back."""
    return isinstance(value, Opaque) or (isinstance(value, type) and issubclass(value, Opaque))


def as_declared(value: Any, declared: Any) -> Any:
    """The value as a dataclass or an enum, where that is declared and the value fits; else as it is."""
    for kind in _members(declared):
        if is_dataclass(kind):
            fields = _state_of(value, kind)
            if fields is not None:
                return build_dataclass(kind, fields)
        elif isinstance(kind, type) and issubclass(kind, enum.Enum) and not isinstance(value, kind):
            try:
                return kind(value.args[0] if isinstance(value, Opaque) else value)
            except (ValueError, IndexError):
                continue
    return value


def build_dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from the values of its fields; what it has no field for is left out."""
    hints = declared_types(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.init and field.name in values]
    return kind(**{name: as_declared(values[name], hints.get(name)) for name in fields})


def _members(declared: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return typing.get_args(declared)
    return (declared,)


def _state_of(value: Any, kind: type) -> Mapping[str, Any] | None:
    if isinstance(value, Opaque):
        value = value.state if type(value).__qualname__ == kind.__qualname__ else None
    return value if isinstance(value, Mapping) else None
