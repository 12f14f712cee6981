"""Any value as named leaves that can be kept, sent to another process, and compared bit by bit."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoint.tensors import memory
from holdfast.training import rng

_DEEPEST = 12
_LONGEST_TEXT = 300
_PLAIN = (str, int, float, complex, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One value: equal to another one only if both are the same bit for bit, NaN included.

    Args:
        text: What decides; readable where the value is short, else with a checksum.
        value: The tensor itself, where there was room to keep it: shows how far two are apart.
    """

    text: str
    value: Tensor | None = dataclasses.field(default=None, compare=False)

    def __reduce__(self) -> Any:
        # On its way to another process: torch would share the memory, which a killed process takes along.
        if self.value is None:
            return Leaf, (self.text,)
        contents = bytes(memory(self.value.data_ptr(), self.value.numel() * self.value.element_size()))
        return _received, (self.text, contents, self.value.dtype, self.value.shape)


def _received(text: str, contents: bytes, dtype: torch.dtype, shape: torch.Size) -> Leaf:
    flat = torch.frombuffer(bytearray(contents), dtype=dtype) if contents else torch.empty(0, dtype=dtype)
    return Leaf(text, flat.reshape(shape))


class Fingerprints:
    """Takes values apart into leaves.

    Args:
        root: The run's directory: it is left out of what is compared.
        keep_bytes: How much memory may go into tensors that are kept besides their checksums.
    """

    def __init__(self, root: str, keep_bytes: int = 256 << 20) -> None:
        self.root = root
        self.left_bytes = keep_bytes

    def of(self, value: Any, name: str = "", skip: Iterable[str] = ()) -> dict[str, Leaf]:
        """All leaves of a value, each under its path from ``name`` on.

        Args:
            value: Tensors, arrays, plain values, collections, and objects made of these.
            name: What the paths begin with.
            skip: Keys that are left out, at any depth.
        """
        found: dict[str, Leaf] = {}
        self._walk(value, name, found, frozenset(skip), 0)
        return found

    def _walk(self, value: Any, name: str, found: dict[str, Leaf], skip: frozenset[str], depth: int) -> None:
        leaf = self._leaf(value)
        if leaf is None and depth < _DEEPEST:
            items = _items(value)
            if items is not None:
                for key, path, inner in items:
                    if key not in skip:
                        inside = self._anywhere(f"{name}{path}" if name else path.lstrip("."))
                        self._walk(inner, inside, found, skip, depth + 1)
                return
        found[name] = leaf or Leaf(f"an object of {type(value).__qualname__}")

    def _leaf(self, value: Any) -> Leaf | None:
        """The leaf that a value is; None for one that has to be taken apart."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _PLAIN):
            return Leaf(self._short(self._anywhere(repr(value))))
        if isinstance(value, os.PathLike):
            return Leaf(self._anywhere(str(value)))
        if isinstance(value, (bytes, bytearray)):
            return Leaf(f"{len(value)} bytes ({_checksum(value)})")
        if isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value):
            return Leaf(self._short(self._anywhere(repr(list(value)))))
        if isinstance(value, (set, frozenset)):
            return Leaf(self._short(repr(sorted(map(repr, value)))))
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            return self._array(value)
        state = rng.state_of(value)
        if state is not None:
            return Leaf(f"a generator in state {_checksum(repr(self.of(state)).encode())}")
        return None

    def _anywhere(self, text: str) -> str:
        return text.replace(self.root, "<root>") if self.root else text

    def _short(self, text: str) -> str:
        if len(text) <= _LONGEST_TEXT:
            return text
        return f"{text[: _LONGEST_TEXT // 2]}... ({_checksum(text.encode())})"

    def _tensor(self, tensor: Tensor) -> Leaf:
        dense = tensor.detach()
        if dense.layout is not torch.strided:
            dense = dense.to_dense()
        if dense.is_quantized:
            dense = dense.dequantize()
        dense = dense.cpu().resolve_conj().resolve_neg().contiguous()
        size = dense.numel() * dense.element_size()
        if dense.numel() == 1 and not dense.is_complex():
            return Leaf(repr(dense.tolist()))
        checksum = _checksum(memory(dense.data_ptr(), size))
        kept = None
        if size <= self.left_bytes:
            self.left_bytes -= size
            kept = dense.clone()
        return Leaf(f"{str(tensor.dtype)[6:]} {list(tensor.shape)} ({checksum})", kept)

    def _array(self, array: Any) -> Leaf:
        if array.ndim == 0:
            return Leaf(repr(array.item()))
        try:
            return self._tensor(torch.as_tensor(array.copy()))
        except (TypeError, ValueError):  # of texts, or of numbers that torch lacks
            return Leaf(f"{array.dtype} {list(array.shape)} ({_checksum(array.tobytes())})")


def _items(value: Any) -> list[tuple[str, str, Any]] | None:
    """(key, its part of a path, value) for all that something is made of; None where that cannot be told."""
    if isinstance(value, Mapping):
        return [(str(key), f".{key}", inner) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [("", f"[{index}]", inner) for index, inner in enumerate(value)]
    attributes = getattr(value, "__dict__", None)
    if attributes is None or isinstance(value, type) or callable(value):
        return None
    return [(key, f".{key}", inner) for key, inner in attributes.items()]


def _checksum(contents: Any) -> str:
    return hashlib.blake2b(contents, digest_size=6).hexdigest()


def difference(name: str, whole: Leaf | None, stopped: Leaf | None) -> str:
    """How two leaves that are not equal differ, in one line.

    Args:
        name: What they are.
        whole: The leaf of the run that never stopped; None if it has none of that name.
        stopped: That of the stopped run.
    """
    if whole is None or stopped is None:
        only = "the run that never stopped" if stopped is None else "the stopped one"
        return f"{name}: only {only} has it"
    mine, theirs = whole.value, stopped.value
    if mine is None or theirs is None or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return f"{name}: {whole.text} in the run that never stopped, {stopped.text} in the stopped one"
    wide = torch.float64 if mine.is_floating_point() else torch.int64
    wide = torch.complex128 if mine.is_complex() else wide
    one, other = mine.to(wide), theirs.to(wide)
    differ = (one != other) & ~(one.isnan() & other.isnan())
    count = int(differ.sum())
    if count == 0:
        return (
            f"{name}: all {mine.numel()} values are equal, but not their bits (0.0 and -0.0, or kinds of NaN)"
        )
    apart = float((one[differ] - other[differ]).abs().max())
    return f"{name}: {count} of {mine.numel()} values differ, by {apart:.3g} at most"
