"""Python's cyclic garbage collector, kept out of the way."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's cyclic collector out while many containers are made, none of which can be garbage yet.

    Each of its passes walks all of them: at 100,000 tensors that doubles the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
