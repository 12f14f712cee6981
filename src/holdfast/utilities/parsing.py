"""A dict with attributes, whether a value can be pickled, and named values in any form as a dict."""

from __future__ import annotations

import dataclasses
import pickle
from argparse import Namespace
from collections.abc import Mapping
from typing import Any


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``hparams.lr`` and ``hparams["lr"]`` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Missing attribute {name!r}; there are {sorted(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"Missing attribute {name!r}; there are {sorted(map(str, self))}") from None

    def __repr__(self) -> str:
        """One aligned line a key, in the order of the keys."""
        names = {key: f'"{key}":' for key in sorted(self, key=str)}
        width = max(map(len, names.values()), default=0)
        return "\n".join(f"{name:<{width}} {self[key]}" for key, name in names.items())


def as_mapping(value: Any) -> dict[Any, Any] | None:
    """A Namespace, mapping or dataclass as a new dict of the same values; None for anything else."""
    if isinstance(value, Namespace):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def is_picklable(obj: object) -> bool:
    """Whether ``pickle`` takes the object; tried, not guessed."""
    try:
        pickle.dumps(obj)
    except Exception:  # whatever an object's own __reduce__ happens to raise
        return False
    return True


__all__ = ["AttributeDict", "is_picklable"]
