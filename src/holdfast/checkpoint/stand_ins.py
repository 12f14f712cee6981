"""The nearest plain value of every type that a payload may hold: one small function a type.

Each takes the encoder (which walks into containers) and the value, and returns what stands in the file and
the spec that gives the exact type back, or raises `Unstorable` with the reason why there is nothing to store.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import sys
import types
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from holdfast.checkpoint import exact
from holdfast.checkpoint.exact import Spec
from holdfast.checkpoint.tensors import LAYOUTS, check_reach

Plain = tuple[Any, "Spec | None"]


class Unstorable(Exception):
    """The reason why one value is left out; caught by the container that holds it."""


class Encoder(Protocol):
    """What the functions here need of `payload`'s walk."""

    def value(self, obj: Any) -> Plain:
        """Encode one value inside the current one."""

    def mapping(self, pairs: Iterable[tuple[Any, Any]], into: dict[Any, Any]) -> Spec | None:
        """Encode each value of a mapping into ``into``; return the spec of its items."""

    def sequence(self, values: Iterable[Any], *, drop: bool = False) -> tuple[list[Any], Spec | None]:
        """Encode each value; return them with the spec of its items. ``drop`` leaves no None in a gap."""

    def once(self, obj: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What ``make`` made of this very tensor, the same one each time."""

    def tensor(self, plain: torch.Tensor) -> None:
        """Take note of a tensor at the current path."""

    def omit(self, reason: object, *more: str) -> None:
        """Take note of something that is left out at the current path."""


Handler = Callable[[Encoder, Any], Plain]

MAX_INT_BITS = 2000  # torch's reader takes integers of up to 255 bytes


def plain_key(key: Any, depth: int = 0) -> Any:
    """The key as torch.load accepts it, equal to the original and with the same hash."""
    if key is None or type(key) in (bool, float):
        return key
    if isinstance(key, (str, int, float)):
        plain = _plain_number_or_text(key)
        if type(plain) is int and plain.bit_length() >= MAX_INT_BITS:
            raise Unstorable(f"a whole number of {plain.bit_length()} bits cannot be stored as a key")
        return plain
    if isinstance(key, tuple) and depth < 20:
        return tuple(plain_key(part, depth + 1) for part in key)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(key, numpy.generic) and type(key.item()) in (bool, int, float):
        return key.item()
    raise Unstorable(f"a key of type {exact.type_name(type(key))} cannot be stored")


def _plain_number_or_text(obj: Any) -> Any:
    for base in (bool, int, float, complex, str):
        if isinstance(obj, base):
            # The base's own method, since a subclass may say something else in __str__ or __int__.
            own: Any = base.__str__ if base is str else getattr(base, "__pos__", None)
            return obj if type(obj) is base else own(obj)
    raise AssertionError(obj)


def _typed(word: str, spec: Spec | None = None, **more: Any) -> Spec:
    return {"type": word, **more, **(spec or {})}


# --- leaves -----------------------------------------------------------------------------------------------


def _int(encoder: Encoder, obj: int) -> Plain:
    if obj.bit_length() < MAX_INT_BITS:
        return obj, None
    return hex(obj), _typed("int")


def _number_or_text(encoder: Encoder, obj: Any) -> Plain:
    plain = _plain_number_or_text(obj)
    return _int(encoder, plain) if type(plain) is int else (plain, None)


def _bytes(encoder: Encoder, obj: Any) -> Plain:
    # Empty bytes pickle as a call that torch.load refuses; an empty bytearray does not.
    return (bytes(obj), None) if len(obj) else (bytearray(), _typed("bytes"))


def _bytearray(encoder: Encoder, obj: Any) -> Plain:
    return bytearray(obj), None


def _path(encoder: Encoder, obj: pathlib.PurePath) -> Plain:
    name = type(obj).__name__
    return str(obj), _typed("path") if isinstance(obj, pathlib.Path) else _typed("path", {"class": name})


def _iso(word: str) -> Handler:
    def handler(encoder: Encoder, obj: Any) -> Plain:
        text = str.__str__(obj.isoformat())
        spec = _typed(word, fold=1) if getattr(obj, "fold", 0) else _typed(word)
        # A subclass may write what the base cannot read: pandas has nanoseconds, and "NaT".
        back = exact.restore(text, spec)
        return text, spec if back is not text and back.isoformat() == text else None

    return handler


_datetime, _date, _time = _iso("datetime"), _iso("date"), _iso("time")


def _timedelta(encoder: Encoder, obj: datetime.timedelta) -> Plain:
    return obj.total_seconds(), _typed("timedelta", parts=[obj.days, obj.seconds, obj.microseconds])


def _timezone(encoder: Encoder, obj: datetime.timezone) -> Plain:
    offset, name = obj.utcoffset(None), obj.tzname(None)
    named: Spec = {} if name == datetime.timezone(offset).tzname(None) else {"name": name}
    return offset.total_seconds(), _typed("timezone", **named)


def _uuid(encoder: Encoder, obj: uuid.UUID) -> Plain:
    return str(obj), _typed("uuid")


def _decimal(encoder: Encoder, obj: decimal.Decimal) -> Plain:
    return str(obj), _typed("decimal")


def _fraction(encoder: Encoder, obj: fractions.Fraction) -> Plain:
    return str(obj), _typed("fraction")


def _torch_constant(encoder: Encoder, obj: Any) -> Plain:
    name = str(obj).removeprefix("torch.")
    if name not in exact.TORCH_CONSTANTS:
        raise Unstorable(f"{obj} cannot be stored")
    return name, _typed("torch")


def encode_tensor(encoder: Encoder, obj: torch.Tensor) -> Plain:
    """A new plain tensor on the memory of the original: a later ``.data =`` or `set_` does not reach it."""
    plain = encoder.once(obj, _plain_tensor)
    encoder.tensor(plain)
    return plain, None


def _plain_tensor(obj: torch.Tensor) -> torch.Tensor:
    kind = type(obj)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        plain = obj.detach()
    else:
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise Unstorable(f"a tensor of type {exact.type_name(kind)} has no memory of its own")
        if torch.nn.parameter.is_lazy(obj):
            raise Unstorable("it has not been initialised yet")
        with torch._C.DisableTorchFunctionSubclass():
            plain = obj.detach()
            if type(plain) is not torch.Tensor:
                plain = plain.as_subclass(torch.Tensor)
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    _check_memory(plain)
    return plain


def _check_memory(tensor: torch.Tensor) -> None:
    if tensor.is_nested:
        raise Unstorable("a nested tensor cannot be stored")
    if tensor.layout is not torch.strided:
        if tensor.layout not in LAYOUTS:
            raise Unstorable(f"a tensor of layout {tensor.layout} cannot be stored")
        return
    if tensor.is_quantized and tensor.dtype in (torch.quint4x2, torch.quint2x4):
        raise Unstorable(f"a tensor of dtype {tensor.dtype} cannot be stored")
    if not tensor.is_meta:
        try:
            check_reach(tensor)
        except (ValueError, RuntimeError) as error:  # the latter for devices whose memory torch cannot see
            raise Unstorable(str(error)) from None


def _generator(encoder: Encoder, obj: torch.Generator) -> Plain:
    raise Unstorable("a generator cannot be stored; store its get_state()")


# --- NumPy ------------------------------------------------------------------------------------------------


def _ndarray(encoder: Encoder, obj: Any) -> Plain:
    import numpy as np

    if isinstance(obj, np.ma.MaskedArray):
        raise Unstorable("a masked array cannot be stored")
    array = np.asarray(obj)
    text = exact.numpy_dtype_text(array.dtype)
    if text is None:
        raise Unstorable(f"a NumPy array of dtype {array.dtype} cannot be stored")
    spec = _typed("ndarray", dtype=text)
    if array.dtype.kind in "mM":
        array = array.view("i8")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    try:
        tensor = torch.from_numpy(array)
    except (TypeError, ValueError):  # a dtype, or strides, that torch does not have
        array = np.asarray(obj)
        spec["shape"] = list(array.shape)
        raw = bytearray(array.tobytes())
        tensor = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return encode_tensor(encoder, tensor)[0], spec


def _numpy_scalar(encoder: Encoder, obj: Any) -> Plain:
    text = exact.numpy_dtype_text(obj.dtype)
    counted = {"i8": obj.view("i8").item()} if obj.dtype.kind in "mM" else {}
    plain = str(obj) if counted else obj.item()
    if text is None or type(plain) not in (bool, int, float, complex, str, bytes):
        raise Unstorable(f"a NumPy scalar of dtype {obj.dtype} cannot be stored")
    plain, _ = encoder.value(plain)
    return plain, _typed("numpy_scalar", dtype=text, **counted)


# --- containers -------------------------------------------------------------------------------------------


def _dict(encoder: Encoder, obj: collections.abc.Mapping[Any, Any]) -> Plain:
    into: dict[Any, Any] = {}
    return into, encoder.mapping(obj.items(), into)


def _ordered_dict(encoder: Encoder, obj: collections.OrderedDict[Any, Any]) -> Plain:
    into: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    spec = encoder.mapping(obj.items(), into)
    metadata = _plain_metadata(getattr(obj, "_metadata", None))
    if metadata is not None:
        into._metadata = metadata  # type: ignore[attr-defined]
    return into, spec


def _plain_metadata(metadata: Any) -> Any:
    """What Module.state_dict() hangs on its result: for each module the versions that loading goes by."""
    if not isinstance(metadata, dict):
        return None
    plain: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()
    for name, versions in metadata.items():
        if not isinstance(name, str) or not isinstance(versions, dict):
            return None
        plain[name] = {
            key: value
            for key, value in versions.items()
            if {type(key), type(value)} <= {str, int, bool, float}
        }
    return plain


def _defaultdict(encoder: Encoder, obj: collections.defaultdict[Any, Any]) -> Plain:
    plain, spec = _dict(encoder, obj)
    name = exact.factory_name(obj.default_factory)
    if name is None:
        encoder.omit("the factory is not a built-in type; this comes back as a dict", "default_factory")
        return plain, spec
    return plain, _typed("defaultdict", spec, factory=name)


def _counter(encoder: Encoder, obj: collections.Counter[Any]) -> Plain:
    plain, spec = _dict(encoder, obj)
    return plain, _typed("counter", spec)


def _list(encoder: Encoder, obj: list[Any]) -> Plain:
    return encoder.sequence(obj)


def _tuple(encoder: Encoder, obj: tuple[Any, ...]) -> Plain:
    values, spec = encoder.sequence(obj)
    return tuple(values), spec


def _namedtuple(encoder: Encoder, obj: Any) -> Plain:
    plain, spec = _tuple(encoder, obj)
    return plain, _typed("namedtuple", spec, **{"class": exact.type_name(type(obj))})


def _bounds(word: str) -> Handler:
    def handler(encoder: Encoder, obj: Any) -> Plain:
        plain, spec = _tuple(encoder, (obj.start, obj.stop, obj.step))
        return plain, _typed(word, spec)

    return handler


def _deque(encoder: Encoder, obj: collections.deque[Any]) -> Plain:
    plain, spec = encoder.sequence(obj)
    return plain, _typed("deque", spec, maxlen=obj.maxlen)


def _set(encoder: Encoder, obj: Any) -> Plain:
    word = "frozenset" if isinstance(obj, frozenset) else "set"
    try:
        return {plain_key(member) for member in obj}, _typed(word) if word == "frozenset" else None
    except Unstorable:
        # Its members need exact types, or have to be left out: a list holds them, with a spec for each.
        plain, spec = encoder.sequence(obj, drop=True)
        return plain, _typed(word, spec)


def _vars(word: str) -> Handler:
    def handler(encoder: Encoder, obj: Any) -> Plain:
        plain, spec = _dict(encoder, vars(obj))
        return plain, _typed(word, spec)

    return handler


def _enum(encoder: Encoder, obj: enum.Enum) -> Plain:
    plain, spec = encoder.value(obj.value)
    return plain, _typed("enum", spec, **{"class": exact.type_name(type(obj))}) if spec is None else spec


def _dataclass(encoder: Encoder, obj: Any) -> Plain:
    names = [field.name for field in dataclasses.fields(obj) if hasattr(obj, field.name)]
    plain, spec = _dict(encoder, {name: getattr(obj, name) for name in names})
    return plain, _typed("dataclass", spec, **{"class": exact.type_name(type(obj))})


def _omegaconf(encoder: Encoder, obj: Any) -> Plain:
    plain, spec = encoder.value(sys.modules["omegaconf"].OmegaConf.to_container(obj, resolve=False))
    return plain, _typed("omegaconf", spec)


def _unstorable(encoder: Encoder, obj: Any) -> Plain:
    if isinstance(obj, type):
        raise Unstorable(f"a class ({exact.type_name(obj)}) cannot be stored")
    if isinstance(obj, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        raise Unstorable(f"a function ({getattr(obj, '__qualname__', obj)}) cannot be stored")
    raise Unstorable(f"a value of type {exact.type_name(type(obj))} cannot be stored")


AS_IT_IS = {type(None), bool, float, str, complex, torch.dtype, torch.device, torch.layout, torch.Size}

HANDLERS: dict[type, Handler] = {
    int: _int,
    bytes: _bytes,
    bytearray: _bytearray,
    dict: _dict,
    collections.OrderedDict: _ordered_dict,
    collections.defaultdict: _defaultdict,
    collections.Counter: _counter,
    collections.deque: _deque,
    list: _list,
    tuple: _tuple,
    set: _set,
    frozenset: _set,
    slice: _bounds("slice"),
    range: _bounds("range"),
    torch.Tensor: encode_tensor,
    torch.nn.Parameter: encode_tensor,
    torch.Generator: _generator,
    torch.memory_format: _torch_constant,
    torch.qscheme: _torch_constant,
    argparse.Namespace: _vars("namespace"),
    types.SimpleNamespace: _vars("simple_namespace"),
    uuid.UUID: _uuid,
    decimal.Decimal: _decimal,
    fractions.Fraction: _fraction,
    datetime.datetime: _datetime,
    datetime.date: _date,
    datetime.time: _time,
    datetime.timedelta: _timedelta,
    datetime.timezone: _timezone,
}

# By isinstance, in this order, for what is not exactly one of the types above.
_BY_BASE: list[tuple[Any, Handler]] = [
    (type, _unstorable),
    (torch.Tensor, encode_tensor),
    (enum.Enum, _enum),
    ((bool, int, float, complex, str), _number_or_text),
    (bytes, _bytes),
    (bytearray, _bytearray),
    (pathlib.PurePath, _path),
    (argparse.Namespace, HANDLERS[argparse.Namespace]),
    (collections.OrderedDict, _ordered_dict),
    (collections.defaultdict, _defaultdict),
    (collections.Counter, _counter),
    (collections.abc.Mapping, _dict),
    (list, _list),
    (tuple, _tuple),
    ((set, frozenset), _set),
    (collections.deque, _deque),
    (datetime.datetime, _datetime),
    (datetime.date, _date),
    (datetime.timedelta, _timedelta),
]

# These go into no container, so they need no guard against loops and depth.
LEAVES: set[Handler] = {
    encode_tensor, _int, _number_or_text, _bytes, _bytearray, _path, _datetime, _date, _time, _timedelta,
    _timezone, _uuid, _decimal, _fraction, _torch_constant, _generator, _numpy_scalar, _unstorable,
    _enum,
}  # fmt: skip


def handler_for(obj: Any) -> Handler:
    """The function for a value whose exact type is not in the table: by its base, or by its library."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(obj, numpy.ndarray):
        return _ndarray
    if numpy is not None and isinstance(obj, numpy.generic) and not isinstance(obj, (str, bytes)):
        return _numpy_scalar
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(obj, (omegaconf.DictConfig, omegaconf.ListConfig)):
        return _omegaconf
    if isinstance(obj, tuple) and hasattr(type(obj), "_fields"):
        return _namedtuple
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return _dataclass
    for base, handler in _BY_BASE:
        if isinstance(obj, base):
            return handler
    return _unstorable
