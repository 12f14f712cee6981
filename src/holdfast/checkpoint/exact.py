"""The exact types that a checkpoint gives back, by a table: a type name in a file is never imported.

A value whose type torch.load would not accept stands in the file as its nearest plain value, and a small
*spec* beside it says what it was. `restore` looks the spec's word up in the tables below and nowhere else.
A user's own enums, dataclasses and namedtuples come back as their plain values (the enum's value, a dict,
a tuple) unless their classes were named with `allow_types` by the program that reads.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any

Spec = dict[str, Any]

_allowed: dict[str, type] = {}

_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "list": list,
    "dict": dict,
    "set": set,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tuple": tuple,
    "OrderedDict": collections.OrderedDict,
}
_PURE_PATHS: dict[str, Callable[[str], Any]] = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUVmM]\d+(\[\d*\w+\])?")


def type_name(cls: type) -> str:
    """``module.QualName``, the name under which a class is written and allowed."""
    return f"{cls.__module__}.{cls.__qualname__}"


def allow_types(*classes: type) -> None:
    """Let these enum, dataclass and namedtuple classes come back as themselves when a file names them.

    The class's constructor runs on values from the file, so name only classes that you wrote.

    Raises:
        TypeError: if one of them is not an enum, a dataclass or a namedtuple.
    """
    for cls in classes:
        named = isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")
        if not (isinstance(cls, enum.EnumMeta) or dataclasses.is_dataclass(cls) or named):
            raise TypeError(f"allow_types takes enums, dataclasses and namedtuples, not {cls!r}")
        _allowed[type_name(cls)] = cls


def factory_name(factory: object) -> str | None:
    """The word for a defaultdict's factory, or None if it is not one that can be given back."""
    for name, known in _FACTORIES.items():
        if factory is known:
            return name
    return None


def numpy_dtype_text(dtype: Any) -> str | None:
    """The text that gives this NumPy dtype back, or None for objects, records and the like."""
    text = str(dtype.str)
    if dtype.hasobject or dtype.names or dtype.subdtype or not NUMPY_DTYPE.fullmatch(text):
        return None
    return text


def restore(plain: Any, spec: Spec) -> Any:
    """Give back the exact value that ``plain`` stands for; ``plain`` itself where that cannot be done.

    Raises:
        ValueError, TypeError, KeyError: if the spec does not fit the value, which only a damaged or a
            hostile file brings about.
    """
    word = spec.get("type")
    if word is None:
        return plain
    known = _RESTORERS.get(word)
    # A newer holdfast may write words that this one does not know: the plain value is the honest answer.
    return plain if known is None else known(plain, spec)


def _namespace(plain: Any, spec: Spec) -> Any:
    made = argparse.Namespace()
    made.__dict__.update(_str_keys(plain))
    return made


def _simple_namespace(plain: Any, spec: Spec) -> Any:
    return types.SimpleNamespace(**_str_keys(plain))


def _str_keys(plain: Any) -> dict[str, Any]:
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ValueError("a namespace needs a dict with text keys")
    return plain


def _path(plain: Any, spec: Spec) -> Any:
    return _PURE_PATHS.get(spec.get("class", ""), pathlib.Path)(str(plain))


def _user_type(plain: Any, spec: Spec) -> Any:
    cls: Any = _allowed.get(str(spec.get("class")))
    if cls is None:
        return plain
    if isinstance(cls, enum.EnumMeta):
        return cls(plain)
    if dataclasses.is_dataclass(cls):
        # Without __init__, as copy and pickle do it: fields that are init=False come back too.
        new: Any = object.__new__
        made = new(cls)
        for key, value in _str_keys(plain).items():
            object.__setattr__(made, key, value)
        return made
    return cls(*plain)


def _timedelta(plain: Any, spec: Spec) -> Any:
    days, seconds, microseconds = spec["parts"]
    return datetime.timedelta(days=days, seconds=seconds, microseconds=microseconds)


def _timezone(plain: Any, spec: Spec) -> Any:
    return datetime.timezone(datetime.timedelta(seconds=plain))


def _defaultdict(plain: Any, spec: Spec) -> Any:
    return collections.defaultdict(_FACTORIES[spec["factory"]], plain)


def _ndarray(plain: Any, spec: Spec) -> Any:
    import numpy as np

    text = spec["dtype"]
    if not NUMPY_DTYPE.fullmatch(text):
        raise ValueError(f"{text!r} is not a dtype of plain numbers or text")
    if plain.device.type == "meta":
        return plain  # it lies under a key that the reader leaves out
    dtype = np.dtype(text)
    array = plain.numpy()
    if "shape" in spec:  # stored as raw bytes: torch has no such dtype
        return np.frombuffer(array.tobytes(), dtype=dtype).reshape(spec["shape"]).copy()
    if dtype.kind in "mM":
        return array.view(dtype)
    return array if array.dtype == dtype else array.astype(dtype)


def _numpy_scalar(plain: Any, spec: Spec) -> Any:
    import numpy as np

    text = spec["dtype"]
    if not NUMPY_DTYPE.fullmatch(text):
        raise ValueError(f"{text!r} is not a dtype of plain numbers or text")
    return np.array(plain, dtype=np.dtype(text))[()]


def _torch_constant(plain: Any, spec: Spec) -> Any:
    import torch

    if plain not in TORCH_CONSTANTS:
        raise ValueError(f"{plain!r} is not one of torch's constants")
    return getattr(torch, plain)


TORCH_CONSTANTS = (
    "contiguous_format",
    "preserve_format",
    "channels_last",
    "channels_last_3d",
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)


def _omegaconf(plain: Any, spec: Spec) -> Any:
    # Only where the program itself has imported it: reading a file imports nothing on the file's word.
    module = sys.modules.get("omegaconf")
    return plain if module is None else module.OmegaConf.create(plain)


_RESTORERS: dict[str, Callable[[Any, Spec], Any]] = {
    "namespace": _namespace,
    "simple_namespace": _simple_namespace,
    "path": _path,
    "enum": _user_type,
    "dataclass": _user_type,
    "namedtuple": _user_type,
    "bytes": lambda plain, spec: bytes(plain),
    "int": lambda plain, spec: int(plain, 16),
    "set": lambda plain, spec: set(plain),
    "frozenset": lambda plain, spec: frozenset(plain),
    "range": lambda plain, spec: range(*plain),
    "slice": lambda plain, spec: slice(*plain),
    "deque": lambda plain, spec: collections.deque(plain, spec["maxlen"]),
    "counter": lambda plain, spec: collections.Counter(dict(plain)),
    "defaultdict": _defaultdict,
    "datetime": lambda plain, spec: datetime.datetime.fromisoformat(plain),
    "date": lambda plain, spec: datetime.date.fromisoformat(plain),
    "time": lambda plain, spec: datetime.time.fromisoformat(plain),
    "timedelta": _timedelta,
    "timezone": _timezone,
    "uuid": lambda plain, spec: uuid.UUID(plain),
    "decimal": lambda plain, spec: decimal.Decimal(plain),
    "fraction": lambda plain, spec: fractions.Fraction(plain),
    "ndarray": _ndarray,
    "numpy_scalar": _numpy_scalar,
    "torch": _torch_constant,
    "omegaconf": _omegaconf,
}
