"""A checkpoint's pickle as plain facts, without torch: tensors as what is said of them, classes by name.

The same names are known here as in `pickling`; where that makes a tensor, this notes its dtype, its shape and
the bytes that it lies in. Nothing that the file names is imported or called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from holdfast.checkpoint.foreign_types import KNOWN, Opaque, inert_class, settle
from holdfast.checkpoint.itemsizes import ITEMSIZES as ITEMSIZES
from holdfast.checkpoint.pickle_scan import PLAIN, Call, PickleError, allowance, given

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64", "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8", "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4", "UntypedStorage": "uint8",
}  # fmt: skip
_QSCHEMES = (
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)  # fmt: skip


class _Frozen:
    """Not to be changed by what a pickle says."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise PickleError("it changes one of the reader's own objects")

    def __setstate__(self, state: Any) -> None:
        raise PickleError("it changes one of the reader's own objects")


class Constant(_Frozen):
    """One of torch's constants, such as a dtype; ``text`` is how it is written."""

    __slots__ = ("text",)
    text: str

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "text", text)

    def __repr__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


class _Storage(_Frozen):
    """A storage as a pickle refers to it."""

    __slots__ = ("dtype", "key", "location", "numel")
    dtype: str
    key: str
    location: str
    numel: int

    def __init__(self, dtype: str, key: str, location: str, numel: int) -> None:
        for name, value in zip(self.__slots__, (dtype, key, location, numel), strict=True):
            object.__setattr__(self, name, value)


class TensorFacts(_Frozen):
    """What a file says of a tensor.

    Attributes:
        dtype: without the ``torch.``
        shape: its shape.
        stride: in elements; None where it has none, as a sparse tensor.
        key: the storage that it lies in; None if it has no bytes of its own.
        offset: where in that storage it begins, in elements.
        location: the device that it was saved on.
        layout: "strided", "sparse_coo", ..., "quantised", "conjugate", "negative" or "meta".
        parts: the tensors that it is made of, where it is made of some.
        details: of a quantised one, its scheme and the numbers of that.
    """

    __slots__ = ("details", "dtype", "key", "layout", "location", "offset", "parts", "shape", "stride")
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    key: str | None
    offset: int
    location: str
    layout: str
    parts: tuple[TensorFacts, ...]
    details: tuple[Any, ...]

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        *,
        stride: tuple[int, ...] | None = None,
        key: str | None = None,
        offset: int = 0,
        location: str = "cpu",
        layout: str = "strided",
        parts: tuple[TensorFacts, ...] = (),
        details: tuple[Any, ...] = (),
    ) -> None:
        values = (details, dtype, key, layout, location, offset, parts, shape, stride)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def numel(self) -> int:
        """How many elements it has."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def itemsize(self) -> int:
        """Bytes of an element; 1 for a dtype that only a newer torch knows."""
        return ITEMSIZES.get(self.dtype, 1)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        if self.parts and self.layout != "quantised":
            return sum(part.size_bytes for part in self.parts)
        return 0 if self.layout == "meta" else self.numel * self.itemsize

    @property
    def dense(self) -> bool:
        """Whether its elements lie one after the other, in order."""
        step = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride or ()), strict=False):
            if length > 1 and stride != step:
                return False
            step *= length
        return self.stride is not None and len(self.stride) == len(self.shape)

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """Equal for two that are the very same elements; None where there are none."""
        return (
            None if self.key is None or not self.numel else (self.key, self.offset, self.shape, self.stride)
        )


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or not all(type(value) is int and value >= 0 for value in values):
        raise PickleError("a tensor has a size that is not one")
    if len(values) > 64:
        raise PickleError(f"a tensor has {len(values)} dimensions")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorFacts:
    if type(storage) is not _Storage or type(offset) is not int or offset < 0:
        raise PickleError("a tensor is put together from something that is not a storage")
    marks = rest[-1] if rest and isinstance(rest[-1], dict) else {}
    return TensorFacts(
        storage.dtype,
        _whole_numbers(size),
        stride=_whole_numbers(stride),
        key=storage.key,
        offset=offset,
        location=storage.location,
        layout="conjugate" if marks.get("conj") else "negative" if marks.get("neg") else "strided",
    )


def _retyped(made: TensorFacts, dtype: str, **more: Any) -> TensorFacts:
    kept = {"stride": made.stride, "key": made.key, "offset": made.offset, "location": made.location}
    return TensorFacts(dtype, made.shape, **{**kept, "layout": made.layout, **more})


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorFacts:
    return _retyped(_tensor(storage, offset, size, stride, *rest), _dtype(dtype))


def _dtype(dtype: Any) -> str:
    if type(dtype) is not Constant or not dtype.text.startswith("torch."):
        raise PickleError(f"a {type(dtype).__name__} is not a dtype")
    return dtype.text[6:]


def _quantised(storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *rest: Any) -> TensorFacts:
    made = _tensor(storage, offset, size, stride)
    if type(quantizer) is not tuple:
        raise PickleError("a quantised tensor has no scheme")
    parts = tuple(one for one in quantizer if type(one) is TensorFacts)
    details = tuple(one for one in quantizer if type(one) in (Constant, int, float))
    return _retyped(made, made.dtype, layout="quantised", parts=parts, details=details)


def _sparse(layout: Any, parts: Any) -> TensorFacts:
    tensors = tuple(part for part in parts if type(part) is TensorFacts)
    shapes = [part for part in parts if type(part) is tuple]
    if len(tensors) not in (2, 3) or not shapes:
        raise PickleError("a sparse tensor is made of something else than tensors and a size")
    name = str(layout).removeprefix("torch.")
    values = tensors[1] if name == "sparse_coo" else tensors[-1]
    return TensorFacts(
        values.dtype, _whole_numbers(shapes[0]), location=values.location, layout=name, parts=tensors
    )


def _meta(dtype: Any, size: Any, stride: Any, *rest: Any) -> TensorFacts:
    return TensorFacts(
        _dtype(dtype), _whole_numbers(size), stride=_whole_numbers(stride), layout="meta", location="meta"
    )


def _parameter(data: Any, *rest: Any) -> TensorFacts:
    if type(data) is not TensorFacts:
        raise PickleError("a parameter is made of something that is not a tensor")
    return data


def _from_type(function: Any, kind: Any, args: Any, *state: Any) -> Any:
    if type(function) is not Call or type(args) is not tuple:
        raise PickleError("a tensor is put together by something that does not make tensors")
    return function(*args)


def _device(kind: Any = "cpu", index: Any = None) -> str:
    return str(kind) if index is None else f"{kind}:{index}"


def _layout(name: Any) -> Constant:
    return Constant(str(name)[:60])


def _globals() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        **PLAIN,
        ("torch", "Size"): Call(lambda *args: tuple(*given(args))),
        ("torch", "device"): Call(_device),
        ("torch", "Tensor"): Constant("torch.Tensor"),
        ("torch.nn.parameter", "Parameter"): Constant("torch.nn.Parameter"),
        ("torch.serialization", "_get_layout"): Call(_layout),
        ("torch._tensor", "_rebuild_from_type_v2"): Call(_from_type),
    }
    rebuilders: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor": _tensor,
        "_rebuild_tensor_v2": _tensor,
        "_rebuild_tensor_v3": _tensor_v3,
        "_rebuild_parameter": _parameter,
        "_rebuild_parameter_with_state": _parameter,
        "_rebuild_qtensor": _quantised,
        "_rebuild_sparse_tensor": _sparse,
        "_rebuild_meta_tensor_no_storage": _meta,
    }
    for name, function in rebuilders.items():
        table["torch._utils", name] = Call(function)
    for name in (*ITEMSIZES, *_QSCHEMES):
        table["torch", name] = Constant(f"torch.{name}")
    for name in _STORAGES:
        for module in ("torch", "torch.cuda", "torch.storage"):
            table[module, name] = Constant(name)
    return table


GLOBALS = _globals()


class InertUnpickler(pickle.Unpickler):
    """Builds plain values and `TensorFacts`; for any other class an inert object that carries its name.

    Run `pickle_scan.scan` over the data first.

    Attributes:
        unlisted: what the pickle names that a file of plain values and tensors doesn't.
        inert: those among them that stay inert, as ``module.Name``.
        itemsizes: bytes of an element of each storage, by its key.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self.unlisted: dict[str, None] = {}
        self.inert: dict[str, None] = {}
        self.itemsizes: dict[str, int] = {}
        self._allowance_bytes = 16 * len(data) + (1 << 16)
        self._classes: dict[tuple[str, str], type[Opaque]] = {}

    def load(self) -> Any:
        """Build it all.

        Raises:
            PickleError: for what no checkpoint has.
            Exception: any, for a pickle that is malformed.
        """
        with allowance(self._allowance_bytes):
            value = super().load()
            return settle(value) if self.unlisted else value

    def find_class(self, module: str, name: str) -> Any:
        known = GLOBALS.get((module, name))
        if known is not None:
            return known
        self.unlisted[f"{module}.{name}"] = None
        known = KNOWN.get((module, name))
        if known is not None:
            return known
        self.inert[f"{module}.{name}"] = None
        return inert_class(module, name, self._classes)

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage":
            _, kind, key, location, numel = pid[:5]
            known = _STORAGES.get(kind.text) if type(kind) is Constant else None
            if known and (type(key), type(location), type(numel)) == (str, str, int) and numel >= 0:
                self.itemsizes[key] = ITEMSIZES[known]
                return _Storage(known, key, location, numel)
        raise PickleError(f"a {type(pid).__name__} does not refer to a storage")
