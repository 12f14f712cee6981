"""What ``utilities.parsing`` is imported for: a dict with attributes, and whether a value can be pickled."""

from __future__ import annotations

import pickle
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


def is_picklable(obj: object) -> bool:
    """Whether ``pickle`` takes the object; tried, not guessed."""
    try:
        pickle.dumps(obj)
    except Exception:  # whatever an object's own __reduce__ happens to raise
        return False
    return True


__all__ = ["AttributeDict", "is_picklable"]
