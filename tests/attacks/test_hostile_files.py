"""A file that was made to do harm, or by a careless program: refused or read, and never the end of a listing."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.callbacks import lineage
from holdfast.checkpoint import catalog, container
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.retention import Found
from holdfast.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsafe

from .hostile import build

SPECS: list[tuple[Any, dict[str, Any]]] = [
    ("1e30000000", {"type": "fraction"}),
    (1 << 33, {"type": "bytes"}),
    ("a", {"type": "numpy_scalar", "dtype": "<U500000000"}),
    ("a", {"type": "numpy_scalar", "dtype": "|V900000000"}),
    ("a", {"type": "numpy_scalar", "dtype": "object"}),
    ([1], {"type": "deque", "maxlen": "x"}),
    ("x", {"type": []}),
    ({"b": 1}, {"items": 5}),
    ([1], {"items": {"5": {"type": "path"}, "x": {"type": "path"}}}),
    (1, {"items": {"0": {"type": "path"}}}),
    (3, {"type": "path", "class": []}),
    ("1e5", {"type": "datetime"}),
    ([1], {"type": "ref"}),
    ("x", [1]),  # type: ignore[list-item]
]


@pytest.mark.parametrize("plain, spec", SPECS, ids=lambda value: str(value)[:30])
def test_a_type_that_does_not_fit_costs_neither_the_file_nor_memory(
    plain: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    path = build(
        tmp_path / "a.ckpt", value={"a": plain, "b": "p"}, types={"items": {"0": spec, "1": {"type": "path"}}}
    )
    # What would take hours to make is large, too.
    tracemalloc.start()
    try:
        assert load(path) == {"a": plain, "b": Path("p")}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20  # of which the reader's own buffers take two


@pytest.mark.parametrize("types", [[1], "x", 5, {"items": []}, {"type": "ref"}])
def test_types_that_are_none_leave_the_plain_payload(types: Any, tmp_path: Path) -> None:
    assert load(build(tmp_path / "a.ckpt", value={"a": 1}, types=types)) == {"a": 1}


def test_an_expanded_tensor_is_not_copied_on_the_word_of_a_type(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"a": torch.ones(1).expand(1 << 40)}, path)
    row = _row(path, "data.pkl")
    pickled = path.read_bytes()[row[1] : row[1] + row[2]]
    for spec in (
        {"type": "ndarray", "dtype": ">f4"},
        {"type": "ndarray", "dtype": "|S4", "shape": [1 << 40]},
    ):
        build(path, pickled=pickled, types={"items": {"0": spec}}, storages=(b"\0" * 4,))
        assert load(path)["a"].shape == (1 << 40,)


def _row(path: Path, name: str) -> list[Any]:
    with zipfile.ZipFile(path) as archive:
        rows: list[Any] = json.loads(archive.read("archive/holdfast/records.json"))["records"]
    return next(row for row in rows if row[0] == name)


SUMMARIES: list[dict[str, Any]] = [
    {"saved_at": 10**400},
    {"saved_at": "NaN"},
    {"metrics": {"a": 10**400}},
    {"step": "x", "epoch": [], "kind": [[]], "contents": [[1]]},
    {"owner:x": 5},
    {"owner:x": {"names": 5}},
    {"owner:x": {"names": ["a.ckpt"], "score": "abc"}},
    {"owner:x": {"names": ["a.ckpt"], "score": {}}},
    {"owner:x": {"names": ["a.ckpt"]}},
]


@pytest.mark.parametrize("summary", SUMMARIES, ids=lambda value: str(value)[:40])
def test_an_odd_summary_is_read_for_what_it_is_worth(summary: dict[str, Any], tmp_path: Path) -> None:
    path = build(tmp_path / "a.ckpt", value={"a": 1}, summary=summary)
    assert load(path) == {"a": 1}
    assert [(entry.whole, entry.metrics, entry.saved_at) for entry in catalog.scan(tmp_path)] == [
        (True, {}, 0.0)
    ]
    assert catalog.read_summary(path).step is None
    run = "x" if isinstance(summary.get("owner:x"), dict) and summary["owner:x"]["names"] != 5 else None
    assert lineage.describe_all(str(tmp_path)) == {str(path): Found(str(path), 0, run)}
    assert lineage.give_missing_names(str(path), "x", 1, str(path.parent)) == []


def test_a_summary_nested_without_end_is_no_summary(tmp_path: Path) -> None:
    path = build(tmp_path / "a.ckpt", value={"a": 1}, summary=b"[" * 200_000)
    reason = catalog.scan(tmp_path)[0].reason
    assert reason is not None and reason.startswith(
        "its summary is not JSON: maximum recursion depth exceeded"
    )
    for read in (load, catalog.read_summary):
        with pytest.raises(CheckpointIncomplete) as caught:
            read(path)
        assert str(caught.value) == f"a.ckpt is not a whole checkpoint: {reason}."
    assert lineage.describe_all(str(tmp_path)) == {}


@pytest.mark.parametrize(
    "column, said, message",
    [
        (2, 2**70, "has 1180591620717411303424 bytes, the file has room for {most}"),
        (2, -1, "has -1 bytes, the file has room for {most}"),
        (2, True, "has True bytes, the file has room for {most}"),
        (3, "-1", "has checksum -1"),
        (3, "1ffffffff", "has checksum 1ffffffff"),
    ],
)
def test_a_row_of_the_manifest_that_cannot_be_is_named(
    column: int, said: Any, message: str, tmp_path: Path
) -> None:
    def change(content: dict[str, Any]) -> None:
        next(row for row in content["records"] if row[0] == "data.pkl")[column] = said

    path = build(tmp_path / "a.ckpt", value={"a": 1}, change=change)
    data = path.read_bytes()
    with pytest.raises(CheckpointCorrupt) as caught:
        load(path)
    most = data.index(b"PK\x01\x02")
    assert (
        str(caught.value)
        == f"a.ckpt is corrupt: its manifest says that data.pkl {message.format(most=most)}."
    )


def test_names_from_a_file_stay_in_its_directory(tmp_path: Path) -> None:
    inside = tmp_path / "runs" / "a"
    inside.mkdir(parents=True)
    for bad in (
        "../../escaped.ckpt",
        str(tmp_path / "absolute.ckpt"),
        "..",
        "",
        "a\0b",
        "\ud800",
        "x" * 256,
        5,
    ):
        path = build(
            inside / "x.ckpt", value={}, summary={"owner:r": {"names": ["x.ckpt", bad], "score": None}}
        )
        assert lineage.give_missing_names(str(path), "r", 1, str(path.parent)) == []
        assert lineage.describe(str(path)) == Found(str(path), 0)
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(inside) == ["x.ckpt"]


def test_a_listing_survives_what_cannot_be_read(tmp_path: Path) -> None:
    CheckpointEngine().save({"w": torch.ones(3)}, tmp_path / "good.ckpt", summary={"step": 1})
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    found = {os.path.basename(entry.path): (entry.whole, entry.reason) for entry in catalog.scan(tmp_path)}
    assert found == {
        "good.ckpt": (True, None),
        "pipe.ckpt": (False, "it cannot be read: it is not a regular file"),
        "loop.ckpt": (False, "it cannot be read: Too many levels of symbolic links"),
    }
    assert list(lineage.describe_all(str(tmp_path))) == [str(tmp_path / "good.ckpt")]
    with pytest.raises(CheckpointIncomplete) as caught:
        load(tmp_path / "pipe.ckpt")
    assert str(caught.value) == f"{tmp_path}/pipe.ckpt is not a regular file, so not a checkpoint."
    (tmp_path / "bad.ckpt").write_bytes(b"hello")
    with pytest.raises(
        CheckpointIncomplete, match=r"^bad\.ckpt is not a checkpoint: it begins with b'hello'\.$"
    ):
        load(tmp_path / "bad.ckpt")


def test_the_summary_is_not_looked_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    with open(path, "wb") as file:
        file.truncate(4 << 30)
        file.seek(4 << 30)
        file.write(container._END64.pack(0x06064B50, 44, 45, 45, 0, 0, 1, 1, 0, 4 << 30))
        file.write(container._LOCATOR.pack(0x07064B50, 0, 4 << 30, 1))
        file.write(container._END.pack(0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    lengths: list[int] = []
    read = os.pread

    def counted(fd: int, length: int, at: int) -> bytes:
        data = read(fd, length, at)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert catalog.scan(tmp_path)[0].reason == "it is not a checkpoint"
    assert container.SUMMARY_BYTES < sum(lengths) < 2 * container.SUMMARY_BYTES


def test_a_tensor_that_outgrows_its_record_is_refused(tmp_path: Path) -> None:
    CheckpointEngine().save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    row = _row(tmp_path / "a.ckpt", "data.pkl")
    pickled = (tmp_path / "a.ckpt").read_bytes()[row[1] : row[1] + row[2]]
    # The dict holds one tensor on the stack before SETITEM: BUILD it with (itself, offset, size, stride).
    at = pickled.rindex(b"s.")
    state = b"q\x64(h\x64K\x00J\x00\x00\x10\x00\x85K\x01\x85tb"
    build(tmp_path / "a.ckpt", pickled=pickled[:at] + state + pickled[at:], storages=(b"\0" * 4,))
    with pytest.raises(CheckpointUnsafe) as caught:
        load(tmp_path / "a.ckpt")
    assert str(caught.value) == "a.ckpt cannot be read: it changes something that is not a container."


def test_a_message_never_prints_what_a_pickle_holds(tmp_path: Path) -> None:
    doubling = b"\x80\x02)" + b"q\x01h\x01\x86" * 40
    path = build(tmp_path / "a.ckpt", pickled=doubling + b"Q.")
    with pytest.raises(CheckpointUnsafe) as caught:
        load(path)
    assert str(caught.value) == "a.ckpt cannot be read: a tuple does not refer to a storage."
    path = build(
        tmp_path / "a.ckpt",
        pickled=b"\x80\x02}X\x01\0\0\0a" + doubling[2:] + b"s.",
        types={"items": {"0": {"type": "path"}}},
    )
    assert type(load(path)["a"]) is tuple


def test_the_summary_cannot_give_the_file_another_format(tmp_path: Path) -> None:
    CheckpointEngine().save({"v": 1}, tmp_path / "a.ckpt", summary={"format": 2})
    assert load(tmp_path / "a.ckpt") == {"v": 1}


def test_a_plain_pickle_that_is_no_dict_is_read(tmp_path: Path) -> None:
    assert load(build(tmp_path / "a.ckpt", pickled=pickle.dumps([1, 2], 2)), skip={"0"}) == [1, 2]
