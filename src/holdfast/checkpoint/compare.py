"""What is different between two checkpoint files: keys, shapes, values, and how far the weights have moved.

Tensors are streamed from both files and compared bytewise; numbers are only made of those that differ, which
is where torch is needed. Checksums are not looked at: `verify` does that.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint.contents import Contents
from holdfast.checkpoint.foreign_types import Opaque
from holdfast.checkpoint.inert import TensorFacts
from holdfast.checkpoint.inspect import plain
from holdfast.checkpoint.model_tensors import models_in, unlike
from holdfast.errors import CheckpointIncomplete

_PIECE_VALUES = 1 << 18  # what is made of them stays in the processor's cache
_MOST_SPREAD_BYTES = 64 << 20
_MAX_DEPTH = 100

Path = tuple[str, ...]


@dataclass
class Change:
    """How far numbers have moved; sums over several tensors with `add`.

    Attributes:
        tensors: how many tensors it is about.
        changed: how many of them differ.
        measured: how many of those the numbers below are about.
        squared: sum of the squares of the differences.
        squared_before: sum of the squares of the first file's numbers.
        largest: the largest difference.
    """

    tensors: int = 0
    changed: int = 0
    measured: int = 0
    squared: float = 0.0
    squared_before: float = 0.0
    largest: float = 0.0

    def add(self, other: Change) -> None:
        """Count another one in."""
        self.tensors += other.tensors
        self.changed += other.changed
        self.measured += other.measured
        self.squared += other.squared
        self.squared_before += other.squared_before
        self.largest = _larger(self.largest, other.largest)

    @property
    def relative(self) -> float:
        """L2 norm of the difference over that of the first file's numbers."""
        if self.squared != self.squared or self.squared_before > 0:
            return math.sqrt(self.squared / (self.squared_before or 1.0))
        return math.inf if self.squared else 0.0


@dataclass
class Pair:
    """A tensor that both files have, of one shape; ``name`` is dotted for a model's, slashed elsewhere."""

    name: str
    model: str | None
    first: TensorFacts
    second: TensorFacts
    change: Change = field(default_factory=Change)

    @property
    def is_measure(self) -> bool:
        """Whether its numbers are weights and the like rather than counters, which would drown those."""
        floats = self.first.dtype.startswith(("float", "bfloat", "complex", "q"))
        return floats and (self.model is not None or bool(self.first.shape))


@dataclass
class Comparison:
    """What is different.

    Attributes:
        only_first: paths that the second file does not have, each as high up as it is missing.
        only_second: the other way round.
        shapes: (name, shape, shape) of tensors that cannot be compared.
        dtypes: (name, dtype, dtype) of tensors that were compared nevertheless.
        values: (path, value, value) of all else, as `inspect.plain` gives them.
        pairs: all tensors that were compared.
    """

    only_first: list[Path] = field(default_factory=list)
    only_second: list[Path] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dtypes: list[tuple[str, str, str]] = field(default_factory=list)
    values: list[tuple[Path, Any, Any]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both payloads are the same, bit for bit."""
        lists = (self.only_first, self.only_second, self.shapes, self.dtypes, self.values)
        return not any(lists) and not any(pair.change.changed for pair in self.pairs)


def compare(first: Contents, second: Contents) -> Comparison:
    """Compare two opened files; a lone model of one with a lone model of the other, whatever their keys are.

    Memory: a few megabytes; for tensors whose numbers do not lie in a run, one of them.

    Raises:
        CheckpointIncomplete: a tensor reaches beyond its file.
        StorageError: a file cannot be read.
    """
    found = Comparison()
    walk = _Walk(found)
    rest = [first.value, second.value]
    for one_key, other_key in _models(found, first.value, second.value):
        parts = []
        for index, key in enumerate((one_key, other_key)):
            at = rest[index]
            parts.append(at[key] if key else at)
            rest[index] = {name: part for name, part in at.items() if name != key} if key else {}
        walk.go((one_key,) if one_key else (), parts[0], parts[1], 0, without_tensors=True)
    walk.go((), rest[0], rest[1], 0)
    one, other = _Reader(first), _Reader(second)
    for pair in found.pairs:
        if pair.first.dtype != pair.second.dtype:
            found.dtypes.append((pair.name, pair.first.dtype, pair.second.dtype))
        pair.change = Change(tensors=1, changed=int(_differs(one, other, pair)))
    if any(pair.change.changed for pair in found.pairs):
        for pair in found.pairs:
            _measure(one, other, pair)
    return found


def _models(found: Comparison, first: Any, second: Any) -> list[tuple[str, str]]:
    """Pair the models' tensors; returns the keys of the models that belong together."""
    a, b = models_in(first), models_in(second)
    keys = [(key, key) for key in a if key in b]
    if not keys and len(a) == len(b) == 1:
        keys = [(next(iter(a)), next(iter(b)))]
    for one, other in keys:
        for name, tensor in a[one].items():
            if name in b[other]:
                _pair(found, name, one, tensor, b[other][name])
            else:
                found.only_first.append((one, name) if one else (name,))
        missing = [name for name in b[other] if name not in a[one]]
        found.only_second += [(other, name) if other else (name,) for name in missing]
    return keys


def _pair(found: Comparison, name: str, model: str | None, a: TensorFacts, b: TensorFacts) -> None:
    if a.shape != b.shape or (a.layout != b.layout and {a.layout, b.layout} - {"strided", "meta"}):
        found.shapes.append((name, a.shape, b.shape))
    else:
        found.pairs.append(Pair(name, model, a, b))


class _Walk:
    """Goes through two payloads side by side."""

    def __init__(self, found: Comparison) -> None:
        self.found = found
        self.seen: set[tuple[int, int]] = set()

    def go(self, path: Path, a: Any, b: Any, depth: int, *, without_tensors: bool = False) -> None:
        """Compare two values; ``without_tensors`` those of a model, whose tensors are paired already."""
        if type(a) is TensorFacts and type(b) is TensorFacts:
            if not without_tensors:
                _pair(self.found, slashed(path), None, a, b)
            return
        one, other = _members(a), _members(b)
        if one is None or other is None or (isinstance(a, Opaque) and _name(a) != _name(b)):
            if not _same(a, b):
                self.found.values.append((path or (".",), plain(a), plain(b)))
            return
        if depth > _MAX_DEPTH or (id(a), id(b)) in self.seen:
            return
        self.seen.add((id(a), id(b)))
        for key, member in one.items():
            if key in other:
                self.go((*path, key), member, other[key], depth + 1, without_tensors=without_tensors)
            elif not (without_tensors and _is_tensors(member)):
                self.found.only_first.append((*path, key))
        for key, member in other.items():
            if key not in one and not (without_tensors and _is_tensors(member)):
                self.found.only_second.append((*path, key))


def _is_tensors(value: Any) -> bool:
    """Whether there is nothing in it but tensors, which a model's list of names tells of."""
    inside = _members(value)
    if type(value) is TensorFacts or inside is None:
        return type(value) is TensorFacts
    return bool(inside) and all(type(member) is TensorFacts for member in inside.values())


def slashed(path: Path) -> str:
    """A path in a payload as it is written: ``optimizer_states/0/state``."""
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)


def _members(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        made: dict[str, Any] = {}
        for key, member in value.items():
            made[unlike(str(key)[:500], made)] = member
        return made
    if isinstance(value, (list, tuple, collections.deque)):
        return {str(index): member for index, member in enumerate(value)}
    if isinstance(value, Opaque):
        return {"args": value.args, "state": value.state, "items": value.items}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return dict(vars(value))
    return None


def _name(value: Any) -> str | None:
    return value.qualified_name if isinstance(value, Opaque) else None


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if hasattr(a, "tobytes"):  # NumPy
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b) or (a != a and b != b)


# -- the numbers ---------------------------------------------------------------------------------------------


class _Reader:
    """Reads the numbers of a file's tensors."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents

    def run(self, tensor: TensorFacts, begin: int, count: int) -> bytearray:
        """``count`` elements from the ``begin``-th of those that lie from its first one on."""
        data = bytearray(count * tensor.itemsize)
        at = (tensor.offset + begin) * tensor.itemsize
        if not self.contents.read(tensor.key or "", at, memoryview(data)):
            raise self._beyond()
        return data

    def gathered(self, tensor: TensorFacts) -> bytearray:
        """All its elements in order, wherever they lie."""
        import torch

        from holdfast.checkpoint.tensors import memory

        place = self.contents.storages.get(tensor.key or "")
        if place is None or tensor.size_bytes > max(_MOST_SPREAD_BYTES, 2 * place.length):
            raise self._beyond()  # an expanded view could be far larger than its file
        reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride or (), strict=True))
        raw = torch.frombuffer(self.run(tensor, 0, reach), dtype=torch.uint8)
        size = tensor.itemsize
        strides = [step * size for step in tensor.stride or ()]
        dense = raw.as_strided([*tensor.shape, size], [*strides, 1]).contiguous()
        return bytearray(memory(dense.data_ptr(), dense.numel()))

    def _beyond(self) -> CheckpointIncomplete:
        name = os.path.basename(self.contents.name)
        return CheckpointIncomplete(f"{name}: a tensor reaches beyond the file.", path=self.contents.name)


def _leaves(pair: Pair) -> list[tuple[TensorFacts, TensorFacts]]:
    """What has the bytes: the tensor, or those that it is made of."""
    a, b = pair.first, pair.second
    own = [(a, b)] if a.key is not None or not a.parts else []
    return [*own, *zip(a.parts, b.parts, strict=False)]


def _differs(one: _Reader, other: _Reader, pair: Pair) -> bool:
    a, b = pair.first, pair.second
    if (a.dtype, a.layout, a.details) != (b.dtype, b.layout, b.details):
        return True
    if len(a.parts) != len(b.parts) or (a.key is None) != (b.key is None):
        return True
    return any(
        x.numel != y.numel or any(left != right for left, right in _pieces(one, x, other, y))
        for x, y in _leaves(pair)
        if x.key is not None and y.key is not None
    )


def _pieces(
    one: _Reader, a: TensorFacts, other: _Reader, b: TensorFacts
) -> Iterator[tuple[bytearray, bytearray]]:
    """The elements of both, in an order that is the same for both, a piece at a time."""
    if not a.numel:
        return
    if (a.dense and b.dense) or (a.stride == b.stride and _packed(a)):
        for begin in range(0, a.numel, _PIECE_VALUES):
            count = min(_PIECE_VALUES, a.numel - begin)
            yield one.run(a, begin, count), other.run(b, begin, count)
    else:
        yield one.gathered(a), other.gathered(b)


def _packed(tensor: TensorFacts) -> bool:
    """Whether its elements lie in a run, in whatever order."""
    step = 1
    for stride, length in sorted(zip(tensor.stride or (), tensor.shape, strict=False)):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


def _measure(one: _Reader, other: _Reader, pair: Pair) -> None:
    """How far the numbers of a tensor have moved; NaN where they have no meaning, as quantised ones."""
    import torch

    change = pair.change
    change.measured = change.changed
    leaves = _leaves(pair)
    a, b = leaves[-1] if pair.first.layout != "sparse_coo" else leaves[min(1, len(leaves) - 1)]
    odd = {pair.first.layout, pair.second.layout} & {"quantised", "conjugate", "negative", "meta"}
    if a.key is None or b.key is None or odd or a.numel != b.numel:
        change.squared = change.largest = math.nan
        return
    try:
        dtype = _arithmetic(torch, a.dtype, b.dtype)
        for x, y in _pieces(one, a, other, b):
            before = _numbers(torch, x, a.dtype, dtype)
            change.squared_before += _norm(torch, before) ** 2
            if change.changed:
                moved = _numbers(torch, y, b.dtype, dtype) - before
                change.squared += _norm(torch, moved) ** 2
                change.largest = _larger(change.largest, float(moved.abs().max()))
    except (RuntimeError, AttributeError, TypeError, ValueError):  # a dtype that torch has no numbers for
        change.squared = change.largest = math.nan


def _larger(a: float, b: float) -> float:
    return math.nan if a != a or b != b else max(a, b)


def _arithmetic(torch: Any, first: str, second: str) -> Any:
    """The dtype to subtract in: exact for what it is given, and no wider than it has to be."""
    narrow = ("float32", "float16", "bfloat16", "float8")
    return torch.float32 if first.startswith(narrow) and second.startswith(narrow) else torch.float64


def _numbers(torch: Any, data: bytearray, dtype: str, wanted: Any) -> Any:
    raw = torch.frombuffer(data, dtype=getattr(torch, dtype))
    if raw.is_complex():
        return torch.view_as_real(raw.to(torch.complex128)).reshape(-1)
    return raw.to(wanted)


def _norm(torch: Any, values: Any) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
