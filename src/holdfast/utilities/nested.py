"""Values nested in dicts, lists and tuples, such as batches: changed one by one, in the same nesting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def mapped(
    data: Any, change: Callable[[Any], Any], is_one: Callable[[Any], bool] = lambda value: False
) -> Any:
    """Return the data with ``change(value)`` in the place of every value; containers keep their types.

    Args:
        data: A value, or values in dicts, lists, tuples and named tuples, in any nesting.
        change: What is done to a value.
        is_one: Tells of a container whether it is a value nevertheless.
    """
    if not isinstance(data, (dict, list, tuple)) or is_one(data):
        return change(data)
    if isinstance(data, dict):
        changed = {key: mapped(value, change, is_one) for key, value in data.items()}
        if type(data) is dict:
            return changed
        same_kind = copy.copy(data)  # not made anew: a defaultdict, for one, takes other arguments
        same_kind.update(changed)
        return same_kind
    items = [mapped(value, change, is_one) for value in data]
    return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it, and anything with ``.to``, on ``device``."""
    import torch

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=device.type != "cpu")
        return value.to(device) if _knows_devices(value) else value

    return mapped(batch, move, _knows_devices)


def _knows_devices(value: Any) -> bool:
    return callable(getattr(value, "to", None))
