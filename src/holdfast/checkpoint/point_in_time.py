"""A checkpoint's values as they are at one moment, whatever happens to the live ones afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class PointInTime:
    """Copies of a checkpoint's values as they are now; what shares a storage shares it in the copy too."""

    def __init__(self) -> None:
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}
        self._memo: dict[int, Any] = {}
        self._alive: list[Any] = []

    def of(self, value: Any) -> Any:
        """The value as it is now, its tensors on the CPU; what cannot be copied stays itself."""
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known
        made = self._make(value)
        self._memo[id(value)] = made
        self._alive.append(value)  # so that no other value gets its id
        return made

    def _make(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (dict, list, tuple):
            # Elsewhere a copy has to be what the class makes of itself.
            if isinstance(value, dict):
                return {key: self.of(item) for key, item in value.items()}
            return type(value)(self.of(item) for item in value)
        tensors = {id(item): self.of(item) for item in _items(value) if isinstance(item, Tensor)}
        try:
            return copy.deepcopy(value, tensors)
        except Exception:  # somebody's own class may refuse in any way; what writes it decides what to do
            return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
            return tensor.to("cpu", copy=True)
        if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:  # more than what its memory holds
            return tensor.to("cpu", copy=True)
        try:
            storage = tensor.untyped_storage()
            # NumPy's views give storages of several lengths at one address.
            key = storage.data_ptr(), storage.nbytes()
        except RuntimeError:  # a tensor without memory of its own
            return tensor.to("cpu", copy=True)
        if key[0] == 0:
            return tensor.to("cpu", copy=True)
        copied = self._storages.get(key)
        if copied is None:
            copied = self._storages[key] = _to_cpu(storage)
        result = torch.empty(0, dtype=tensor.dtype)
        result.set_(copied, tensor.storage_offset(), tensor.size(), tensor.stride())
        return result


def _to_cpu(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copied = torch.UntypedStorage(storage.nbytes())
    copied.copy_(storage)
    return copied


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []
