"""Names of a package that are loaded when they are first used (PEP 562): importing it costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from holdfast.utilities import started  # noqa: F401  # so early that no script has gone elsewhere
from holdfast.utilities.collector import uncollected


def lazily(
    package: str, homes: Mapping[str, str], left_out: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: Its name.
        homes: For each public name the module that has it, absolute, or relative to the package with a dot.
            A module's own name stands for the module.
        left_out: For each name that Lightning has there and holdfast has not, what to use instead.
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            instead = (left_out or {}).get(name)
            if instead is not None:
                # An AttributeError would be answered by Python's own "cannot import name", without this text.
                raise ImportError(f"{package} has no {name}. {instead}", name=package)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # An import makes no garbage, and one pass over all that torch has made takes longer than it.
        with uncollected():
            module = importlib.import_module(home, package)
        value = module if home == f".{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
