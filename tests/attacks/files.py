"""Hostile files that need no hostile pickle: their zip structures, their JSON, their names, what older formats have.

Each says how `load` ends: the class of the error and its whole message, or that the file opens.
"""

from __future__ import annotations

import functools
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.checkpoint import container

from .assembler import CANARY, call, tensor, text, under
from .hostile import Part, archive, build, legacy_file
from .programs import LISTS, TUPLES


class File(NamedTuple):
    """One file: what it tries, how to write it, and how `load` ends."""

    what: str
    write: Callable[[Path], object]
    error: str = ""
    message: str = ""


def _corrupt(what: str, write: Callable[[Path], object], message: str) -> File:
    return File(what, write, "CheckpointCorrupt", f"a.ckpt is corrupt: {message}.")


def _not_whole(what: str, write: Callable[[Path], object], message: str) -> File:
    return File(what, write, "CheckpointIncomplete", f"a.ckpt is not a whole checkpoint: {message}.")


DATA = pickle.dumps({"a": 1}, 2)
ONE = Part("data.pkl", DATA)
DIRECTORY = "the zip header of {} does not agree with the zip directory"
UNREADABLE = (
    "a.ckpt is not a whole checkpoint: it begins as a zip archive, but the directory at its end cannot be read "
    "({}). It may have been cut short."
)

# -- zip structures of other programs ------------------------------------------------------------------------

ZIPS = [
    _corrupt(
        "two names over the same bytes",
        lambda path: archive(path, ONE, Part("data/0", DATA, at=0)),
        "data.pkl overlaps what comes after it",
    ),
    _corrupt(
        "a record that spans the ones after it",
        lambda path: archive(path, Part("data/0", b"x" * 8, size=70), ONE, Part("data/1", b"x" * 8)),
        "data/0 overlaps what comes after it",
    ),
    _corrupt(
        "a header within another record's data",
        lambda path: archive(
            path, Part("data/0", struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, *[0] * 9) + b"x" * 40), ONE,
            Part("data/1", b"", at=45),
        ),
        "data/0 overlaps what comes after it",
    ),
    _corrupt(
        "a record that reaches into the directory",
        lambda path: archive(path, Part("data.pkl", DATA, size=len(DATA) + 30)),
        "data.pkl overlaps what comes after it",
    ),
    _corrupt(
        "a record that reaches into the directory by its header's lengths",
        lambda path: path.write_bytes(
            archive(path, ONE).read_bytes().replace(b"\x10\0\0\0archive", b"\x10\0\4\0archive", 1)
        ),
        "data.pkl overlaps what comes after it",
    ),
    _corrupt("another name in the header", lambda path: archive(path, ONE._replace(header_name="data/pkl")),
             DIRECTORY.format("data.pkl")),
    _corrupt("another length in the header", lambda path: archive(path, ONE._replace(header_size=5)),
             DIRECTORY.format("data.pkl")),
    _corrupt("another checksum in the header", lambda path: archive(path, ONE._replace(header_crc=5)),
             DIRECTORY.format("data.pkl")),
    _corrupt("another checksum", lambda path: archive(path, ONE._replace(header_crc=5, directory_crc=5)),
             f"data.pkl has checksum {zlib.crc32(DATA):08x}, the zip directory says 00000005"),
    _corrupt("a name twice", lambda path: archive(path, ONE, ONE), "it has two records named data.pkl"),
    File("a compressed record", lambda path: archive(path, ONE._replace(method=8)), "CheckpointIncompatible",
         "a.ckpt: data.pkl is compressed; a checkpoint's records are stored."),
    File("a compressed bomb", lambda path: archive(path, Part("data.pkl", b"x", method=8, size=0xFFFFFFF0)),
         "CheckpointCorrupt", "a.ckpt is corrupt: data.pkl overlaps what comes after it."),
    _corrupt("a record of 4 GiB", lambda path: archive(path, Part("data.pkl", b"x", size=0xFFFFFFF0)),
             "data.pkl overlaps what comes after it"),
    _corrupt("a record beyond the end", lambda path: archive(path, ONE._replace(at=1 << 30)),
             "data.pkl overlaps what comes after it"),
    File("a path that leads out", lambda path: archive(path, ONE, Part("../../canary", b"x"))),
    File("an absolute path", lambda path: archive(path, ONE, Part("/tmp/canary", b"x"))),
    File("several roots", lambda path: path.write_bytes(
        archive(path, ONE, Part("b", b"x")).read_bytes().replace(b"archive/b", b"brchive/b")),
        "CheckpointIncomplete", "a.ckpt is a zip archive, but not a checkpoint."),
    File("5,000 records", lambda path: archive(path, ONE, *(Part(f"data/{n}", b"") for n in range(5000)))),
    File("a TorchScript program", lambda path: archive(path, Part("constants.pkl", b""), ONE),
         "CheckpointIncompatible", "a.ckpt is a TorchScript program, not a checkpoint."),
    File("a directory before the file's beginning", lambda path: path.write_bytes(
        archive(path, ONE).read_bytes()[:-10] + struct.pack("<IIH", 1 << 30, 0, 0)), "CheckpointIncomplete",
        UNREADABLE.format("Bad offset for central directory")),
    File("a directory of 4 GiB", lambda path: path.write_bytes(
        archive(path, ONE).read_bytes()[:-10] + struct.pack("<IIH", 0xFFFFFFF0, 0xFFFFFFF0, 0)),
        "CheckpointIncomplete", UNREADABLE.format("Bad offset for central directory")),
    File("a record of holdfast's in a file of another's", lambda path: archive(path, ONE, Part("holdfast/x", b"")),
         "CheckpointIncomplete", "a.ckpt is not a whole checkpoint: its manifest is damaged."),
]  # fmt: skip

# -- our own files -------------------------------------------------------------------------------------------


def _rows(change: Callable[[list[Any]], object]) -> Callable[[Path], object]:
    """A file whose manifest has its rows changed, and whose checksums are all right."""
    return lambda path: build(path, value={"a": 1}, change=lambda content: change(content["records"]))


def _named(name: str) -> Callable[[Path], object]:
    def change(rows: list[Any]) -> None:
        rows[0][0] = name

    return _rows(change)


def _manifest(written: bytes) -> Callable[[Path], object]:
    return lambda path: build(path, value={"a": 1}, manifest=written)


def _summary(written: bytes) -> Callable[[Path], object]:
    return lambda path: build(path, value={"a": 1}, summary=written)


def _types(types: Any, value: Any = None) -> Callable[[Path], object]:
    return lambda path: build(path, value={"a": 1} if value is None else value, types=types)


def _first(spec: dict[str, Any]) -> dict[str, Any]:
    return {"items": {"0": spec}}


MANIFEST = "its manifest cannot be read: {}"
JSON_DEPTH = (
    "RecursionError('maximum recursion depth exceeded while decoding a JSON array from a unicode string')"
)
NAMED = [
    _corrupt(f"a record named {name[:20]!r}", _named(name), f"its manifest has a record named {name[:200]!r}")
    for name in ("../../canary", "/tmp/canary", "a\0b", "", "data/0/../1", "x" * 5000, "a b", "\u202e")
]
OWN = [
    *NAMED,
    _corrupt("two records of one name", lambda path: build(path, value={}, more=(("version", b"3\n"),)),
             "its manifest has a record named 'version'"),
    _corrupt("a second manifest", lambda path: build(path, value={}, more=((container.RECORDS, b"{}"),)),
             "its manifest has a record named 'holdfast/records.json'"),
    _corrupt("a row that is text", _rows(lambda rows: rows.insert(0, "row")),
             MANIFEST.format("IndexError('string index out of range')")),
    _corrupt("a row that is too short", _rows(lambda rows: rows.insert(0, [])),
             MANIFEST.format("IndexError('list index out of range')")),
    _corrupt("no rows", _rows(lambda rows: rows.clear()), "holdfast/records.json is at byte 384, where the manifest "
             "leaves no room for it"),
    _corrupt("no data.pkl", lambda path: build(path, value={}, change=lambda content: content["records"].pop(0)),
             "version is at byte 128, where the manifest leaves no room for it"),
    _corrupt("a manifest that is a list", _manifest(b"[]"),
             MANIFEST.format("TypeError('list indices must be integers or slices, not str')")),
    _corrupt("a manifest that is nested without end", _manifest(b"[" * 100_000),
             MANIFEST.format(JSON_DEPTH)),
    _corrupt("a manifest that is no JSON", _manifest(b"{"), MANIFEST.format(
             "JSONDecodeError('Expecting property name enclosed in double quotes: line 1 column 2 (char 1)')")),
    _corrupt("a manifest that is no text", _manifest(b"\xff\xfe\xfd"), MANIFEST.format(
             "UnicodeDecodeError('utf-16-le', b'\\xff\\xfe\\xfd', 2, 3, 'truncated data')")),
    _corrupt("digits without end in a manifest", _manifest(b'{"records":[["a",' + b"9" * 5000 + b"]]}"),
             MANIFEST.format("ValueError('Exceeds the limit (4300 digits) for integer string conversion: value has 5000 "
                             "digits; use sys.set_int_max_str_digits() to increase the limit')")),
    _corrupt("NaN in a manifest", _manifest(b'{"records":[["a",0,NaN,"0",[]]],"types":null,"omissions":[]}'),
             "its manifest says that a has nan bytes, the file has room for 580"),
    _corrupt("1e999 in a manifest", _manifest(b'{"records":[["a",0,1e999,"0",[]]],"types":null,"omissions":[]}'),
             "its manifest says that a has inf bytes, the file has room for 580"),
    File("keys that are there twice", _manifest(
         b'{"records":[],"types":{"type":"enum"},"records":[%ROWS%],"types":null,"omissions":[]}')),
    File("a summary of another format", _summary(b'{"format":1e999,"records":{}}'), "CheckpointIncomplete",
         "a.ckpt is not a whole checkpoint: its summary has no format version."),
    File("a summary that is a list", _summary(b"[1]"), "CheckpointIncomplete",
         "a.ckpt is not a whole checkpoint: its summary has no format version."),
    File("a summary whose format is true", _summary(b'{"format":true}'), "CheckpointIncomplete",
         "a.ckpt is not a whole checkpoint: its summary has no format version."),
    File("a summary whose format is 0", _summary(b'{"format":0}'), "CheckpointIncomplete",
         "a.ckpt is not a whole checkpoint: its summary has no format version."),
    File("a summary of a format to come", _summary(b'{"format":' + b"9" * 30 + b"}"), "CheckpointIncompatible",
         f"a.ckpt has format {'9' * 30}; this holdfast reads formats up to 1. Update holdfast to read it."),
    _corrupt("a summary without a manifest", _summary(b'{"format":1}'),
             "its summary does not say where the manifest is"),
    _corrupt("a manifest before the file", _summary(b'{"format":1,"records":{"offset":-5,"length":5,"crc32":"0"}}'),
             "its summary says that the manifest lies outside the file"),
    _corrupt("a manifest behind the file",
             _summary(b'{"format":1,"records":{"offset":0,"length":' + b"9" * 30 + b',"crc32":"0"}}'),
             "its summary says that the manifest lies outside the file"),
    _corrupt("another order of bytes", lambda path: build(path, value={"a": 1}, byteorder=b"big"),
             "its byteorder is not little"),
    *(File(f"the type {spec['type']!r}", _types(_first(spec))) for spec in (
        {"type": "os.system"}, {"type": "posix.system"}, {"type": "enum", "class": "os.system"},
        {"type": "dataclass", "class": "canary_module.Thing"}, {"type": "namedtuple", "class": "builtins.eval"},
        {"type": "__class__"}, {"type": "__import__"}, {"type": "canary_module"}, {"type": "omegaconf"},
        {"type": "torch", "class": "hub"}, {"type": "path", "class": "__class__"},
        {"type": "ndarray", "dtype": "O"}, {"type": "numpy_scalar", "dtype": "O"},
    )),
    File("a factory", _types(_first({"type": "defaultdict", "factory": "os.system"}), {"a": {}})),
    File("attributes of a namespace", _types(_first({"type": "namespace"}), {"a": {"__class__": 1, "__dict__": 2}})),
    File("attributes of a simple namespace", _types(_first({"type": "simple_namespace"}), {"a": {"__class__": 1}})),
    File("types a hundred and fifty levels deep", _types(functools.reduce(
        lambda inner, _: _first(inner), range(150), {"type": "path"}))),
    File("bytes of one value, again and again", lambda path: build(
        path, pickled=under(b"](" + call("builtins.bytearray", b"B\xa0\x86\1\0" + b"x" * 100_000) + b"r\1\0\0\0" + b"j\1\0\0\0" * 5000 + b"e"),
        types=_first({"items": {str(n): {"type": "bytes"} for n in range(5000)}}))),
    File("a set of a member that takes 2 to the 80 steps to hash", lambda path: build(
        path, pickled=under(b"]" + TUPLES + b"a"), types=_first({"type": "set"}))),
    File("an array of 2 to the 80 lists", lambda path: build(
        path, pickled=under(LISTS), types=_first({"type": "numpy_scalar", "dtype": "<f8"}))),
    File("a config of 2 to the 80 lists", lambda path: build(
        path, pickled=under(LISTS), types=_first({"type": "omegaconf"}))),
    File("a range of a list", _types(_first({"type": "range"}), {"a": [1] * 5000})),
    File("a decimal with an exponent", _types(_first({"type": "decimal"}), {"a": "1e999999999999999999"})),
    File("a date in another world", _types(_first({"type": "datetime"}), {"a": "99999-01-01"})),
]  # fmt: skip

# -- formats of before ---------------------------------------------------------------------------------------

LEGACY = "a.ckpt, in torch's old format, is not a whole checkpoint: {}."
OLD_TENSOR = under(tensor(key="k"))


def _old(what: str, message: str, error: str = "CheckpointUnsafe", **parts: Any) -> File:
    parts = {"pickled": under(text("x")), **parts}
    return File(what, lambda path: legacy_file(path, **parts), error, message)


def _count(value: int) -> bytes:
    return struct.pack("<q", value)


def _tar(path: Path) -> None:
    (path.parent / "inside").write_text("x")
    with tarfile.open(path, "w") as tar:
        tar.add(path.parent / "inside", arcname="../../canary")
    (path.parent / "inside").unlink()


OLD = [
    _old("code", "", "", pickled=under(call("posix.system", text(CANARY)))),
    _old("a tensor of an absurd length", LEGACY.format("it ends within its tensors"), "CheckpointIncomplete",
         pickled=OLD_TENSOR, keys=["k"], storages=_count(1 << 60)),
    _old("a tensor of a negative length", LEGACY.format("it ends within its tensors"), "CheckpointIncomplete",
         pickled=OLD_TENSOR, keys=["k"], storages=_count(-1)),
    _old("a tensor longer than its storage",
         "a.ckpt cannot be read: data/k has 0 bytes, which are not 1 elements of torch.float32.",
         pickled=OLD_TENSOR, keys=["k"], storages=_count(0)),
    _old("keys that are none", "a.ckpt cannot be read: it has a storage '5' that nothing refers to.", keys=[5]),
    _old("a key that is a list", "a.ckpt cannot be read: TypeError(\"unhashable type: 'list'\").", "CheckpointCorrupt",
         keys=[[]]),
    _old("a machine that is a number", "", "", about=5),
    _old("a tensor in what it says of the machine",
         "a.ckpt asks for posix.system, which opening a checkpoint never gives. Nothing was run. Do not use this file "
         "unless you know who wrote it.", about=os.system),
    File("a tar archive, as of torch 0.1", _tar, "CheckpointIncomplete",
         "a.ckpt is not a checkpoint: it begins with b'././@PaxHeader\\x00\\x00'."),
    File("a pickle by itself", lambda path: path.write_bytes(under(call("posix.system", text(CANARY)))),
         "CheckpointIncomplete", "a.ckpt is not a checkpoint: it begins with b'\\x80\\x02}X\\x01\\x00\\x00\\x00acposix\\n'."),
    File("nothing", lambda path: path.write_bytes(b""), "CheckpointIncomplete",
         "a.ckpt is not a checkpoint: it is empty."),
]  # fmt: skip


# -- files of safetensors, which are inspected but not loaded ------------------------------------------------


def _header(header: bytes, length: int | None = None, data: bytes = b"") -> Callable[[Path], object]:
    size = len(header) if length is None else length
    return lambda path: path.write_bytes(struct.pack("<Q", size) + header + data)


def _safe(what: str, header: bytes, length: int | None = None, data: bytes = b"") -> File:
    begin = (struct.pack("<Q", len(header) if length is None else length) + header + data)[:16]
    return File(what, _header(header, length, data), "CheckpointIncomplete",
                f"a.ckpt is not a checkpoint: it begins with {begin!r}.")  # fmt: skip


SAFETENSORS = [
    _safe("a safetensors header nested without end", b'{"a":' + b"[" * 100_000),
    _safe("a safetensors header of a length that is none", b"{}", 1 << 62),
    _safe("a tensor of safetensors beyond the file", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    _safe("two tensors of safetensors over the same bytes",
          b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
          data=b"1234"),
    _safe("a name of safetensors twice",
          b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
          data=b"1234"),
    _safe("a shape of safetensors that overflows",
          b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', data=b"1234"),
    _safe("digits without end in safetensors", b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
    _safe("a tensor of safetensors that is a list", b'{"a":[1,2,3]}'),
    _safe("a dtype of safetensors with many digits",
          b'{"a":{"dtype":"F' + b"9" * 5000 + b'","shape":[1],"data_offsets":[0,4]}}', data=b"1234"),
]  # fmt: skip

FILES = ZIPS + OWN + OLD + SAFETENSORS
assert len({file.what for file in FILES}) == len(FILES)
