"""What is said of a name that nobody knows: which known one it was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from holdfast.errors import ArgumentError


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``" Did you mean 'accuracy'?"``, with the known name that is nearest; "" where none is near.

    Args:
        name: The unknown name.
        known: The names that there are.
        cutoff: How alike they have to be, from 0 to 1.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def unexpected_argument(function: str, name: str, known: Iterable[str]) -> ArgumentError:
    """Return the error for an argument that ``function`` does not take; it names the nearest, or all."""
    names = list(known)
    hint = did_you_mean(name, names) or f" It takes {', '.join(names)}."
    return ArgumentError(f"{function}() got an unexpected keyword argument {name!r}.{hint}")
