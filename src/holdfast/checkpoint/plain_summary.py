"""What a file's summary may hold: values that JSON holds, so that a directory listing needs nothing else."""

from __future__ import annotations

import math
from typing import Any

from holdfast.errors import ConfigError


def plain_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as JSON holds it: numbers that JSON lacks become text ("NaN").

    Raises:
        ConfigError: naming the value that is not plain.
    """
    return {key: _plain(value, key) for key, value in summary.items()}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    raise ConfigError(
        f"summary: {where} is a {type(value).__name__}; a summary holds plain values only "
        "(text, numbers, True, False, None, and lists and dicts of them)."
    )
