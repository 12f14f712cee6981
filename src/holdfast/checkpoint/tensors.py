"""Which bytes of which storages go into the file, so that shared memory is stored once and unused memory never."""

from __future__ import annotations

import ctypes
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

CHUNK_BYTES = 16 << 20

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memory_view.restype = ctypes.py_object
_READ, _WRITE = 0x100, 0x200

_LEGACY_STORAGES: dict[torch.dtype, Any] = {
    dtype: getattr(torch, name) for dtype, name in torch.storage._dtype_to_storage_type_map().items()
}


def memory(address: int, length: int, *, writable: bool = False) -> memoryview:
    """A view of ``length`` bytes at an address; whoever asks keeps the owner of the memory alive."""
    if length == 0:
        return memoryview(bytearray())
    view: memoryview = _memory_view(address, length, _WRITE if writable else _READ)
    return view


class StorageRef:
    """Stands for a storage in the pickle; the pickler writes its persistent id."""

    __slots__ = ("pid",)

    def __init__(self, pid: tuple[Any, ...]) -> None:
        self.pid = pid


@dataclasses.dataclass
class Record:
    """One ``data/N`` record: a run of bytes of one storage, or one tensor that must be made dense.

    Attributes:
        tensors: (path, dtype, shape) of what lies in it.
        dense: set if the bytes are ``dense.contiguous()`` instead of a run of the storage.
    """

    key: str
    storage: torch.UntypedStorage
    start: int
    length: int
    location: str
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]
    dense: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"data/{self.key}"

    def small(self) -> bytes:
        """The record's bytes, copied."""
        if self.dense is None and self.storage.device.type == "cpu":
            return ctypes.string_at(self.storage.data_ptr() + self.start, self.length) if self.length else b""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[Any]:
        """The record's bytes in pieces of about `CHUNK_BYTES`; a device's memory is copied piece by piece."""
        if self.dense is not None:
            yield from _dense_chunks(self.dense)
        elif self.storage.device.type == "cpu":
            address = self.storage.data_ptr() + self.start
            for at in range(0, self.length, CHUNK_BYTES):
                yield memory(address + at, min(CHUNK_BYTES, self.length - at))
        else:
            whole = torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)
            for at in range(self.start, self.start + self.length, CHUNK_BYTES):
                piece = whole[at : min(at + CHUNK_BYTES, self.start + self.length)].cpu()
                yield _bytes_of(piece)


def _dense_chunks(tensor: torch.Tensor) -> Iterator[Any]:
    row_bytes = tensor[:1].numel() * tensor.element_size()
    if tensor.dim() > 1 and row_bytes > CHUNK_BYTES:
        for row in tensor:
            yield from _dense_chunks(row)
        return
    rows = max(1, CHUNK_BYTES // max(1, row_bytes))
    for at in range(0, tensor.shape[0], rows):
        piece = tensor[at : at + rows].to("cpu", memory_format=torch.contiguous_format).contiguous()
        yield _bytes_of(piece)


def _bytes_of(piece: torch.Tensor) -> bytes:
    return ctypes.string_at(piece.data_ptr(), piece.numel() * piece.element_size())


class Plan:
    """The records of a set of tensors, and how each tensor is rebuilt from them.

    Tensors that overlap in memory share a record (tied weights, views). A tensor alone on its stretch of a
    storage is stored without the rest of that storage, so a small view of a large buffer stays small.
    """

    def __init__(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.records: list[Record] = []
        self._rebuilt: dict[int, _Rebuild] = {}
        self._composed: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self._spans: dict[int, list[_Span]] = {}
        self._count = 0
        self._kept: list[torch.Tensor] = []  # the plan goes by id, so what it has seen stays alive
        for name, tensor in tensors:
            self._add(name, tensor)
        placed = [self._place(cluster) for group in self._spans.values() for cluster in _clusters(group)]
        for number, (_, record) in enumerate(sorted(placed, key=lambda pair: pair[0])):
            record.key = str(number)
            self.records.append(record)

    def reduce(self, tensor: torch.Tensor) -> Any:
        """What a pickler's ``reducer_override`` returns for this tensor."""
        known = self._rebuilt.get(id(tensor))
        if known is None:
            # Sparse tensors are made of tensors; a meta tensor is torch's own business: it has no bytes.
            return self._composed.get(id(tensor), NotImplemented)
        storage = StorageRef(("storage", known.kind, known.record.key, known.record.location, known.numel))
        # torch.load shares what the pickle shares, and a shared dict of hooks would be a bug: a new one each.
        return known.function, (storage, *known.where, *known.params, False, OrderedDict(), *known.last)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        self._kept.append(tensor)
        if tensor.layout is not torch.strided:
            self._add_sparse(name, tensor)
            return
        params: tuple[Any, ...] = ()
        if tensor.is_quantized:
            params = (self._quantizer(name, tensor),)
        storage = tensor.untyped_storage()
        self._spans.setdefault(storage._cdata, []).append(_Span(name, tensor, storage, params, self._count))
        self._count += 1

    def _quantizer(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        if tensor.qscheme() == torch.per_tensor_affine:
            return (torch.per_tensor_affine, tensor.q_scale(), tensor.q_zero_point())
        parts = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
        for part in parts:
            self._add(name, part)
        return (torch.per_channel_affine, *parts, tensor.q_per_channel_axis())

    def _add_sparse(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.layout is torch.sparse_coo:
            parts = [tensor._indices(), tensor._values()]
            rest: tuple[Any, ...] = (tensor.size(), tensor.is_coalesced())
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts, rest = [tensor.crow_indices(), tensor.col_indices(), tensor.values()], (tensor.size(),)
        else:
            parts, rest = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()], (tensor.size(),)
        for part in parts:
            self._add(name, part)
        rebuild = torch._utils._rebuild_sparse_tensor
        self._composed[id(tensor)] = (rebuild, (tensor.layout, (*parts, *rest)))

    def _place(self, cluster: list[_Span]) -> tuple[int, Record]:
        first = cluster[0]
        low = min(span.low for span in cluster)
        high = max(span.high for span in cluster)
        mixed = len({span.tensor.dtype for span in cluster}) > 1
        if mixed:
            low -= low % 16  # so that every dtype's offset stays a whole number of its elements
        dense = None
        if high - low > 2 * first.used and all(span.same_as(first) for span in cluster):
            dense = first.tensor
            high = low + first.used
        location = "cpu" if first.storage.device.type == "cpu" else _location(first.storage)
        record = Record("", first.storage, low, high - low, location, [], dense)
        for span in cluster:
            tensor = span.tensor
            shape = tuple(tensor.shape)
            size = tensor.element_size()
            record.tensors.append((span.name, tensor.dtype, shape))
            stride = tuple(tensor.stride()) if dense is None else _dense_stride(shape)
            where = ((span.low - low) // size, shape, stride)
            kind = _LEGACY_STORAGES.get(tensor.dtype)
            if tensor.is_quantized:
                rebuild = _Rebuild(torch._utils._rebuild_qtensor, record, kind, record.length // size, where)
                rebuild = rebuild._replace(params=span.params)
            elif mixed or kind is None:
                untyped, last = torch.UntypedStorage, (tensor.dtype,)
                rebuild = _Rebuild(torch._utils._rebuild_tensor_v3, record, untyped, record.length, where, last)
            else:
                rebuild = _Rebuild(torch._utils._rebuild_tensor_v2, record, kind, record.length // size, where)
            self._rebuilt[id(tensor)] = rebuild
        return min(span.order for span in cluster), record


class _Rebuild(NamedTuple):
    """The call that makes one tensor from its record's storage, in torch's own words."""

    function: Callable[..., Any]
    record: Record
    kind: Any
    numel: int
    where: tuple[int, tuple[int, ...], tuple[int, ...]]
    last: tuple[Any, ...] = ()
    params: tuple[Any, ...] = ()


class _Span:
    """Where one tensor lies in its storage, in bytes."""

    __slots__ = ("high", "low", "name", "order", "params", "storage", "tensor", "used")

    def __init__(
        self, name: str, tensor: torch.Tensor, storage: torch.UntypedStorage, params: tuple[Any, ...], order: int
    ) -> None:
        self.name = name
        self.tensor = tensor
        self.storage = storage
        self.params = params
        self.order = order
        size = tensor.element_size()
        numel = tensor.numel()
        self.used = numel * size
        if numel == 0:
            self.low = self.high = 0
            return
        self.low = tensor.storage_offset() * size
        if tensor.is_contiguous():
            self.high = self.low + self.used
        else:
            reach = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            self.high = self.low + (reach + 1) * size

    def same_as(self, other: _Span) -> bool:
        a, b = self.tensor, other.tensor
        return self.low == other.low and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _clusters(group: list[_Span]) -> list[list[_Span]]:
    """Sort the spans of one storage into runs that overlap; empty ones and strangers stay alone."""
    if len(group) == 1:
        return [group]
    clusters: list[list[_Span]] = []
    high = -1
    for span in sorted(group, key=lambda span: (span.low, span.high)):
        if clusters and span.used and span.low < high:
            clusters[-1].append(span)
            high = max(high, span.high)
        else:
            clusters.append([span])
            high = span.high
    return clusters


def _dense_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(1, length)
    return tuple(reversed(stride))


def _location(storage: torch.UntypedStorage) -> str:
    return str(torch.serialization.location_tag(storage))
