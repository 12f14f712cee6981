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

from holdfast.checkpoint.pickle_scan import charge, check_keys

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
_FRACTION = re.compile(r"-?\d{1,5000}(/\d{1,5000})?", re.ASCII)
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

    That is so for a word that only a newer holdfast knows, and for a spec that does not fit the value: one
    value's type must never cost the rest of the file.
    """
    try:
        known = _RESTORERS.get(spec.get("type", ""))
        if known is None:
            return plain
        charge(8 * len(plain) if isinstance(plain, (str, bytearray, list, dict, tuple, set)) else 8)
        return known(plain, spec)
    except Exception:
        return plain


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
    return _PURE_PATHS.get(spec.get("class", ""), pathlib.Path)(_text(plain))


def _text(plain: Any) -> str:
    if not isinstance(plain, str):
        raise TypeError(f"a {type(plain).__name__} is not text")
    return plain


def _bytes(plain: Any, spec: Spec) -> Any:
    if not isinstance(plain, bytearray):
        raise TypeError("bytes() of a number would be that many zeros")
    return bytes(plain)


def _fraction(plain: Any, spec: Spec) -> Any:
    if not _FRACTION.fullmatch(plain):
        raise ValueError("with an exponent a few letters could take hours")
    return fractions.Fraction(plain)


def _datetime(plain: Any, spec: Spec) -> Any:
    return datetime.datetime.fromisoformat(plain).replace(fold=spec.get("fold", 0))


def _time(plain: Any, spec: Spec) -> Any:
    return datetime.time.fromisoformat(plain).replace(fold=spec.get("fold", 0))


def _user_type(plain: Any, spec: Spec) -> Any:
    cls: Any = _allowed.get(str(spec.get("class")))
    if cls is None:
        return plain
    if isinstance(cls, enum.EnumMeta):
        check_keys((plain,))
        return cls(plain)
    if dataclasses.is_dataclass(cls):
        # Without __init__, as copy and pickle do it: fields that are init=False come back too.
        new: Any = object.__new__
        made = new(cls)
        names = {field.name for field in dataclasses.fields(cls)}
        if not names.issuperset(plain):
            return plain  # of a class that was changed since, or made up: nothing is set by a name in a file
        for name in plain:  # in the order in which the saved object had them
            object.__setattr__(made, name, plain[name])
        return made
    return cls(*plain)


def _members(plain: Any) -> Any:
    check_keys(plain)
    return plain


def _timedelta(plain: Any, spec: Spec) -> Any:
    days, seconds, microseconds = spec["parts"]
    return datetime.timedelta(days=days, seconds=seconds, microseconds=microseconds)


def _timezone(plain: Any, spec: Spec) -> Any:
    offset = datetime.timedelta(seconds=plain)
    return datetime.timezone(offset, spec["name"]) if "name" in spec else datetime.timezone(offset)


def _defaultdict(plain: Any, spec: Spec) -> Any:
    return collections.defaultdict(_FACTORIES[spec["factory"]], plain)


def _ndarray(plain: Any, spec: Spec) -> Any:
    import numpy as np

    dtype = _numpy_dtype(spec)
    if plain.device.type == "meta":
        return plain  # under a key that the reader leaves out, or moved there by map_location
    dense = plain.numel() * plain.itemsize <= plain.untyped_storage().nbytes()
    if not dense and not plain.is_cpu:
        raise ValueError("its copy would be larger than what the file has of it")
    array = plain.cpu().numpy()
    if array.dtype == dtype:
        return array
    if "shape" not in spec and dtype.kind in "mM":
        return array.view(dtype)
    if not dense:
        raise ValueError("its copy would be larger than what the file has of it")
    charge(array.nbytes)
    if "shape" in spec:  # stored as raw bytes: torch has no such dtype
        return np.frombuffer(array.tobytes(), dtype=dtype).reshape(spec["shape"]).copy()
    if array.dtype != dtype.newbyteorder("="):
        raise ValueError(f"an array of {array.dtype} was never one of {dtype}")
    return array.astype(dtype)


def _numpy_scalar(plain: Any, spec: Spec) -> Any:
    import numpy as np

    dtype = _numpy_dtype(spec)
    if "i8" in spec:
        return np.array(spec["i8"], dtype="i8").view(dtype)[()]
    if type(plain) not in (bool, int, float, complex, str, bytes):
        raise ValueError(f"a {type(plain).__name__} is not a scalar")
    if dtype.itemsize > (len(plain) if dtype.kind in "SUV" else 32):
        raise ValueError(f"{dtype} is larger than the value in the file")
    return np.array(plain, dtype=dtype)[()]


def _numpy_dtype(spec: Spec) -> Any:
    import numpy as np

    if not NUMPY_DTYPE.fullmatch(spec["dtype"]):
        raise ValueError(f"{spec['dtype']!r} is not a dtype of plain numbers or text")
    return np.dtype(spec["dtype"])


def _torch_constant(plain: Any, spec: Spec) -> Any:
    import torch

    if plain not in TORCH_CONSTANTS:
        raise ValueError("it is not one of torch's constants")
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
    if module is None or not isinstance(plain, (dict, list)):  # text would be read as YAML
        return plain
    _charge_tree(plain)
    return module.OmegaConf.create(plain)


def _charge_tree(plain: Any) -> None:
    """Account for a container whose copy has each part as often as it is named."""
    pending = [plain]
    while pending:
        at = pending.pop()
        if isinstance(at, (dict, list, tuple)):
            charge(16 * len(at))
            pending += at.values() if isinstance(at, dict) else at


_RESTORERS: dict[str, Callable[[Any, Spec], Any]] = {
    "namespace": _namespace,
    "simple_namespace": _simple_namespace,
    "path": _path,
    "enum": _user_type,
    "dataclass": _user_type,
    "namedtuple": _user_type,
    "bytes": _bytes,
    "int": lambda plain, spec: int(plain, 16),
    "set": lambda plain, spec: set(_members(plain)),
    "frozenset": lambda plain, spec: frozenset(_members(plain)),
    "range": lambda plain, spec: range(*plain),
    "slice": lambda plain, spec: slice(*plain),
    "deque": lambda plain, spec: collections.deque(plain, spec["maxlen"]),
    "counter": lambda plain, spec: collections.Counter(dict(plain)),
    "defaultdict": _defaultdict,
    "datetime": _datetime,
    "date": lambda plain, spec: datetime.date.fromisoformat(plain),
    "time": _time,
    "timedelta": _timedelta,
    "timezone": _timezone,
    "uuid": lambda plain, spec: uuid.UUID(plain),
    "decimal": lambda plain, spec: decimal.Decimal(plain),
    "fraction": _fraction,
    "ndarray": _ndarray,
    "numpy_scalar": _numpy_scalar,
    "torch": _torch_constant,
    "omegaconf": _omegaconf,
}
