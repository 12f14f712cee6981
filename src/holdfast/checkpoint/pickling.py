"""The pickle inside a checkpoint: written with torch's own calls, read without ever importing a name.

`scan` (in `opcodes`) checks what a pickle can make the C unpickler do before it runs; `SafeUnpickler` maps
the few globals that a file of plain values and tensors needs to functions that do one thing each.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch

from holdfast.checkpoint.pickle_scan import PLAIN, charge, given
from holdfast.checkpoint.pickle_scan import Call as Call
from holdfast.checkpoint.pickle_scan import PickleError as PickleError
from holdfast.checkpoint.pickle_scan import UnsafeGlobal as UnsafeGlobal
from holdfast.checkpoint.pickle_scan import allowance as allowance
from holdfast.checkpoint.pickle_scan import scan as scan
from holdfast.checkpoint.tensors import LAYOUTS, Plan, StorageRef

MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 60


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
    untyped: torch.UntypedStorage
    dtype: torch.dtype

    def __init__(self, untyped: torch.UntypedStorage, dtype: torch.dtype) -> None:
        object.__setattr__(self, "untyped", untyped)
        object.__setattr__(self, "dtype", dtype)

    __setattr__ = Call.__setattr__
    __setstate__ = Call.__setstate__


StorageReader = Callable[[str, str], "torch.UntypedStorage"]


class SafeUnpickler(pickle.Unpickler):
    """Builds plain values and tensors; a pickle that names anything else raises `UnsafeGlobal`."""

    def __init__(self, data: bytes, storage: StorageReader) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._storage = storage
        self._keys: set[str] = set()
        self._allowance_bytes = 16 * len(data) + (1 << 16)

    def load(self) -> Any:
        """Build it all.

        Raises:
            PickleError: for what no checkpoint has.
            UnsafeGlobal: it names what is not on the list.
            Exception: any, for a pickle that is malformed.
        """
        with allowance(self._allowance_bytes):
            return super().load()

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
        if key not in self._keys:
            self._keys.add(key)
            charge(-4 * storage.nbytes())  # for tensors that have to be computed
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
    if type(offset) is not int or len(size) > MOST_DIMENSIONS:
        raise PickleError("a tensor has an offset or a number of dimensions that none has")
    reach = offset
    numel = 1
    for length, step in zip(size, stride, strict=True):
        if type(length) is not int or type(step) is not int or length < 0 or step < 0:
            raise PickleError("a tensor has a size that is not one")
        numel *= length
        reach += (length - 1) * step
    if offset < 0 or (numel and (reach + 1) * dtype.itemsize > storage.untyped.nbytes()):
        raise PickleError(f"a tensor of shape {size} reaches beyond its record")
    if numel > MOST_ELEMENTS:  # an expanded one; torch counts in 64 bits
        raise PickleError(f"a tensor of shape {size} has more elements than can be counted")


def _dense(tensor: Any) -> torch.Tensor:
    """A tensor that something is about to be made of: no larger than the memory that the file gave it."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise PickleError("a tensor is made of something that is not a plain tensor")
    if not tensor.is_meta:
        size_bytes = tensor.numel() * tensor.itemsize
        if size_bytes > tensor.untyped_storage().nbytes():
            raise PickleError("a tensor is made of one that repeats its elements")
        charge(size_bytes)
    return tensor


def _viewed(tensor: torch.Tensor, metadata: Any) -> torch.Tensor:
    """A view with its conjugate or negative bit set, in files of torch.save."""
    if type(metadata) is not dict:
        raise PickleError(f"a {type(metadata).__name__} says nothing of a tensor")
    if tensor.is_meta:
        return tensor  # it lies under a key that the reader leaves out
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        # What repeats its elements would take more memory than the file has: left to be computed when used.
        tensor = tensor.conj() if metadata.get("conj") else tensor
        return torch._neg_view(tensor) if metadata.get("neg") else tensor
    if metadata.get("conj") and tensor.is_complex():
        tensor = _dense(tensor).conj_physical()
    return -_dense(tensor) if metadata.get("neg") else tensor


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
    if metadata:
        tensor = _viewed(tensor, metadata)
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
        scales, zeros = _numbers(scales, torch.float64), _numbers(zeros, torch.int64)
        size_bytes = dtype.itemsize * math.prod(size)
        if size_bytes > storage.untyped.nbytes():
            raise PickleError("a quantised tensor repeats its elements")
        charge(size_bytes)
        tensor = torch._empty_per_channel_affine_quantized(
            size, scales=scales, zero_points=zeros, axis=axis, dtype=dtype
        )
    make: Any = torch.storage.TypedStorage
    typed = make(wrap_storage=storage.untyped, dtype=dtype, _internal=True)
    return tensor.set_(typed, offset, size, stride)


def _numbers(values: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return _dense(values)
    if type(values) not in (list, tuple) or not {type(value) for value in values} <= {int, float}:
        raise PickleError("a quantised tensor has scales that are not numbers")
    charge(8 * len(values))
    return torch.tensor(values, dtype=dtype)


def _rebuild_sparse(layout: torch.layout, parts: Any) -> torch.Tensor:
    if type(layout) is not torch.layout or type(parts) is not tuple:
        raise PickleError("a sparse tensor is not made of a layout and parts")
    if any(getattr(part, "is_meta", False) for part in parts):
        return torch.empty(0, device="meta")  # it lies under a key that the reader leaves out
    if layout is torch.sparse_coo:
        indices, values, size, *rest = parts
        _check_size(size)
        indices, values = _dense(indices), _dense(values)
        coalesced = rest[0] if rest else None
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=True)
    rows, columns, values, size = parts
    _check_size(size)
    rows, columns, values = _dense(rows), _dense(columns), _dense(values)
    return torch.sparse_compressed_tensor(rows, columns, values, size, layout=layout, check_invariants=True)


def _rebuild_meta(dtype: torch.dtype, size: Any, stride: Any, grad: bool) -> torch.Tensor:
    if type(dtype) is not torch.dtype:
        raise PickleError(f"a {type(dtype).__name__} is not a dtype")
    for lengths in (size, stride):
        _check_size(lengths)
    return torch.empty_strided(size, stride, dtype=dtype, device="meta", requires_grad=grad is True)


def _check_size(size: Any) -> None:
    if type(size) not in (tuple, torch.Size) or len(size) > MOST_DIMENSIONS:
        raise PickleError("a tensor has a size that is not one")
    if not all(type(length) is int and 0 <= length <= MOST_ELEMENTS for length in size):
        raise PickleError("a tensor has a size that is not one")


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if type(function) is not Call or type(args) is not tuple:
        raise PickleError("a tensor is put together by something that does not make tensors")
    return function(*args)


def _layout(name: str) -> torch.layout:
    known = {str(layout): layout for layout in LAYOUTS}
    if type(name) is not str or name not in known:
        raise PickleError("it names a layout that no checkpoint has")
    return known[name]


def _device(*args: Any) -> torch.device:
    if not all(type(arg) is int or (type(arg) is str and len(arg) < 100) for arg in args):
        raise PickleError("it names a device by something that is not a name")
    return torch.device(*args)


def _size(*args: Any) -> torch.Size:
    for arg in given(args):
        if not all(type(length) is int for length in arg):
            raise PickleError("a size is not made of whole numbers")
    return torch.Size(*args)


def _globals() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        **PLAIN,
        ("torch", "Size"): Call(_size),
        ("torch", "device"): Call(_device),
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
