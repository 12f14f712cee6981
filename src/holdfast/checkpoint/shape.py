"""Whether the parts of a payload are of the types that training takes them for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.errors import CheckpointIncompatible

_MAPPING, _LIST, _LIST_OF_MAPPINGS = "a dict", "a list", "a list of dicts"

_SHAPES = {
    ("state_dict",): _MAPPING,
    ("optimizer_states",): _LIST_OF_MAPPINGS,
    ("lr_schedulers",): _LIST_OF_MAPPINGS,
    ("callbacks",): _MAPPING,
    ("loops",): _MAPPING,
    ("holdfast",): _MAPPING,
    ("holdfast", "progress"): _MAPPING,
    ("holdfast", "progress", "loaders"): _MAPPING,
    ("holdfast", "data"): _MAPPING,
    ("holdfast", "data", "now"): _MAPPING,
    ("holdfast", "generators"): _LIST_OF_MAPPINGS,
    ("holdfast", "metrics"): _MAPPING,
    ("holdfast", "metrics", "callback"): _MAPPING,
    ("holdfast", "metrics", "logged"): _MAPPING,
    ("holdfast", "metrics", "bar"): _MAPPING,
    ("holdfast", "metrics", "versions"): _MAPPING,
    ("holdfast", "metrics", "train"): _LIST_OF_MAPPINGS,
    ("holdfast", "metrics", "objects"): _MAPPING,
    ("holdfast", "param_groups"): _LIST,
    ("holdfast", "eval_modules"): _LIST,
    ("holdfast", "frozen"): _LIST,
    ("holdfast", "own_generators"): _MAPPING,
    ("holdfast", "command"): _MAPPING,
    ("holdfast", "command", "optimizers"): _LIST_OF_MAPPINGS,
    ("holdfast", "command", "schedulers"): _LIST_OF_MAPPINGS,
    ("holdfast", "command", "train"): _LIST_OF_MAPPINGS,
    ("holdfast", "command", "val"): _LIST_OF_MAPPINGS,
    ("holdfast", "environment"): _MAPPING,
}
_NUMBERS = ("epoch", "batch", "global_step", "batches_that_stepped", "total_batches", "samples")
"""Of ``holdfast/progress``."""


def check_shape(payload: Mapping[str, Any], source: str) -> None:
    """Refuse a payload whose parts are not what they are taken for; what is absent, or None, is fine.

    Args:
        payload: As `migrate.upgrade` returns it.
        source: The file's name, for messages.

    Raises:
        CheckpointIncompatible: names the part, what was expected and what was found.
    """
    for path, expected in _SHAPES.items():
        part: Any = payload
        for key in path:
            part = part.get(key) if isinstance(part, Mapping) else None
        if part is not None and not _is(part, expected):
            raise _wrong(source, "/".join(path), expected, part)
    progress = (payload.get("holdfast") or {}).get("progress") or {}
    for name in _NUMBERS:
        if name in progress and type(progress[name]) is not int:
            raise _wrong(source, f"holdfast/progress/{name}", "a whole number", progress[name])


def _is(part: Any, expected: str) -> bool:
    if expected == _MAPPING:
        return isinstance(part, Mapping)
    if not isinstance(part, (list, tuple)):
        return False
    return expected == _LIST or all(isinstance(member, Mapping) for member in part)


def _wrong(source: str, name: str, expected: str, part: Any) -> CheckpointIncompatible:
    kind = type(part).__name__
    if isinstance(part, (list, tuple)):
        kind += f" of {', '.join(sorted({type(member).__name__ for member in part})) or 'nothing'}"
    return CheckpointIncompatible(f"{source}: {name} should be {expected}, found {kind}.", path=source)
