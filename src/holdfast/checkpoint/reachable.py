"""Which storages a part of a payload needs, told from the pickle before a single tensor is read."""

from __future__ import annotations

import collections
import gc
from collections.abc import Callable, Collection
from typing import Any

import torch

from holdfast.checkpoint.foreign_types import Opaque
from holdfast.checkpoint.pickling import Call, SafeUnpickler, storage_id


class _Key(str):
    """Stands for a storage in an outline: what it is called in the file."""

    __slots__ = ()


class _Made:
    """Stands for a tensor in an outline: what it is made of, sizes and the like left out."""

    __slots__ = ("parts",)

    def __init__(self, first: Any = None, *parts: Any) -> None:
        # All but the usual tensor, of one storage and numbers, is kept in full.
        self.parts = (first,) if type(first) is _Key and len(parts) == 5 else (first, *parts)

    def __setstate__(self, state: Any) -> None:
        self.parts = (*self.parts, state)


_MADE = Call(_Made)


class Outline(SafeUnpickler):
    """Builds the payload without a single tensor, from the pickle alone."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, lambda key, location: torch.UntypedStorage())

    def find_class(self, module: str, name: str) -> Any:
        known = super().find_class(module, name)
        return _MADE if module == "torch._utils" else known

    def persistent_load(self, pid: Any) -> Any:
        return _Key(storage_id(pid)[1])


_HOLDERS = {
    dict, list, tuple, set, frozenset, collections.OrderedDict, collections.Counter, collections.defaultdict,
    collections.deque, _Made,
}  # fmt: skip


def reachable(data: bytes, skip: Collection[Any], outline: Callable[[bytes], Outline] = Outline) -> set[str]:
    """The keys of the storages in all that a payload holds besides its top-level keys in ``skip``.

    Args:
        data: the pickle.
        skip: top-level keys.
        outline: what builds the outline, where a file has more than plain values and tensors.

    Raises:
        PickleError, UnsafeGlobal: as the `SafeUnpickler` does; others for a pickle that is malformed.
    """
    tree = outline(data).load()
    top: list[Any] = [tree]
    if isinstance(tree, dict):
        top = [part for item in tree.items() if item[0] not in skip for part in item]
        top.append(getattr(tree, "__dict__", None))
    found: set[str] = set()
    seen: set[int] = set()
    while top:
        at = top.pop()
        kind = type(at)
        if kind is _Key:
            found.add(at)
        elif (kind in _HOLDERS or isinstance(at, Opaque)) and id(at) not in seen:
            seen.add(id(at))
            top += at.parts if kind is _Made else gc.get_referents(at)
    return found


def leads_to_meta(tree: Any) -> bool:
    """Whether what was built holds a tensor without memory, such as one whose storage was left out."""
    top, seen = [tree], set()
    while top:
        at = top.pop()
        if isinstance(at, torch.Tensor):
            if at.is_meta:
                return True
        elif isinstance(at, (dict, list, tuple, set, frozenset, collections.deque)):
            if id(at) not in seen:
                seen.add(id(at))
                top += gc.get_referents(at)
        elif hasattr(at, "__dict__") and not isinstance(at, type):
            top.append(vars(at))
    return False
