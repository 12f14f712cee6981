"""``hparams.yaml``: hyperparameters of any kind as plain values, which every YAML reader takes.

No value stops a run, and none needs its class to be read again. What comes out of the same hyperparameters
is the same text in every process, so that a resumed run writes the very file that it finds.
"""

from __future__ import annotations

import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from typing import Any

from holdfast.checkpoint import commit
from holdfast.errors import ConfigError
from holdfast.utilities.parsing import as_mapping

NAME_HPARAMS_FILE = "hparams.yaml"

_DEEPEST = 20
_LONGEST_ARRAY = 1000


def write_hparams(directory: str, values: Mapping[str, Any]) -> None:
    """Write ``hparams.yaml`` whole, in the place of an older one; one with the same values is left alone."""
    import yaml

    text = yaml.safe_dump(
        plain(values), default_flow_style=False, sort_keys=False, allow_unicode=True
    ).encode()
    path = os.path.join(directory, NAME_HPARAMS_FILE)
    if os.path.exists(path):
        with open(path, "rb") as file:
            if file.read() == text:
                return
    with commit.replacing(path) as replacement:
        commit.write_all(replacement.fd, text)


def named(params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
    """Return what ``log_hyperparams`` was given as a dict of names; the values are as they were.

    Raises:
        ConfigError: it has no names.
    """
    found = as_mapping(_without_library({} if params is None else params))
    if found is None:
        raise ConfigError(
            "log_hyperparams: expected a dict, Namespace, dataclass or OmegaConf config, found "
            f"{type(params).__name__}."
        )
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """Return the nearest value made of dicts, lists, strings, numbers, booleans and None.

    A Namespace, dataclass or OmegaConf object becomes a dict, a tuple, set or short array a list, an enum's
    member its name, a class or function its qualified name, and anything else its text.
    """
    value = _without_library(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return value.name
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if depth == _DEEPEST:
        return f"<{type(value).__name__}>"  # deeper than anybody reads; it may hold itself
    mapping = as_mapping(value)
    if mapping is not None:
        return {
            key if type(key) in (bool, int, float, str) else _text(key): plain(one, depth + 1)
            for key, one in mapping.items()
        }
    if isinstance(value, list | tuple):
        return [plain(one, depth + 1) for one in value]
    if isinstance(value, set | frozenset):
        return [plain(one, depth + 1) for one in sorted(value, key=_text)]
    return _text(value)


def flat(value: Any, prefix: str = "") -> dict[str, bool | float | str]:
    """Return plain values under one level of names, joined by "/", as a protocol buffer takes them.

    A list without dicts is its text, and so is None.
    """
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        found = {}
        for name, one in value.items():
            found.update(flat(one, f"{prefix}/{name}" if prefix else str(name)))
        return found
    if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return {_unicode(prefix): value}
    return {_unicode(prefix): _unicode(str(value))}


def _unicode(text: str) -> str:
    # A file's name may hold bytes that are no text.
    return text.encode(errors="backslashreplace").decode()


def _without_library(value: Any) -> Any:
    """Turn values of torch, NumPy and OmegaConf into Python's, without importing any of the three."""
    if isinstance(value, type):  # numpy.float32 itself, say, which has all that its values have
        return value
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        return _numbers(value)
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is None or not omegaconf.OmegaConf.is_config(value):
        return value
    try:
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    except omegaconf.errors.OmegaConfBaseException:
        return omegaconf.OmegaConf.to_container(value, resolve=False)


def _numbers(array: Any) -> Any:
    kind = type(array).__name__
    try:
        shape = tuple(array.shape)
        return array.tolist() if math.prod(shape) <= _LONGEST_ARRAY else f"{kind} of shape {shape}"
    except Exception:  # without values, or of a kind whose library has no list for it
        return f"<{kind}>"


def _text(value: Any) -> str:
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        # Where an object was in memory is another place in the next process.
        return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))
    except Exception:
        return f"<{type(value).__name__}>"
