"""Files that are nearly right: real ones with something changed, by chance but always the same for a seed."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import json
import pathlib
import pickle
import pickletools
import random
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from holdfast.checkpoint import exact, foreign_types, pickling
from holdfast.checkpoint.engine import CheckpointEngine

from .assembler import CANARY, call, get, name, number, put, sizes, storage, tensor, text, tuple_of
from .hostile import Part, archive, build, legacy_file

NUMBERS = [
    0,
    1,
    2,
    7,
    127,
    255,
    256,
    65535,
    65536,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    1 << 70,
]
ODD: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), "", "x", "os.system", [], {}, [[]], {"a": {}}, [None] * 50,
    "NaN", "../../x", 10**30, -(10**30), {"type": "enum", "class": "os.system"}, {"items": {"0": {"type": "set"}}},
]  # fmt: skip
_NAMES = [
    *(f"{module}.{last}" for module, last in (*pickling.GLOBALS, *foreign_types.KNOWN)),
    "posix.system", "builtins.eval", "builtins.getattr", "canary_module.Thing", "omegaconf.dictconfig.DictConfig",
    "pytorch_lightning.utilities.parsing.AttributeDict", "torch.storage._load_from_bytes",
]  # fmt: skip


class Case(NamedTuple):
    """One file."""

    kind: str
    write: Callable[[Path], object]
    must_fail: bool = False
    """Whether a reader that opens it has passed over a byte that is not what was written."""


@functools.cache
def originals() -> dict[str, bytes]:
    """Real files, small ones, with all that a payload may hold."""
    weight = torch.arange(12.0).view(3, 4)
    plain: dict[Any, Any] = {
        "a": weight, "state_dict": collections.OrderedDict(w=weight, v=weight[1], b=torch.ones(3, dtype=torch.bfloat16)),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "values": [1, 2.5, None, True, "x", b"bytes", bytearray(b"q"), 1j, {1, 2}, (1, (2, 3)), 1 << 80],
        (1, ("b", 2)): "key", "sparse": torch.eye(2).to_sparse(), "dtype": torch.float16,
    }  # fmt: skip
    more: dict[Any, Any] = {
        "hyper_parameters": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")), "array": np.arange(3),
        "deque": collections.deque([1], 3), "default": collections.defaultdict(list, a=[1]), "scalar": np.float32(1),
        "when": datetime.datetime(2024, 1, 2), "frozen": frozenset({1}), "counter": collections.Counter("aab"),
    }  # fmt: skip
    found: dict[str, bytes] = {}
    buffer = io.BytesIO()
    torch.save(plain | more, buffer)
    found["torch"] = buffer.getvalue()
    buffer = io.BytesIO()
    # One storage, since their order in that format is the one of their addresses.
    torch.save({"a": weight, "v": weight[1], **more}, buffer, _use_new_zipfile_serialization=False)
    found["old"] = buffer.getvalue()
    keys = re.findall(rb"X[\x0c-\x12]\0\0\0(\d{12,18})", found["old"])
    for at, key in enumerate(dict.fromkeys(keys)):
        found["old"] = found["old"].replace(key, str(at).zfill(len(key)).encode())  # they are addresses
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a.ckpt")
        CheckpointEngine().save(
            plain | more, path, summary={"saved_at": 0, "step": 1, "epoch": 2, "metrics": {"loss": 0.5}}
        )
        found["ours"] = path.read_bytes()
    return found


def records(data: bytes) -> dict[str, bytes]:
    """The records of an archive, by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return {entry.split("/", 1)[1]: opened.read(entry) for entry in opened.namelist()}


def case(seed: int) -> Case:
    """The file of a seed."""
    rng = random.Random(seed)
    return rng.choice([_ours_raw, _torch_raw, _old_raw, _pickle_ours, _pickle_torch, _pickle_old, _json, _types, _zip,
                       _program, _program, _safetensors])(rng)  # fmt: skip


# -- bytes ---------------------------------------------------------------------------------------------------


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, put in, left out, repeated or replaced by a number that is on some border."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(made) + 1)
        length = min(rng.choice([1, 1, 2, 4, 8, 64, 1000]), len(made) - at)
        what = rng.randrange(6)
        if what == 0 and length:
            made[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            made[at : at + length] = rng.randbytes(length)
        elif what == 2:
            made[at:at] = rng.randbytes(length)
        elif what == 3:
            del made[at : at + length]
        elif what == 4:
            form, most = rng.choice([("<H", 0xFFFF), ("<I", 0xFFFFFFFF), ("<Q", (1 << 64) - 1)])
            piece = struct.pack(form, rng.choice(NUMBERS) & most)
            made[at : at + len(piece)] = piece
        else:
            other = rng.randrange(len(made) + 1)
            made[at : at + length] = made[other : other + length]
    return bytes(made if rng.randrange(20) else made[: rng.randrange(len(made) + 1)])


def _raw(kind: str, rng: random.Random) -> Case:
    original = originals()[kind]
    made = changed_bytes(original, rng)
    return Case(f"bytes of {kind}", lambda path: path.write_bytes(made), kind == "ours" and made != original)


def _ours_raw(rng: random.Random) -> Case:
    return _raw("ours", rng)


def _torch_raw(rng: random.Random) -> Case:
    return _raw("torch", rng)


def _old_raw(rng: random.Random) -> Case:
    return _raw("old", rng)


# -- pickles -------------------------------------------------------------------------------------------------


def _operations(pickled: bytes) -> list[bytes]:
    starts = [at for _, _, at in pickletools.genops(pickled)]
    return [pickled[at:end] for at, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]


def _value(rng: random.Random, depth: int = 0) -> bytes:
    """The opcodes of some value."""
    if depth > 3 or rng.random() < 0.4:
        return rng.choice([
            b"N", b"\x88", b"K\1", number(rng.choice(NUMBERS) & 0x7FFFFFFF), text(rng.choice(["a", "0", "items", "cpu"])),
            b"]", b"}", b")", b"\x8f", b"G\x7f\xf8\0\0\0\0\0\0", get(rng.randrange(40)), name(rng.choice(_NAMES)),
            b"B\3\0\0\0abc", storage(), tensor(), b"\x8a\x08" + struct.pack("<Q", rng.choice(NUMBERS) & ((1 << 64) - 1)),
        ])  # fmt: skip

    def some(most: int = 3) -> list[bytes]:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(most + 1))]

    return rng.choice([
        lambda: call(rng.choice(_NAMES), *some(7)), lambda: tuple_of(*some()),
        lambda: b"](" + b"".join(some()) + b"e", lambda: b"}(" + b"".join(_value(rng, 3) + one for one in some()) + b"u",
        lambda: name(rng.choice(_NAMES)) + tuple_of(*some()) + b"\x81" + _value(rng, depth + 1) + b"b",
        lambda: b"\x8f(" + b"".join(some()) + b"\x90", lambda: _value(rng, depth + 1) + put(rng.randrange(40)),
        lambda: _value(rng, depth + 1) + put(7) + get(7) + b"\x86", lambda: b"(" + b"".join(some()) + b"\x91",
        lambda: tensor(size=_value(rng, 2)), lambda: tensor(stride=_value(rng, 2), rest=_value(rng, 2)),
        lambda: tensor(size=sizes(rng.choice(NUMBERS) >> 10, 2), stride=sizes(rng.choice([0, 1, 4]), 0)),
        lambda: call("posix.system", text(CANARY)), lambda: _value(rng, depth + 1) + _value(rng, depth + 1) + b"b",
    ])()  # fmt: skip


def changed_pickle(pickled: bytes, rng: random.Random) -> bytes:
    """A pickle with some opcodes left out, repeated, moved, or others put in; mostly still one that runs."""
    made = _operations(pickled)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, other = rng.randrange(1, len(made)), rng.randrange(1, len(made))
        what = rng.randrange(7)
        if what == 0:
            del made[at]
        elif what == 1:
            made.insert(at, made[other])
        elif what == 2:
            made[at], made[other] = made[other], made[at]
        elif what == 3:
            made.insert(at, _value(rng))
        elif what == 4:
            values = [
                spot
                for spot, one in enumerate(made)
                if one[:1] in (b"K", b"M", b"X", b"N", b"\x89", b"h", b"q", b"c")
            ]
            made[rng.choice(values)] = _value(rng)
        elif what == 5:
            names = [spot for spot, one in enumerate(made) if one[:1] == b"c"]
            if names:
                made[rng.choice(names)] = name(rng.choice(_NAMES))
        else:
            made[at] = bytes([rng.randrange(256)]) + made[at][1:]
        if len(made) < 2:
            break
    return b"".join(made)


def _parts(kind: str) -> tuple[bytes, tuple[bytes, ...]]:
    found = records(originals()[kind])
    storages = [found[f"data/{n}"] for n in range(sum(one.startswith("data/") for one in found))]
    return found["data.pkl"], tuple(storages)


def _pickle_ours(rng: random.Random) -> Case:
    pickled, storages = _parts("ours")
    made = changed_pickle(pickled, rng)
    types = json.loads(records(originals()["ours"])["holdfast/records.json"])["types"]
    return Case("pickle in ours", lambda path: build(path, pickled=made, storages=storages, types=types))


def _pickle_torch(rng: random.Random) -> Case:
    pickled, storages = _parts("torch")
    made = changed_pickle(pickled, rng)
    parts = [Part("data.pkl", made), *(Part(f"data/{n}", one) for n, one in enumerate(storages))]
    return Case("pickle in torch", lambda path: archive(path, *parts))


def _pickle_old(rng: random.Random) -> Case:
    made = changed_pickle(pickle.dumps({"a": 1}, 2), rng)
    about = rng.choice([None, *ODD])
    rest = struct.pack("<q", rng.choice(NUMBERS) & ((1 << 62) - 1)) + b"\0" * 64
    return Case(
        "pickle in old",
        lambda path: legacy_file(path, made, rng.choice([[], ["0"], ["0", "0"]]), rest, about),
    )


def _program(rng: random.Random) -> Case:
    made = b"\x80" + bytes([rng.choice([2, 2, 4])]) + b"}" + text("a") + _value(rng) + b"s."
    if rng.random() < 0.5:
        types = {"items": {"0": _spec(rng)}}
        return Case(
            "program in ours", lambda path: build(path, pickled=made, storages=(b"\0" * 16,), types=types)
        )
    return Case(
        "program in torch", lambda path: archive(path, Part("data.pkl", made), Part("data/0", b"\0" * 16))
    )


# -- JSON ----------------------------------------------------------------------------------------------------


def _changed_json(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        made = dict(value)
        made[key] = _changed_json(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _changed_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def _json(rng: random.Random) -> Case:
    pickled, storages = _parts("ours")
    found = records(originals()["ours"])
    if rng.random() < 0.5:
        summary = _changed_json(json.loads(found["holdfast/summary.json"]), rng)
        data = json.dumps(summary).encode()
        if rng.random() < 0.5:
            data = changed_bytes(data, rng)
        return Case(
            "summary", lambda path: build(path, pickled=pickled, storages=storages, summary=data or b"{}")
        )

    def change(content: dict[str, Any]) -> None:
        made = _changed_json(content, rng)
        content.clear()
        content.update(made if isinstance(made, dict) else {"records": made})

    return Case("manifest", lambda path: build(path, pickled=pickled, storages=storages, change=change))


def _spec(rng: random.Random, depth: int = 0) -> Any:
    if rng.random() < 0.1:
        return rng.choice(ODD)
    spec: dict[str, Any] = {"type": rng.choice([*exact._RESTORERS, "ref", "os.system"])}
    for key in ("class", "factory", "dtype", "shape", "i8", "parts", "name", "maxlen", "fold"):
        if rng.random() < 0.3:
            spec[key] = rng.choice(
                [*ODD, "PurePosixPath", "list", "<f4", "|S5", ">i8", [1 << 40], [2, 2], 1 << 40]
            )
    if depth < 3 and rng.random() < 0.5:
        spec["items"] = {str(rng.randrange(-2, 6)): _spec(rng, depth + 1) for _ in range(3)}
    return spec


def _types(rng: random.Random) -> Case:
    pickled, storages = _parts("ours")
    types = {"items": {str(n): _spec(rng) for n in range(12)}}
    return Case("types", lambda path: build(path, pickled=pickled, storages=storages, types=types))


# -- archives ------------------------------------------------------------------------------------------------


def _zip(rng: random.Random) -> Case:
    pickled, storages = _parts("torch")
    parts = [Part("data.pkl", pickled), *(Part(f"data/{n}", one) for n, one in enumerate(storages))]
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(parts))
        part = parts[at]
        parts[at] = rng.choice([
            part._replace(method=rng.choice([1, 8, 12, 99])), part._replace(flags=rng.choice([1, 8, 0x800, 0xFFFF])),
            part._replace(size=rng.choice(NUMBERS) & 0xFFFFFFFF), part._replace(at=rng.choice(NUMBERS) & 0xFFFFFFFF),
            part._replace(header_name=rng.choice(["data.pkl", "", "../x"])), part._replace(name=rng.choice(["data/0", "\0"])),
            part._replace(header_size=rng.choice(NUMBERS) & 0xFFFFFFFF), part._replace(header_crc=5),
            part._replace(directory_crc=5), part._replace(data=part.data[:-1]), part._replace(data=part.data * 2),
        ])  # fmt: skip
    tail = rng.choice([b"", b"", b"x", b"PK\5\6" + b"\0" * 18])
    return Case("archive", lambda path: archive(path, *parts, tail=tail))


def _safetensors(rng: random.Random) -> Case:
    content = {"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    header = json.dumps(_changed_json(content, rng)).encode()
    if rng.random() < 0.3:
        header = changed_bytes(header, rng)
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) & ((1 << 64) - 1)
    return Case("safetensors", lambda path: path.write_bytes(struct.pack("<Q", length) + header + b"\0" * 16))
