"""Files of torch.save and PyTorch Lightning open without importing or calling what they name."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from realistic import realistic_payload

from holdfast.checkpoint import container, pickling
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.foreign import Opaque
from holdfast.checkpoint.load import load
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointUnsafe,
)


class Custom:
    def __init__(self) -> None:
        self.inner = {"n": 1}


def test_a_file_of_torch_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    payload = {
        "w": shared,
        "view": shared[1],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "u16": torch.ones(3, dtype=torch.uint16),
        "empty": torch.empty(0),
        "plain": [1, "a", None, (2.5, {3}), b"x", b"", 1j, collections.OrderedDict(a=1)],
        "conj": torch.tensor([1 + 2j]).conj(),
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save(payload, tmp_path / "a.ckpt")
    back = load(tmp_path / "a.ckpt")
    assert torch.equal(back["w"], shared)
    assert back["view"].data_ptr() == back["w"][1].data_ptr()
    assert isinstance(back["parameter"], torch.nn.Parameter)
    assert back["bf16"].dtype == torch.bfloat16 and back["u16"].dtype == torch.uint16
    assert back["empty"].shape == (0,)
    assert back["plain"] == payload["plain"] and type(back["plain"][7]) is collections.OrderedDict
    assert torch.equal(back["conj"], payload["conj"].resolve_conj())
    assert torch.equal(back["sparse"].to_dense(), torch.eye(3))
    assert load(tmp_path / "a.ckpt", skip=["w"]).keys() == payload.keys() - {"w"}


def test_values_that_torch_refuses_come_back_where_they_are_known(tmp_path: Path) -> None:
    payload = {
        "hyper_parameters": argparse.Namespace(lr=0.1, data=pathlib.Path("/data")),
        "path": pathlib.PosixPath("a/b"),
        "default": collections.defaultdict(list, {"a": [1]}),
        "deque": collections.deque([1, 2], 3),
        "counter": collections.Counter("aab"),
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "delta": datetime.timedelta(seconds=5),
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(1.5),
        "frozen": frozenset({1}),
    }
    torch.save(payload, tmp_path / "a.ckpt")
    back = load(tmp_path / "a.ckpt")
    for key in ("array", "fortran"):
        assert back.pop(key).tolist() == payload.pop(key).tolist()  # type: ignore[attr-defined]
    assert back == payload
    assert {key: type(value) for key, value in back.items()} == {
        key: type(value) for key, value in payload.items()
    }
    assert back["default"].default_factory is list


def test_unknown_classes_are_inert_and_keep_their_names(tmp_path: Path) -> None:
    torch.save({"custom": Custom(), "list": [Custom()], "w": torch.ones(1)}, tmp_path / "a.ckpt")
    back = load(tmp_path / "a.ckpt")
    assert isinstance(back["custom"], Opaque) and not isinstance(back["custom"], Custom)
    assert back["custom"].qualified_name == f"{Custom.__module__}.Custom"
    assert back["custom"].state == {"inner": {"n": 1}}
    assert repr(back["list"][0]) == f"<Opaque {Custom.__module__}.Custom>"
    report = CheckpointEngine().save(back, tmp_path / "b.ckpt")
    assert report.omissions[0] == ("custom", f"a value of type {Custom.__module__}.Custom cannot be stored")


def test_lightnings_attribute_dict_is_a_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with a class of that name, so that Lightning need not be there."""
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    attribute_dict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = attribute_dict  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.utilities", types.ModuleType("utilities"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(
            {"hyper_parameters": attribute_dict(lr=0.1, more=attribute_dict(a=[1]))}, tmp_path / "a.ckpt"
        )
    back = load(tmp_path / "a.ckpt")["hyper_parameters"]
    assert type(back) is dict and back == {"lr": 0.1, "more": {"a": [1]}} and type(back["more"]) is dict


def test_the_old_format_is_read_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    shared = torch.arange(6.0)
    payload = {
        "w": shared[2:].view(2, 2),
        "all": shared,
        "half": torch.ones(3, dtype=torch.float16),
        "x": Custom(),
    }
    torch.save(payload, path, _use_new_zipfile_serialization=False)
    back = load(path)
    assert back["w"].tolist() == [[2, 3], [4, 5]] and back["half"].tolist() == [1, 1, 1]
    assert back["w"].untyped_storage().data_ptr() == back["all"].untyped_storage().data_ptr()
    assert back["x"].qualified_name.endswith(".Custom")
    torch.save({"e": torch.empty(0), "n": [1]}, path, _use_new_zipfile_serialization=False)
    assert (load(path)["e"].shape, load(path)["n"]) == ((0,), [1])


def test_the_old_format_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(300), "v": [1, "x"]}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointIncomplete):
            load(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointIncomplete) as caught:
        load(path)
    assert str(caught.value) == (
        "a.ckpt, in torch's old format, is not a whole checkpoint: it ends within its tensors."
    )


def test_the_old_format_from_a_big_endian_machine(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(CheckpointIncompatible) as caught:
        load(path)
    assert str(caught.value) == "a.ckpt was written on a big-endian machine."


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x"], "a.ckpt cannot be read: it has a storage 'x' that nothing refers to."),
        ([], "a.ckpt cannot be read: there is no storage '{key}'."),
    ],
)
def test_the_old_format_whose_storages_are_others(keys: list[str], message: str, tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.ckpt", torch.ones(3)
    torch.save({"w": tensor}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    key = str(tensor.untyped_storage()._cdata)
    before = pickle.dumps([key], 2)
    assert whole.count(before) == 1
    path.write_bytes(whole.replace(before, pickle.dumps(keys, 2)))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == message.format(key=key)


@pytest.mark.parametrize("name", ["memo", "bytes", "frame", "long", "string", "number", "set function"])
def test_the_old_format_that_asks_for_absurd_things(name: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.ckpt").read_bytes()
    at = whole.rindex(pickle.dumps({}, 2))
    (tmp_path / "a.ckpt").write_bytes(whole[:at] + BOMBS[name] + whole[at + len(pickle.dumps({}, 2)) :])
    with pytest.raises(CheckpointError):
        load(tmp_path / "a.ckpt")


def test_a_damaged_foreign_file_is_refused_by_the_record(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(100.0)}, tmp_path / "a.ckpt")
    good = (tmp_path / "a.ckpt").read_bytes()
    at = good.index(torch.arange(100.0).numpy().tobytes())
    (tmp_path / "a.ckpt").write_bytes(good[:at] + b"\1" + good[at + 1 :])
    with pytest.raises(
        CheckpointCorrupt, match=r"^a.ckpt is corrupt: data/0 has checksum .*, the zip directory says"
    ):
        load(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes(good[:-10])
    with pytest.raises(CheckpointIncomplete) as caught:
        load(tmp_path / "a.ckpt")
    assert str(caught.value) == (
        "a.ckpt is not a whole checkpoint: it begins as a zip archive, but the directory at its end cannot be "
        "read (File is not a zip file). It may have been cut short."
    )


def test_other_archives_are_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("readme/text.txt", "hello")
    with pytest.raises(CheckpointIncomplete) as caught:
        load(tmp_path / "a.ckpt")
    assert str(caught.value) == "a.ckpt is a zip archive, but not a checkpoint: it has no data.pkl."
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": "b" * 1000}, 2))
    with pytest.raises(CheckpointIncompatible) as squeezed:
        load(tmp_path / "b.ckpt")
    assert str(squeezed.value) == "b.ckpt: data.pkl is compressed; a checkpoint's records are stored."
    with zipfile.ZipFile(tmp_path / "c.ckpt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(CheckpointIncompatible) as program:
        load(tmp_path / "c.ckpt")
    assert str(program.value) == "c.ckpt is a TorchScript program, not a checkpoint."


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def with_pickle(data: bytes, path: Path, *, ours: bool) -> None:
    """A file that holds this very pickle, with all its checksums right."""
    if not ours:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        return
    dumps = pickling.dumps
    pickling.dumps = lambda tree, plan: data
    try:
        CheckpointEngine().save({"w": torch.ones(1)}, path)
    finally:
        pickling.dumps = dumps


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_code_in_a_pickle_is_never_run(ours: bool, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = pickle.dumps({"a": Bomb(marker), "w": 1}, protocol)
    with_pickle(data, tmp_path / "a.ckpt", ours=ours)
    if ours:
        with pytest.raises(CheckpointUnsafe) as caught:
            load(tmp_path / "a.ckpt")
        assert str(caught.value) == (
            "a.ckpt asks for posix.system, which opening a checkpoint never gives. "
            "Nothing was run. Do not use this file unless you know who wrote it."
        )
    else:
        back = load(tmp_path / "a.ckpt")
        assert back["a"].qualified_name == "posix.system"
        assert back["a"].args == (f"touch {marker}",)
    assert not marker.exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


BOMBS = {
    "memo": opcodes(b"N", b"r\xff\xff\xff\x7f"),
    "text memo": opcodes(b"N", b"p99999999999\n"),
    "bytes": opcodes(b"\x8e\x00\x00\x00\x00\xff\x00\x00\x00"),
    "frame": opcodes(b"\x95\x00\x00\x00\x00\xff\x00\x00\x00N"),
    "long": opcodes(b"\x8b\xff\xff\xff\x7f"),
    "string": opcodes(b"X\xff\xff\xff\x7f"),
    "extension": opcodes(b"\x82\x01"),
    "text id": opcodes(b"Pname\n"),
    "no end": opcodes(b"N")[:-1],
    "number": opcodes(b"c__builtin__\nbytearray\n", b"J\xff\xff\xff\x7f\x85R"),
    "set function": opcodes(
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"}X\x0c\x00\x00\x00__defaults__)s", b"N\x86", b"b"
    ),
    "set slot": opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}X\x09\x00\x00\x00_function]s\x86b"),
    "not a storage": opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"(NK\x00)))t", b"R"),
    "not a pickle": b"hello",
    "empty": b"",
}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_absurd_things_are_refused(name: str, ours: bool, tmp_path: Path) -> None:
    with_pickle(BOMBS[name], tmp_path / "a.ckpt", ours=ours)
    with pytest.raises(CheckpointUnsafe):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "size, stride, offset", [((10,), (1,), 0), ((2,), (1,), 2), ((2, 2), (3, 1), 0), ((2,), (-1,), 2)]
)
def test_a_tensor_that_reaches_beyond_its_record_is_refused(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path
) -> None:
    untyped = torch.ones(3).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)

    class Reaching:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    torch.save({"w": Reaching()}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointUnsafe, match="a tensor"):
        load(tmp_path / "a.ckpt")


def test_the_scan_accepts_what_real_pickles_hold() -> None:
    value = [*range(300), "x" * 300, b"y" * 300, 2**3000, -1.5, {"a": {1, 2}}, (1,), None, "z" * 70_000]
    for protocol in range(6):
        pickling.scan(pickle.dumps(value * 40, protocol))
    buffer = io.BytesIO()
    torch.save(realistic_payload()["state_dict"], buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickling.scan(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))


def test_a_hostile_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right checksums, absurd content."""
    rows = container.records_bytes
    for old, new in [
        (b'"data/0"', b'"../../0"'),
        (b'"data/0"', b'"data.pkl"'),
        (b'"types":null', b'"types":{"type":"enum","class":"os.system"}'),
        (b'"types":null', b'"types":{"items":{"0":{"type":"ndarray","dtype":"|O8"}}}'),
        (b'"types":null', b'"types":{"items":{"99":{"type":"path"}}}'),
        (b'"types":null', b'"types":' + b'{"items":{"0":' * 150 + b"{}" + b"}}" * 150),
        (b'"omissions":[]', b'"records":' + b"[" * 5000),
        (b'"records":[', b'"records":[["x",1e99,-5,"zz",[]],'),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(container, "records_bytes", lambda *args, o=old, n=new: rows(*args).replace(o, n))
            CheckpointEngine().save({"w": torch.ones(1)}, tmp_path / "a.ckpt")
        if old == b'"types":null':  # types that do not fit leave the plain value
            assert load(tmp_path / "a.ckpt")["w"].tolist() == [1]
            continue
        with pytest.raises(CheckpointError):
            load(tmp_path / "a.ckpt")


def test_the_checksum_is_zlibs() -> None:
    from holdfast.checkpoint.checksum import crc32

    assert crc32(b"hello") == zlib.crc32(b"hello")
    assert crc32(b"lo", crc32(b"hel")) == zlib.crc32(b"hello")
