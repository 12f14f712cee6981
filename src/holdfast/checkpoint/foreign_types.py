"""The values in foreign checkpoints that are neither plain nor tensors: rebuilt by hand, or kept inert."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import pathlib
from typing import Any

from holdfast.checkpoint import foreign_config
from holdfast.checkpoint.exact import NUMPY_DTYPE
from holdfast.checkpoint.pickle_scan import Call, PickleError, charge, printable

_MAX_DEPTH = 400
_MOST_CLASSES = 10_000
_MOST_IN_A_CALL = 100
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


class Opaque:
    """Stands for an object whose class is not on the list: it holds what the file said, and does nothing.

    Its class carries the name that the file gave. Calling it, as a pickle may, makes another inert object.

    Attributes:
        args: what the file would have called the class with.
        state: what the file would have set the object's state to.
        items: the (key, value) pairs or the values that the file would have put into it.
    """

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **named: Any) -> Opaque:
        # Not in __init__, which a pickle may leave out.
        made = super().__new__(cls)
        args = (*args, named) if named else args
        made.args, made.state, made.items = args, None, []
        return made

    @property
    def qualified_name(self) -> str:
        """``module.Name`` as the file has it."""
        return printable(f"{type(self).__module__}.{type(self).__qualname__}")

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    def add(self, value: Any) -> None:
        self.items.append(value)

    def __call__(self, *args: Any) -> Opaque:
        return Opaque(self, *args)

    def __repr__(self) -> str:
        return f"<Opaque {self.qualified_name}>"


def inert_class(module: str, name: str, known: dict[tuple[str, str], type[Opaque]]) -> type[Opaque]:
    """The class of inert objects under a name from a file, made where it is not among the known ones.

    Raises:
        PickleError: the file names more classes than a checkpoint could; each costs a kilobyte.
    """
    if (module, name) not in known:
        if len(known) >= _MOST_CLASSES:
            raise PickleError(f"it names more than {_MOST_CLASSES} classes")
        known[module, name] = opaque_class(module, name)
    return known[module, name]


def opaque_class(module: str, name: str) -> type[Opaque]:
    """A new class of inert objects under a name from a file; Lightning's AttributeDict is a dict."""
    if "\0" in name:
        raise PickleError("it names a class by what is not a name")
    base: type[Opaque] = Opaque
    if name == "AttributeDict" and module.split(".")[0] in _LIGHTNING:
        base = _Mapping
    return type(name.rsplit(".", 1)[-1], (base,), {"__module__": module, "__qualname__": name})


class _Mapping(Opaque):
    """A dict subclass that comes back as a plain dict."""


class _Namespace(Opaque):
    """argparse.Namespace, until all of the file is read."""


class _Array(Opaque):
    """A NumPy array, until all of the file is read."""


class _Dtype(Opaque):
    """A NumPy dtype as a pickle spells it: ('f8', ...) and then its byte order."""

    def text(self) -> str:
        code = self.args[0] if self.args else ""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        text = f"{order if order in ('<', '>') else '|'}{code}"
        if not isinstance(code, str) or not NUMPY_DTYPE.fullmatch(text):
            raise PickleError(f"{text!r} is not a dtype of plain numbers or text")
        return text


def _array(stub: _Array) -> Any:
    import numpy as np

    _, shape, dtype, fortran, data = stub.state
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or not isinstance(shape, tuple):
        return stub  # an array of objects
    try:
        known = np.dtype(dtype.text())
    except PickleError:
        return stub
    charge(len(data))
    return np.frombuffer(data, known).reshape(shape, order="F" if fortran else "C").copy(order="K")


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    import numpy as np

    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise PickleError("a NumPy scalar is not made of a dtype and bytes")
    known = np.dtype(dtype.text())
    if known.itemsize != len(data) or not data:
        raise PickleError(f"a NumPy scalar of dtype {known} has {len(data)} bytes")
    charge(len(data))
    return np.frombuffer(data, known)[0]


def _reconstructed(cls: Any, *rest: Any) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, Opaque)):
        raise PickleError("an object is put together from something that is not a class")
    return cls()  # what stood in for the class's base is of no use


def _built(kind: Any, *args: Any) -> Any:
    """What a call of a built-in type gives; checkpoints name these as factories and hardly ever call them."""
    if len(args) > 1:
        raise PickleError(f"a {kind.__name__} is made of more than one value")
    for arg in args:
        if type(arg) is kind:
            return arg
        plain = type(arg) in (int, float, str) and kind in (int, float, str, bool)
        if not plain and not (type(arg) in (list, tuple) and kind is list):
            raise PickleError(f"a {kind.__name__} is made of something that is not a plain value")
        if not isinstance(arg, (int, float)) and len(arg) > _MOST_IN_A_CALL:
            raise PickleError(f"a {kind.__name__} is made of {len(arg)} values")
    return kind(*args)


_BUILTINS: tuple[type, ...] = (list, dict, tuple, int, float, str, bool)
_FACTORIES = {kind.__name__: Call(functools.partial(_built, kind)) for kind in _BUILTINS}


def _defaultdict(factory: Any = None, *rest: Any) -> Any:
    for kind in _BUILTINS:
        if factory is _FACTORIES[kind.__name__]:
            return collections.defaultdict(kind)
    return collections.defaultdict(None)


def _deque(items: Any = (), maxlen: Any = None) -> Any:
    if type(items) not in (list, tuple) or not (maxlen is None or type(maxlen) is int):
        raise PickleError("a deque is made of something that is not a list")
    charge(8 * len(items))
    return collections.deque(items, maxlen)


def _path(*parts: Any) -> Any:
    text = [part for part in parts if isinstance(part, str)]
    charge(sum(map(len, text)))
    return pathlib.Path(*text)


def _slice(*args: Any) -> Any:
    if not {type(arg) for arg in args} <= {int, float, str, type(None)}:
        raise PickleError("a slice is made of something that is not a number")
    return slice(*args)


KNOWN: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _Namespace,
    ("collections", "defaultdict"): Call(_defaultdict),
    ("collections", "deque"): Call(_deque),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("copyreg", "_reconstructor"): Call(_reconstructed),
    ("copy_reg", "_reconstructor"): Call(_reconstructed),
    ("builtins", "slice"): Call(_slice),
    ("__builtin__", "slice"): Call(_slice),
}
KNOWN |= {("datetime", kind.__name__): Call(kind) for kind in (
    datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone,
)}  # fmt: skip
KNOWN |= {
    (module, name): Call(_path)
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    KNOWN[_module, "_reconstruct"] = Call(lambda *args: _Array())
    KNOWN[_module, "scalar"] = Call(_numpy_scalar)
for _name, _call in _FACTORIES.items():
    KNOWN["builtins", _name] = KNOWN["__builtin__", _name] = _call


def settle(value: Any) -> Any:
    """Put the finished values in the place of the stand-ins that were needed while reading."""
    return _settle(value, {}, 0)


def _settle(value: Any, done: dict[int, Any], depth: int) -> Any:
    if not isinstance(value, (dict, list, tuple, set, frozenset, collections.deque, Opaque)):
        return value
    if id(value) in done:
        return done[id(value)]
    if depth > _MAX_DEPTH:
        raise PickleError(f"it is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, tuple):
        # Its members come first; a tuple that holds itself does so through a list or a dict.
        made = [_settle(member, done, depth + 1) for member in value]
        changed = any(new is not old for new, old in zip(made, value, strict=True))
        done[id(value)] = tuple(made) if changed and type(value) is tuple else value
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, Opaque):
        done[id(value)] = result = _settled_stub(value, done, depth)
        return result
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _settle(value[key], done, depth + 1)
    elif isinstance(value, (list, collections.deque)):
        for index, member in enumerate(value):
            value[index] = _settle(member, done, depth + 1)
    return value


def _settled_stub(stub: Opaque, done: dict[int, Any], depth: int) -> Any:
    if isinstance(stub, _Array):
        return _array(stub) if isinstance(stub.state, tuple) and len(stub.state) == 5 else stub
    if isinstance(stub, _Namespace):
        space = done[id(stub)] = argparse.Namespace()
        state = _settle(stub.state, done, depth + 1)
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            space.__dict__.update(state)
        return space
    if isinstance(stub, _Mapping):
        plain: dict[Any, Any] = {}
        done[id(stub)] = plain
        pairs = [pair for arg in stub.args if isinstance(arg, dict) for pair in arg.items()]
        for key, member in [*pairs, *(item for item in stub.items if isinstance(item, tuple))]:
            plain[key] = _settle(member, done, depth + 1)
        return plain
    if stub.qualified_name in foreign_config.CONTAINERS:
        done[id(stub)] = made = foreign_config.settled(stub)
        return made
    stub.args = tuple(_settle(arg, done, depth + 1) for arg in stub.args)
    stub.state = _settle(stub.state, done, depth + 1)
    stub.items = [_settle(item, done, depth + 1) for item in stub.items]
    return stub
