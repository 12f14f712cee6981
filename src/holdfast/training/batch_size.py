"""How many rows a batch holds."""

from __future__ import annotations

import sys
from typing import Any

import torch


def batch_size_of(batch: Any) -> int:
    """Rows in a batch: the first dimension of the first tensor in it, else of the first array; else 1."""
    found = _first_dimension(batch, torch.Tensor)
    if found is None:
        numpy = sys.modules.get("numpy")
        found = None if numpy is None else _first_dimension(batch, numpy.ndarray)
    return 1 if found is None else found


def _first_dimension(batch: Any, kind: type[Any]) -> int | None:
    if isinstance(batch, kind):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, dict):
        batch = batch.values()
    elif hasattr(batch, "__dataclass_fields__"):
        batch = vars(batch).values()
    elif not isinstance(batch, (list, tuple)):
        return None
    for part in batch:
        found = _first_dimension(part, kind)
        if found is not None:
            return found
    return None
