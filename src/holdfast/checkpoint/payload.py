"""What may be in a payload: plain values and tensors, their exact types beside them, and what had to stay out.

`encode` turns any nested value into a tree that ``torch.load(weights_only=True)`` accepts and a spec of exact
types (see `exact`); `decode` puts the two together again. An unstorable value never stops the rest: it is left
out and named.
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
from typing import Any

import torch

from holdfast.checkpoint import exact
from holdfast.checkpoint.exact import Spec
from holdfast.checkpoint.tensors import Span

MAX_DEPTH = 100

Plain = tuple[Any, "Spec | None"]


class _Unstorable(Exception):
    """The reason why one value is left out; caught by the container that holds it."""


@dataclasses.dataclass
class Encoded:
    """A payload in the form in which it is written.

    Attributes:
        tree: plain values and plain tensors only; containers are new, tensors share memory with the payload.
        types: spec of the exact types, or None if all is plain.
        omissions: (path, reason) of everything that is not in the tree.
        tensors: (path, tensor) of every tensor in the tree; a tensor under two top-level keys is in both.
    """

    tree: Any
    types: Spec | None
    omissions: list[tuple[str, str]]
    tensors: list[tuple[str, torch.Tensor]]


def encode(obj: Any) -> Encoded:
    """Turn any value into what a checkpoint can hold; never raises for a value that it cannot hold.

    A value that cannot be stored is left out (its key is dropped; in a sequence None stands in its place) and
    named with the reason. Two references to one container or tensor stay one. Parameters and plain tensor
    subclasses become plain tensors without a gradient, which share memory with the originals.
    """
    encoder = _Encoder()
    try:
        tree, spec = encoder.value(obj)
    except _Unstorable as reason:
        encoder.omissions.append(("", str(reason)))
        tree, spec = None, None
    return Encoded(tree, spec, encoder.omissions, encoder.tensors)


def decode(tree: Any, types: Spec | None) -> Any:
    """Give back the exact value from a tree (which is used up) and its spec.

    Raises:
        ValueError, TypeError, KeyError, IndexError: if the spec does not fit the tree.
    """
    return tree if types is None else _decode(tree, types, {}, 0)


def _decode(plain: Any, spec: Spec, done: dict[int, tuple[Any, Any]], depth: int) -> Any:
    if spec.get("type") == "ref":
        return done[id(plain)][1]
    if depth > MAX_DEPTH + 1:
        raise ValueError("the types are nested too deeply")
    result = plain
    items = spec.get("items")
    if items:
        children = {int(at): child for at, child in items.items()}
        if isinstance(plain, dict):
            keys = list(plain)
            for at, child in children.items():
                plain[keys[at]] = _decode(plain[keys[at]], child, done, depth + 1)
        elif isinstance(plain, (list, tuple)):
            values = list(plain)
            for at, child in children.items():
                values[at] = _decode(values[at], child, done, depth + 1)
            if isinstance(plain, list):
                plain[:] = values
            else:
                result = tuple(values)
        else:
            raise TypeError(f"a {type(plain).__name__} has no items")
    result = exact.restore(result, spec)
    done[id(plain)] = (plain, result)  # holding `plain` keeps its id from being used again
    return result


class _Encoder:
    def __init__(self) -> None:
        self.omissions: list[tuple[str, str]] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.path: list[str] = []
        self.active: set[int] = set()
        # id -> (plain, spec, original kept alive, path, range in self.tensors)
        self.memo: dict[int, tuple[Any, Spec | None, Any, str, int, int]] = {}
        self.plain_tensors: dict[int, tuple[torch.Tensor, Any]] = {}
        self.seen_under: set[tuple[int, str]] = set()

    def value(self, obj: Any) -> Plain:
        kind = type(obj)
        if kind in _AS_IT_IS:
            return obj, None
        if kind is torch.Tensor:
            return _tensor(self, obj)
        handler = _HANDLERS.get(kind)
        if handler is None:
            handler = _handler_for(obj)
        if handler in _LEAVES:
            return handler(self, obj)
        return self.container(obj, handler)

    def container(self, obj: Any, handler: Callable[[_Encoder, Any], Plain]) -> Plain:
        key = id(obj)
        known = self.memo.get(key)
        if known is not None:
            return self.again(known)
        if key in self.active:
            raise _Unstorable("it contains itself")
        if len(self.path) >= MAX_DEPTH:
            raise _Unstorable(f"it is nested more than {MAX_DEPTH} levels deep")
        self.active.add(key)
        first = len(self.tensors)
        try:
            plain, spec = handler(self, obj)
        finally:
            self.active.discard(key)
        self.memo[key] = (plain, spec, obj, "/".join(self.path), first, len(self.tensors))
        self.seen_under.add((key, self.path[0] if self.path else ""))
        return plain, spec

    def again(self, known: tuple[Any, Spec | None, Any, str, int, int]) -> Plain:
        plain, spec, original, path, first, last = known
        top = self.path[0] if self.path else ""
        if (id(original), top) not in self.seen_under:
            # Its tensors belong to this top-level key too: a reader that skips the other one needs them.
            self.seen_under.add((id(original), top))
            here = "/".join(self.path)
            self.tensors += [(here + name[len(path) :], tensor) for name, tensor in self.tensors[first:last]]
        if spec is None or not isinstance(plain, (list, dict, set, tuple, torch.Tensor)) or plain == ():
            return plain, spec
        return plain, {"type": "ref"}

    def omit(self, reason: object, *more: str) -> None:
        self.omissions.append(("/".join([*self.path, *more]), str(reason)))

    def mapping(self, pairs: Iterable[tuple[Any, Any]], into: dict[Any, Any]) -> Spec | None:
        items: dict[str, Spec] = {}
        path = self.path
        for key, value in pairs:
            kind = type(key)
            if kind is not str and kind is not int:
                try:
                    key = _plain_key(key)
                except _Unstorable as reason:
                    self.omit(reason, str(type(key).__name__))
                    continue
            path.append(_component(key if kind is str else str(key)))
            try:
                plain, spec = self.value(value)
            except _Unstorable as reason:
                self.omit(reason)
            else:
                if spec is not None:
                    items[str(len(into))] = spec
                into[key] = plain
            path.pop()
        return {"items": items} if items else None

    def sequence(self, values: Iterable[Any]) -> tuple[list[Any], Spec | None]:
        into: list[Any] = []
        items: dict[str, Spec] = {}
        path = self.path
        for value in values:
            path.append(str(len(into)))
            try:
                plain, spec = self.value(value)
            except _Unstorable as reason:
                self.omit(reason)
                plain, spec = None, None
            if spec is not None:
                items[str(len(into))] = spec
            into.append(plain)
            path.pop()
        return into, {"items": items} if items else None


def _component(key: str) -> str:
    """One part of a slashed path; a slash within it is escaped, as JSON pointers do it."""
    return key.replace("~", "~0").replace("/", "~1") if "/" in key or "~" in key else key


def _plain_key(key: Any) -> Any:
    """The key as torch.load accepts it, equal to the original and with the same hash."""
    if key is None or type(key) in (bool, float):
        return key
    if isinstance(key, (str, int, float)):
        return _plain_number_or_text(key)
    if isinstance(key, tuple):
        return tuple(_plain_key(part) for part in key)
    item = getattr(key, "item", None)
    if type(key).__module__ == "numpy" and item is not None and isinstance(item(), (bool, int, float)):
        return item()
    raise _Unstorable(f"a key of type {exact.type_name(type(key))} cannot be stored")


def _plain_number_or_text(obj: Any) -> Any:
    for base in (bool, int, float, complex, str):
        if isinstance(obj, base):
            # The base's own method, since a subclass may say something else in __str__ or __int__.
            return str.__str__(obj) if base is str else base.__pos__(obj)  # type: ignore[attr-defined]
    raise AssertionError(obj)


def _typed(word: str, spec: Spec | None = None, **more: Any) -> Spec:
    return {"type": word, **more, **(spec or {})}


# --- leaves -----------------------------------------------------------------------------------------------


def _int(encoder: _Encoder, obj: int) -> Plain:
    if obj.bit_length() < 2000:  # torch's reader takes integers of up to 255 bytes
        return obj, None
    return hex(obj), _typed("int")


def _number_or_text(encoder: _Encoder, obj: Any) -> Plain:
    plain = _plain_number_or_text(obj)
    return _int(encoder, plain) if type(plain) is int else (plain, None)


def _bytes(encoder: _Encoder, obj: Any) -> Plain:
    # Empty bytes pickle as a call that torch.load refuses; an empty bytearray does not.
    return (bytes(obj), None) if len(obj) else (bytearray(), _typed("bytes"))


def _bytearray(encoder: _Encoder, obj: Any) -> Plain:
    return bytearray(obj), None


def _path(encoder: _Encoder, obj: pathlib.PurePath) -> Plain:
    name = type(obj).__name__
    return str(obj), _typed("path", **({} if isinstance(obj, pathlib.Path) else {"class": name}))


def _datetime(encoder: _Encoder, obj: datetime.datetime) -> Plain:
    return obj.isoformat(), _typed("datetime")


def _date(encoder: _Encoder, obj: datetime.date) -> Plain:
    return obj.isoformat(), _typed("date")


def _time(encoder: _Encoder, obj: datetime.time) -> Plain:
    return obj.isoformat(), _typed("time")


def _timedelta(encoder: _Encoder, obj: datetime.timedelta) -> Plain:
    return obj.total_seconds(), _typed("timedelta", parts=[obj.days, obj.seconds, obj.microseconds])


def _timezone(encoder: _Encoder, obj: datetime.timezone) -> Plain:
    return obj.utcoffset(None).total_seconds(), _typed("timezone")


def _uuid(encoder: _Encoder, obj: uuid.UUID) -> Plain:
    return str(obj), _typed("uuid")


def _decimal(encoder: _Encoder, obj: decimal.Decimal) -> Plain:
    return str(obj), _typed("decimal")


def _fraction(encoder: _Encoder, obj: fractions.Fraction) -> Plain:
    return str(obj), _typed("fraction")


def _range(encoder: _Encoder, obj: range) -> Plain:
    return (obj.start, obj.stop, obj.step), _typed("range")


def _torch_constant(encoder: _Encoder, obj: Any) -> Plain:
    name = str(obj).removeprefix("torch.")
    if name not in exact.TORCH_CONSTANTS:
        raise _Unstorable(f"{obj} cannot be stored")
    return name, _typed("torch")


def _tensor(encoder: _Encoder, obj: torch.Tensor) -> Plain:
    if type(obj) is torch.Tensor and not obj.requires_grad and not obj.is_conj() and not obj.is_neg():
        plain = obj
    else:
        known = encoder.plain_tensors.get(id(obj))
        plain = _plain_tensor(obj) if known is None else known[0]
        encoder.plain_tensors[id(obj)] = (plain, obj)
    _check_memory(plain)
    encoder.tensors.append(("/".join(encoder.path), plain))
    return plain, None


def _check_memory(tensor: torch.Tensor) -> None:
    if tensor.is_nested:
        raise _Unstorable("a nested tensor cannot be stored")
    if tensor.layout not in _LAYOUTS:
        raise _Unstorable(f"a tensor of layout {tensor.layout} cannot be stored")
    if tensor.is_quantized and tensor.dtype in (torch.quint4x2, torch.quint2x4):
        raise _Unstorable(f"a tensor of dtype {tensor.dtype} cannot be stored")
    if tensor.layout is torch.strided and not tensor.is_meta:
        try:
            Span("", tensor)
        except ValueError as error:
            raise _Unstorable(str(error)) from None


_LAYOUTS = {
    torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
}  # fmt: skip


def _plain_tensor(obj: torch.Tensor) -> torch.Tensor:
    kind = type(obj)
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise _Unstorable(f"a tensor of type {exact.type_name(kind)} has no memory of its own")
        if isinstance(obj, torch.nn.parameter.UninitializedTensorMixin):
            raise _Unstorable("it has not been initialised yet")
    with torch._C.DisableTorchFunctionSubclass():
        plain = obj.detach()
        if type(plain) is not torch.Tensor:
            plain = plain.as_subclass(torch.Tensor)
        return plain.resolve_conj().resolve_neg()


def _generator(encoder: _Encoder, obj: torch.Generator) -> Plain:
    raise _Unstorable("a generator cannot be stored; store its get_state()")


# --- NumPy ------------------------------------------------------------------------------------------------


def _ndarray(encoder: _Encoder, obj: Any) -> Plain:
    import numpy as np

    if isinstance(obj, np.ma.MaskedArray):
        raise _Unstorable("a masked array cannot be stored")
    array = np.asarray(obj)
    text = exact.numpy_dtype_text(array.dtype)
    if text is None:
        raise _Unstorable(f"a NumPy array of dtype {array.dtype} cannot be stored")
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
        tensor = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else None
        if tensor is None:
            tensor = torch.empty(0, dtype=torch.uint8)
    return _tensor(encoder, tensor)[0], spec


def _numpy_scalar(encoder: _Encoder, obj: Any) -> Plain:
    text = exact.numpy_dtype_text(obj.dtype)
    plain = str(obj) if obj.dtype.kind in "mM" else obj.item()
    if text is None or type(plain) not in (bool, int, float, complex, str, bytes):
        raise _Unstorable(f"a NumPy scalar of dtype {obj.dtype} cannot be stored")
    plain, _ = encoder.value(plain)
    return plain, _typed("numpy_scalar", dtype=text)


# --- containers -------------------------------------------------------------------------------------------


def _dict(encoder: _Encoder, obj: collections.abc.Mapping[Any, Any]) -> Plain:
    into: dict[Any, Any] = {}
    return into, encoder.mapping(obj.items(), into)


def _ordered_dict(encoder: _Encoder, obj: collections.OrderedDict[Any, Any]) -> Plain:
    into: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    spec = encoder.mapping(obj.items(), into)
    metadata = getattr(obj, "_metadata", None)
    if isinstance(metadata, dict):  # what Module.state_dict() hangs on it: versions that loading goes by
        known = _Encoder()
        try:
            plain, metadata_spec = known.value(metadata)
        except _Unstorable:
            return into, spec
        if metadata_spec is None and not known.tensors and not known.omissions:
            into._metadata = plain  # type: ignore[attr-defined]
    return into, spec


def _defaultdict(encoder: _Encoder, obj: collections.defaultdict[Any, Any]) -> Plain:
    plain, spec = _dict(encoder, obj)
    name = exact.factory_name(obj.default_factory)
    if name is None:
        encoder.omit("the factory is not a built-in type; this comes back as a dict", "default_factory")
        return plain, spec
    return plain, _typed("defaultdict", spec, factory=name)


def _counter(encoder: _Encoder, obj: collections.Counter[Any]) -> Plain:
    plain, spec = _dict(encoder, obj)
    return plain, _typed("counter", spec)


def _list(encoder: _Encoder, obj: list[Any]) -> Plain:
    return encoder.sequence(obj)


def _tuple(encoder: _Encoder, obj: tuple[Any, ...]) -> Plain:
    values, spec = encoder.sequence(obj)
    return tuple(values), spec


def _namedtuple(encoder: _Encoder, obj: Any) -> Plain:
    plain, spec = _tuple(encoder, obj)
    return plain, _typed("namedtuple", spec, **{"class": exact.type_name(type(obj))})


def _slice(encoder: _Encoder, obj: slice) -> Plain:
    plain, spec = _tuple(encoder, (obj.start, obj.stop, obj.step))
    return plain, _typed("slice", spec)


def _deque(encoder: _Encoder, obj: collections.deque[Any]) -> Plain:
    plain, spec = encoder.sequence(obj)
    return plain, _typed("deque", spec, maxlen=obj.maxlen)


def _set(encoder: _Encoder, obj: Any) -> Plain:
    word = "frozenset" if isinstance(obj, frozenset) else "set"
    try:
        plain_set = {_plain_key(member) for member in obj}
    except _Unstorable:
        # Its members need exact types (or have to be left out): a list holds them, with a spec for each.
        into: list[Any] = []
        items: dict[str, Spec] = {}
        for member in obj:
            try:
                plain, spec = encoder.value(member)
            except _Unstorable as reason:
                encoder.omit(reason, type(member).__name__)
                continue
            if spec is not None:
                items[str(len(into))] = spec
            into.append(plain)
        return into, _typed(word, {"items": items})
    return plain_set, _typed(word) if word == "frozenset" else None


def _vars(word: str) -> Callable[[_Encoder, Any], Plain]:
    def handler(encoder: _Encoder, obj: Any) -> Plain:
        plain, spec = _dict(encoder, vars(obj))
        return plain, _typed(word, spec)

    return handler


def _enum(encoder: _Encoder, obj: enum.Enum) -> Plain:
    plain, spec = encoder.value(obj.value)
    return plain, _typed("enum", spec, **{"class": exact.type_name(type(obj))}) if spec is None else spec


def _dataclass(encoder: _Encoder, obj: Any) -> Plain:
    names = [field.name for field in dataclasses.fields(obj) if hasattr(obj, field.name)]
    plain, spec = _dict(encoder, {name: getattr(obj, name) for name in names})
    return plain, _typed("dataclass", spec, **{"class": exact.type_name(type(obj))})


def _omegaconf(encoder: _Encoder, obj: Any) -> Plain:
    plain, spec = encoder.value(sys.modules["omegaconf"].OmegaConf.to_container(obj, resolve=False))
    return plain, _typed("omegaconf", spec)


def _unstorable(encoder: _Encoder, obj: Any) -> Plain:
    if isinstance(obj, type):
        raise _Unstorable(f"a class ({exact.type_name(obj)}) cannot be stored")
    if isinstance(obj, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        raise _Unstorable(f"a function ({getattr(obj, '__qualname__', obj)}) cannot be stored")
    raise _Unstorable(f"a value of type {exact.type_name(type(obj))} cannot be stored")


_AS_IT_IS = {type(None), bool, float, str, complex, torch.dtype, torch.device, torch.layout, torch.Size}

_HANDLERS: dict[type, Callable[[_Encoder, Any], Plain]] = {
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
    slice: _slice,
    range: _range,
    torch.Tensor: _tensor,
    torch.nn.Parameter: _tensor,
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
_BY_BASE: list[tuple[Any, Callable[[_Encoder, Any], Plain]]] = [
    (type, _unstorable),
    (torch.Tensor, _tensor),
    (enum.Enum, _enum),
    ((bool, int, float, complex, str), _number_or_text),
    (bytes, _bytes),
    (bytearray, _bytearray),
    (pathlib.PurePath, _path),
    (argparse.Namespace, _HANDLERS[argparse.Namespace]),
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

_LEAVES: set[Callable[[_Encoder, Any], Plain]] = {
    _tensor, _int, _number_or_text, _bytes, _bytearray, _path, _datetime, _date, _time, _timedelta, _timezone, _uuid,
    _decimal, _fraction, _range, _torch_constant, _generator, _numpy_scalar, _unstorable, _enum,
}  # fmt: skip


def _handler_for(obj: Any) -> Callable[[_Encoder, Any], Plain]:
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
