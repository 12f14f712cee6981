"""What an object holds itself, as code that looks through objects of all kinds wants it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any


def attributes_of(owner: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object by name, but for what it only refers to weakly.

    That is somebody else's; and where it is gone, every question about it raises ReferenceError.
    """
    for name, value in getattr(owner, "__dict__", {}).items():
        if type(value) not in weakref.ProxyTypes:
            yield name, value
