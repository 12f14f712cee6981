"""What a module or callback of a user defines itself."""

from __future__ import annotations

from typing import Any


def is_overridden(method_name: str, instance: Any = None, parent: type[Any] | None = None) -> bool:
    """Tell whether an object or its class defines a method, rather than inheriting it as it is.

    Args:
        method_name: The method.
        instance: The object; nothing is overridden on None.
        parent: The class to inherit it from; default: any of holdfast's own.
    """
    if instance is None:
        return False
    if method_name in getattr(instance, "__dict__", {}):
        return True
    if parent is not None:
        inherited = getattr(parent, method_name, None)
        return inherited is not None and getattr(type(instance), method_name, inherited) is not inherited
    for cls in type(instance).__mro__:
        if method_name in vars(cls):
            return not cls.__module__.startswith("holdfast.")
    return False


__all__ = ["is_overridden"]
