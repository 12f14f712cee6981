"""The pickle inside a checkpoint: written with torch's own calls, read without ever importing a name.

`scan` bounds what a pickle can make the C unpickler allocate before it runs; `SafeUnpickler` maps the few
globals that a file of plain values and tensors needs to functions that do one thing each.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import io
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch

from holdfast.checkpoint.tensors import LAYOUTS, Plan, StorageRef


class _Pickler(pickle.Pickler):
    """Writes each plain tensor as a reference into its record."""

    def __init__(self, file: io.BytesIO, plan: Plan) -> None:
        super().__init__(file, protocol=2)  # the protocol that torch.load(weights_only=True) knows
        self._plan = plan

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if type(obj) is StorageRef else None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            return self._plan.reduce(obj)
        if kind is collections.OrderedDict and not obj and not obj.__dict__:
            return collections.OrderedDict, ()  # the same bytes; its own __reduce__ takes 10 us
        return NotImplemented


def dumps(tree: Any, plan: Plan) -> bytes:
    """The tree's ``data.pkl``; ``plan`` says where each of its tensors lies."""
    buffer = io.BytesIO()
    _Pickler(buffer, plan).dump(tree)
    return buffer.getvalue()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's cyclic collector out while many containers are made, none of which can be garbage yet.

    Each of its passes walks all of them: at 100,000 tensors that doubles the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class PickleError(Exception):
    """The pickle is malformed, or asks for more than it could need."""


class UnsafeGlobal(Exception):
    """The pickle names something that is not on the list; ``name`` is what it names."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


# A run of opcodes whose length does not depend on their data, or that only name a global: in C, by `re`.
# Bounded, since `re` keeps a little memory for each repetition until the match is over.
_FIXED = re.compile(
    rb"(?:[(012NQRabdeltosu)\]}\x81\x85-\x89\x8f-\x94]"
    rb"|[Kqh\x80].|M..|[Jj]....|G.{8}|r..[\x00-\x3f]\x00|c[^\n]*\n[^\n]*\n){0,4000}",
    re.DOTALL,
)
_COUNTED: dict[int, tuple[str, int]] = {
    ord("X"): ("<I", 4), ord("B"): ("<I", 4), ord("T"): ("<i", 4), ord("U"): ("<B", 1), ord("C"): ("<B", 1),
    0x8A: ("<B", 1), 0x8B: ("<i", 4), 0x8C: ("<B", 1), 0x8D: ("<Q", 8), 0x8E: ("<Q", 8), 0x96: ("<Q", 8),
}  # fmt: skip
_LINES = {ord("I"): 1, ord("L"): 1, ord("F"): 1, ord("S"): 1, ord("V"): 1, ord("g"): 1, ord("i"): 2}
_STOP = ord(".")


def scan(data: bytes) -> int:
    """Check that a pickle is well formed and asks for no more memory than its own size warrants.

    Returns where it ends.

    Every counted length lies inside the data; memo slots are bounded by the number of opcodes; extension
    codes, out-of-band buffers and text persistent ids, which no checkpoint has, are refused.

    Raises:
        PickleError: with the offset of the first thing that is wrong.
    """
    at, end = 0, len(data)
    slots = max(1 << 16, end)
    fixed = _FIXED.match
    while True:
        run = fixed(data, at)
        if run is not None and run.end() > at:
            at = run.end()
            continue
        if at >= end:
            raise PickleError("it ends in the middle")
        code = data[at]
        if code == _STOP:
            return at + 1
        counted = _COUNTED.get(code)
        if counted is not None:
            form, width = counted
            if at + 1 + width > end:
                raise PickleError("it ends in the middle")
            (length,) = struct.unpack_from(form, data, at + 1)
            at += 1 + width + length
            if length < 0 or at > end:
                raise PickleError(f"byte {at} lies beyond its end")
        elif code == 0x95:  # a frame: a hint only, but the unpickler reads that much at once
            length = int.from_bytes(data[at + 1 : at + 9], "little")
            at += 9
            if at + length > end:
                raise PickleError(f"a frame of {length} bytes lies beyond its end")
        elif code == ord("r"):
            slot = int.from_bytes(data[at + 1 : at + 5], "little")
            if slot > slots:
                raise PickleError(f"memo slot {slot} is out of proportion to {end} bytes")
            at += 5
        elif code == ord("p"):
            line = data.find(b"\n", at)
            text = data[at + 1 : line]
            if line < 0 or not text.isdigit() or len(text) > 10 or int(text) > slots:
                raise PickleError(f"memo slot {text[:20]!r} is out of proportion to {end} bytes")
            at = line + 1
        elif code in _LINES:
            for _ in range(_LINES[code]):
                line = data.find(b"\n", at)
                if line < 0:
                    raise PickleError("it ends in the middle")
                at = line + 1
        else:
            raise PickleError(f"opcode {code:#04x} at byte {at} has no place in a checkpoint")


class Call:
    """A function that a pickle may call, and do nothing else with.

    A plain function would not do: the BUILD opcode can set its defaults.
    """

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise PickleError("it changes one of the reader's own functions")

    def __setstate__(self, state: Any) -> None:
        raise PickleError("it changes one of the reader's own functions")


class _Kind:
    """A storage class as a pickle names it: its dtype is all that it means."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __init__(self, dtype: torch.dtype) -> None:
        object.__setattr__(self, "dtype", dtype)

    __setattr__ = Call.__setattr__
    __setstate__ = Call.__setstate__


class _Storage:
    """A loaded record together with the dtype under which the pickle refers to it."""

    __slots__ = ("dtype", "untyped")

    def __init__(self, untyped: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.untyped = untyped
        self.dtype = dtype


StorageReader = Callable[[str, str], "torch.UntypedStorage"]


class SafeUnpickler(pickle.Unpickler):
    """Builds plain values and tensors; a pickle that names anything else raises `UnsafeGlobal`."""

    def __init__(self, data: bytes, storage: StorageReader) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._storage = storage
        self._known: dict[tuple[str, str, torch.dtype], _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return GLOBALS[module, name]
        except KeyError:
            return self.unknown_global(module, name)

    def unknown_global(self, module: str, name: str) -> Any:
        raise UnsafeGlobal(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, key, location, numel = storage_id(pid)
        storage = self._storage(key, location)
        if numel < 0 or numel * kind.dtype.itemsize > storage.nbytes():
            raise PickleError(
                f"data/{key} has {storage.nbytes()} bytes, which are not {numel} elements of {kind.dtype}"
            )
        return _Storage(storage, kind.dtype)


def storage_id(pid: Any) -> tuple[_Kind, str, str, int]:
    """What a persistent id says: the storage's kind, key, location and number of elements."""
    if type(pid) is tuple and len(pid) == 5 and pid[0] == "storage":
        _, kind, key, location, numel = pid
        if (type(kind), type(key), type(location), type(numel)) == (_Kind, str, str, int):
            return kind, key, location, numel
    raise PickleError(f"a {type(pid).__name__} does not refer to a storage")


def _check_bounds(storage: Any, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> None:
    """Refuse a tensor that reaches beyond its record: torch would grow the record instead."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise PickleError("a tensor is put together from something that is not a storage")
    reach = offset
    empty = False
    for length, step in zip(size, stride, strict=True):
        if length < 0 or step < 0:
            raise PickleError("a tensor has a negative size")
        empty = empty or length == 0
        reach += (length - 1) * step
    if offset < 0 or (not empty and (reach + 1) * dtype.itemsize > storage.untyped.nbytes()):
        raise PickleError(f"a tensor of shape {size} reaches beyond its record")


def _rebuild(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    grad: bool,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> torch.Tensor:
    if type(dtype) is not torch.dtype:
        raise PickleError(f"a {type(dtype).__name__} is not a dtype")
    _check_bounds(storage, dtype, offset, size, stride)
    tensor = torch.empty(0, dtype=dtype, device=storage.untyped.device)
    tensor.set_(storage.untyped, offset, size, stride)
    if metadata:  # a view with its conjugate or negative bit set, in files of torch.save
        tensor = tensor.conj_physical() if metadata.get("conj") else tensor
        tensor = -tensor if metadata.get("neg") else tensor
    return tensor.requires_grad_() if grad is True else tensor


def _rebuild_v2(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    dtype = storage.dtype if type(storage) is _Storage else None
    return _rebuild(storage, offset, size, stride, grad, hooks, dtype, metadata)


def _rebuild_parameter(data: Any, grad: bool, hooks: Any, state: Any = None) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise PickleError("a parameter is made of something that is not a tensor")
    return torch.nn.Parameter(data.detach(), requires_grad=grad is True)


def _rebuild_quantised(
    storage: Any, offset: int, size: Any, stride: Any, quantizer: Any, grad: bool, hooks: Any
) -> torch.Tensor:
    dtype = storage.dtype if type(storage) is _Storage else torch.uint8
    _check_bounds(storage, dtype, offset, size, stride)
    scheme, *params = quantizer
    if storage.untyped.device.type == "meta" or any(getattr(param, "is_meta", False) for param in params):
        return torch.empty_strided(size, stride, dtype=torch.uint8, device="meta")
    if scheme is torch.per_tensor_affine:
        tensor = torch._empty_affine_quantized((0,), scale=params[0], zero_point=params[1], dtype=dtype)
    else:
        scales, zeros, axis = params
        if not isinstance(scales, torch.Tensor):
            scales = torch.tensor(scales, dtype=torch.float64)
        if not isinstance(zeros, torch.Tensor):
            zeros = torch.tensor(zeros, dtype=torch.int64)
        tensor = torch._empty_per_channel_affine_quantized(
            size, scales=scales, zero_points=zeros, axis=axis, dtype=dtype
        )
    make: Any = torch.storage.TypedStorage
    typed = make(wrap_storage=storage.untyped, dtype=dtype, _internal=True)
    return tensor.set_(typed, offset, size, stride)


def _rebuild_sparse(layout: torch.layout, parts: Any) -> torch.Tensor:
    if any(getattr(part, "is_meta", False) for part in parts):
        return torch.empty(0, device="meta")  # it lies under a key that the reader leaves out
    if layout is torch.sparse_coo:
        indices, values, size, *rest = parts
        coalesced = rest[0] if rest else None
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=True)
    rows, columns, values, size = parts
    return torch.sparse_compressed_tensor(rows, columns, values, size, layout=layout, check_invariants=True)


def _rebuild_meta(dtype: torch.dtype, size: Any, stride: Any, grad: bool) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta", requires_grad=grad is True)


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if type(function) is not Call:
        raise PickleError("a tensor is put together by something that does not make tensors")
    return function(*args)


def _layout(name: str) -> torch.layout:
    known = {str(layout): layout for layout in LAYOUTS}
    if type(name) is not str or name not in known:
        raise PickleError("it names a layout that no checkpoint has")
    return known[name]


def _encoded_bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise PickleError("it has bytes in an encoding that no checkpoint has")
    return text.encode("latin-1")


def _given(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that are values with a size of their own: ``bytearray(1 << 40)`` would be a bomb."""
    if len(args) > 1 or not all(type(arg) in (list, tuple, dict, bytes) for arg in args):
        raise PickleError("a collection is made of something that is not one")
    return args


def _globals() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): Call(lambda *args: collections.OrderedDict(*_given(args))),
        ("collections", "Counter"): Call(lambda *args: collections.Counter(*_given(args))),
        ("_codecs", "encode"): Call(_encoded_bytes),
        ("torch", "Size"): Call(lambda *args: torch.Size(*_given(args))),
        ("torch", "device"): Call(lambda *args: torch.device(*args)),
        ("torch", "Tensor"): torch.Tensor.__name__,
        ("torch.nn.parameter", "Parameter"): "Parameter",
        ("torch.serialization", "_get_layout"): Call(_layout),
        ("torch._tensor", "_rebuild_from_type_v2"): Call(_rebuild_from_type),
    }
    rebuilders: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor": _rebuild_v2,
        "_rebuild_tensor_v2": _rebuild_v2,
        "_rebuild_tensor_v3": _rebuild,
        "_rebuild_parameter": _rebuild_parameter,
        "_rebuild_parameter_with_state": _rebuild_parameter,
        "_rebuild_qtensor": _rebuild_quantised,
        "_rebuild_sparse_tensor": _rebuild_sparse,
        "_rebuild_meta_tensor_no_storage": _rebuild_meta,
    }
    for name, function in rebuilders.items():
        table["torch._utils", name] = Call(function)
    collections_by_name: dict[str, Callable[..., Any]] = {
        "set": lambda *args: set(*_given(args)),
        "frozenset": lambda *args: frozenset(*_given(args)),
        "bytearray": lambda *args: bytearray(*_given(args)),
        "bytes": lambda *args: bytes(*_given(args)),
        "complex": complex,
    }
    for name, builtin in collections_by_name.items():
        table["builtins", name] = table["__builtin__", name] = Call(builtin)
    for dtype in (value for value in vars(torch).values() if isinstance(value, torch.dtype)):
        table["torch", str(dtype).removeprefix("torch.")] = dtype
    for dtype, name in torch.storage._dtype_to_storage_type_map().items():
        table["torch", name] = table["torch.cuda", name] = _Kind(dtype)
    table["torch.storage", "UntypedStorage"] = table["torch", "UntypedStorage"] = _Kind(torch.uint8)
    for scheme in (
        torch.per_tensor_affine, torch.per_tensor_symmetric, torch.per_channel_affine,
        torch.per_channel_symmetric, torch.per_channel_affine_float_qparams,
    ):  # fmt: skip
        table["torch", str(scheme).removeprefix("torch.")] = scheme
    return table


GLOBALS = _globals()
