"""Which bytes of which storages go into the file: shared memory once, unused memory never."""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from holdfast.errors import CheckpointIncompatible

CHUNK_BYTES = 4 << 20

LAYOUTS = (
    torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip

_memmove = ctypes.memmove
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


class Record:
    """One ``data/N`` record: a run of bytes of one storage, or one tensor that must be made dense.

    Attributes:
        spans: the tensors that lie in it.
        start: where in the storage the run begins, in bytes.
        length: in bytes.
        dense: whether the bytes are those of the first span's tensor made contiguous, not a run.
        address: where the bytes lie, if they are a run of host memory; else None.
    """

    __slots__ = ("address", "dense", "key", "length", "location", "spans", "start")

    def __init__(self, spans: list[Span], start: int, length: int, *, dense: bool = False) -> None:
        self.key = ""
        self.spans = spans
        self.start = start
        self.length = length
        self.dense = dense
        self.address: int | None = None
        self.location = "cpu"
        first = spans[0]
        if not first.tensor.is_cpu:
            self.location = str(torch.serialization.location_tag(first.storage))
        elif not dense:
            self.address = first.tensor.data_ptr() - first.low + start

    @property
    def name(self) -> str:
        return f"data/{self.key}"

    def copy_to(self, address: int) -> None:
        """Copy the record's bytes to host memory, without holding the GIL where they are many."""
        if self.address is not None:
            _memmove(address, self.address, self.length)
            return
        for source, length in self.pieces():
            _memmove(address, source, length)
            address += length

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(address, length) of the record's bytes in host memory, in pieces of up to about `CHUNK_BYTES`.

        A device's memory, and what has to be made dense, is copied piece by piece: each is good only until
        the next one is asked for.
        """
        if self.address is not None:
            for at in range(0, self.length, CHUNK_BYTES):
                yield self.address + at, min(CHUNK_BYTES, self.length - at)
        elif self.dense:
            yield from _dense_pieces(self.spans[0].tensor)
        else:
            whole = self.run()
            for at in range(0, self.length, CHUNK_BYTES):
                piece = whole[at : at + CHUNK_BYTES].cpu()
                yield piece.data_ptr(), piece.numel()

    def run(self) -> torch.Tensor:
        """The bytes of a record that is a run of a storage, as they lie in its device's memory."""
        storage = self.spans[0].storage
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return whole.set_(storage, self.start, (self.length,), (1,))


def _dense_pieces(tensor: torch.Tensor, scratch: torch.Tensor | None = None) -> Iterator[tuple[int, int]]:
    size = tensor.element_size()
    if scratch is None and not tensor.is_quantized:
        # One for all pieces: memory asked for and given back piece by piece would not stay small.
        scratch = torch.empty(min(tensor.numel(), CHUNK_BYTES // size), dtype=tensor.dtype)
    row_bytes = tensor[:1].numel() * size
    if tensor.dim() > 1 and row_bytes > CHUNK_BYTES:
        for row in tensor:
            yield from _dense_pieces(row, scratch)
        return
    rows = max(1, CHUNK_BYTES // max(1, row_bytes))
    for at in range(0, tensor.shape[0], rows):
        piece = tensor[at : at + rows]
        if scratch is None:
            piece = piece.contiguous().cpu()
        else:
            piece = scratch[: piece.numel()].view(piece.shape).copy_(piece)
        yield piece.data_ptr(), piece.numel() * size


def check_reach(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes ``low`` to ``high`` of its storage in which a strided tensor lies; (0, 0) if it is empty.

    Raises:
        ValueError: if it has no memory that could be read, with the reason as text.
    """
    reach = tensor.numel()
    if reach == 0:
        return 0, 0
    size = tensor.itemsize
    low = int(tensor.storage_offset()) * size
    if not tensor.is_contiguous():
        reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    high = low + reach * size
    if high > tensor.untyped_storage().nbytes():
        raise ValueError("its memory has been freed, or was never allocated")
    return low, high


class Span:
    """Where one tensor lies in memory: bytes ``low`` to ``high`` of its storage.

    Raises:
        ValueError: if it has no memory that could be read, with the reason as text.
    """

    __slots__ = ("dense", "high", "kind", "low", "name", "record", "stride", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.record: Record | None = None
        self.kind = _LEGACY_STORAGES.get(tensor.dtype)
        self.dense = tensor.is_contiguous()
        self.stride = tensor.stride()
        self.low, self.high = check_reach(tensor)

    @property
    def storage(self) -> torch.UntypedStorage:
        return self.tensor.untyped_storage()

    @property
    def used(self) -> int:
        return self.tensor.numel() * self.tensor.itemsize

    def same_as(self, other: Span) -> bool:
        """Whether the other tensor is a view of the very same elements."""
        a, b = self.tensor, other.tensor
        return (self.low, a.shape, self.stride, a.dtype) == (other.low, b.shape, other.stride, b.dtype)


Signature = list[tuple[Any, ...]]


class Plan:
    """The records of a set of tensors, and how each tensor is rebuilt from them.

    Tensors that overlap in memory share a record (tied weights, views). A tensor alone on its stretch of a
    storage is stored without the rest of that storage, so a small view of a large buffer stays small.

    A plan that was signed (`sign`) can be used again (`rebind`); `release` lets go of the tensors meanwhile.

    Attributes:
        records: in the order of the file.
    """

    def __init__(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.records: list[Record] = []
        self._signature: Signature | None = None
        self._spans: dict[int, Span] = {}
        self._composed: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self._quantizers: dict[int, tuple[Any, ...]] = {}
        self._by_storage: dict[int, list[Span]] = {}
        self._by_tensor: list[Span | None] = []
        self._kept: list[torch.Tensor] = []  # the plan goes by id, so what it has seen stays alive
        for name, tensor in tensors:
            self._add(name, tensor)
        for group in self._by_storage.values():
            for cluster in [group] if len(group) == 1 else _clusters(group):
                self._place(cluster)
        for number, record in enumerate(self.records):
            record.key = str(number)
        self._by_storage = {}
        self._named = tensors

    def rebind(self, tensors: list[tuple[str, torch.Tensor]]) -> bool:
        """Go on to other tensors, if they lie where the old ones did; return whether they do.

        They do if all names, addresses, shapes, strides, dtypes and devices are the same: then so are the
        records. Plans of sparse and quantised tensors are not used again.
        """
        known = self._signature
        if known is None or any(tensor.layout is not torch.strided for _, tensor in tensors):
            return False
        if len(tensors) != len(known) or _signature(tensors) != known:
            return False
        self._kept = [tensor for _, tensor in tensors]
        self._spans = {}
        for span, tensor in zip(self._by_tensor, self._kept, strict=True):
            if span is not None:
                span.tensor = tensor
                self._spans[id(tensor)] = span
        return True

    def release(self) -> None:
        """Let go of the tensors, and of the memory that only they hold, until `rebind`."""
        self._spans, self._kept, self._named = {}, [], []
        self._composed, self._quantizers = {}, {}
        for span in self._by_tensor:
            if span is not None:
                span.tensor = _NOTHING

    def sign(self) -> None:
        """Note what `rebind` goes by, if this plan can be used again at all.

        To be called before any of the tensors may be moved to other memory.
        """
        if not self._composed and not self._quantizers:
            self._signature = _signature(self._named)

    def reduce(self, tensor: torch.Tensor) -> Any:
        """What a pickler's ``reducer_override`` returns for this tensor: torch's own words for it."""
        span = self._spans.get(id(tensor))
        if span is None or span.record is None:
            # Sparse tensors are made of tensors; a meta tensor is torch's own business: it has no bytes.
            return self._composed.get(id(tensor), NotImplemented)
        record, kind, numel = span.record, span.kind, span.record.length
        last: tuple[Any, ...] = ()
        rebuild: Callable[..., Any] = torch._utils._rebuild_tensor_v2
        if kind is None:
            kind, rebuild, last = torch.UntypedStorage, torch._utils._rebuild_tensor_v3, (tensor.dtype,)
        else:
            numel //= tensor.itemsize
        where = (span.low - record.start) // tensor.itemsize, tuple(tensor.shape), span.stride
        storage = StorageRef(("storage", kind, record.key, record.location, numel))
        # torch.load shares what the pickle shares, and a shared dict of hooks would be a bug: a new one each.
        if tensor.is_quantized:
            quantizer = self._quantizers[id(tensor)]
            return torch._utils._rebuild_qtensor, (storage, *where, quantizer, False, OrderedDict())
        return rebuild, (storage, *where, False, OrderedDict(), *last)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self._kept.append(tensor)
        if tensor.layout is not torch.strided:
            self._add_sparse(name, tensor)
            return
        if tensor.is_meta:
            self._by_tensor.append(None)
            return
        if tensor.is_quantized:
            self._add_quantizer(name, tensor)
        span = self._spans[id(tensor)] = Span(name, tensor)
        self._by_tensor.append(span)
        self._by_storage.setdefault(span.storage._cdata, []).append(span)

    def _add_quantizer(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.qscheme() == torch.per_tensor_affine:
            known: tuple[Any, ...] = (torch.per_tensor_affine, tensor.q_scale(), tensor.q_zero_point())
        else:
            parts = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
            for part in parts:
                self._add(name, part)
            known = (torch.per_channel_affine, *parts, tensor.q_per_channel_axis())
        self._quantizers[id(tensor)] = known

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

    def _place(self, cluster: list[Span]) -> None:
        first = cluster[0]
        low, high, dense = first.low, first.high, False
        if len(cluster) > 1:
            low = min(span.low for span in cluster)
            high = max(span.high for span in cluster)
            if len({span.tensor.dtype for span in cluster}) > 1:
                low -= low % 16  # so that every dtype's offset stays a whole number of its elements
                for span in cluster:
                    span.kind = None
        if not first.dense and high - low > 2 * first.used and all(span.same_as(first) for span in cluster):
            dense = True
            high = low + first.used
            for span in cluster:
                span.stride = _dense_stride(tuple(first.tensor.shape))
        record = Record(cluster, low, high - low, dense=dense)
        for span in cluster:
            span.record = record
        self.records.append(record)


def _signature(tensors: list[tuple[str, torch.Tensor]]) -> Signature:
    """All that a plan depends on."""
    return [
        (name, t.data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype, t.device)
        for name, t in tensors
    ]


_NOTHING = torch.empty(0)


def _clusters(group: list[Span]) -> list[list[Span]]:
    """Sort the spans of one storage into runs that overlap; empty ones and strangers stay alone."""
    clusters: list[list[Span]] = []
    high = -1
    for span in sorted(group, key=lambda span: (span.low, span.high)):
        if clusters and span.low < min(high, span.high):
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


Mover = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]


def mover(map_location: Any, name: str) -> Mover | None:
    """What puts a loaded storage where ``map_location`` says; None leaves it be.

    It is what `torch.load` takes: a device, a mapping of devices or a function; but None means the device
    that a storage was saved on where this machine has it, else the CPU.

    What it returns raises `CheckpointIncompatible` where a storage of the file ``name`` cannot go there.
    """
    if isinstance(map_location, dict):
        map_location = {_device_text(key): _device_text(value) for key, value in map_location.items()}
    elif map_location is not None and not callable(map_location):
        map_location = _device_text(map_location)
        if map_location == "cpu":
            return None
    get_restore: Any = torch.serialization._get_restore_location
    restore: Mover = get_restore(_saved_or_cpu if map_location is None else map_location)

    def move(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        try:
            moved = restore(storage, location)
            if type(moved) is not torch.UntypedStorage or moved.nbytes() != storage.nbytes():
                kind = type(moved).__name__
                raise TypeError(f"it gave a {kind}, expected an UntypedStorage of that length, or None")
            return moved
        except Exception as error:
            raise CheckpointIncompatible(
                f"The tensors of {os.path.basename(name)} were saved on {location[:40]} and cannot be loaded "
                f'with map_location={map_location!r}: {error}\nTo load them anywhere: map_location="cpu".',
                path=name,
            ) from error

    return move


def _device_text(device: Any) -> str:
    """``"cuda:1"`` for the device, its text or its number among the accelerators."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _saved_or_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """As `torch.load` calls it: None where torch should put the storage back on its device."""
    kind, _, index = location.partition(":")
    number = int(index) if index.isdigit() else 0
    if kind == "cuda" and number < torch.cuda.device_count():
        return None
    if kind == "xpu" and number < torch.xpu.device_count():
        return None
    if kind == "mps" and torch.backends.mps.is_available():
        return None
    return storage


def new_storage(length: int, device: str = "cpu") -> torch.UntypedStorage:
    """Memory of its own for one record; its content is whatever was there before."""
    make: Any = torch.UntypedStorage
    storage: torch.UntypedStorage = make(length, device=device)
    return storage
