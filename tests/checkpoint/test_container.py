"""The file: a zip that every tool opens, aligned, of which the tail says what it is."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from realistic import SUMMARY, realistic_payload

from holdfast.checkpoint import container
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.errors import CheckpointError, ConfigError


def assert_every_reader_opens(path: Path, weights: torch.Tensor) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-tq", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "No errors detected" in done.stdout
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["w"], weights)
    assert torch.equal(load(path)["w"], weights)


def test_zip_tools_torch_and_holdfast_open_it(tmp_path: Path) -> None:
    weights = torch.randn(300, 7)
    CheckpointEngine().save({"w": weights, "e": torch.empty(0)}, tmp_path / "a.ckpt")
    assert_every_reader_opens(tmp_path / "a.ckpt", weights)


@pytest.mark.parametrize("threshold", [1, 500, 2000])
def test_sizes_and_offsets_beyond_32_bits_go_into_zip64_fields(
    threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the threshold lowered, so that no file of 4 GiB is needed."""
    monkeypatch.setattr(container, "ZIP64_BYTES", threshold)
    monkeypatch.setattr(container, "ZIP64_ENTRIES", 4)
    weights = torch.randn(300, 7)
    CheckpointEngine().save({"small": torch.ones(1), "w": weights}, tmp_path / "a.ckpt", summary=SUMMARY)
    assert b"PK\x06\x06" in (tmp_path / "a.ckpt").read_bytes()[-200:]
    assert_every_reader_opens(tmp_path / "a.ckpt", weights)


def test_more_records_than_a_plain_zip_can_count(tmp_path: Path) -> None:
    payload = {"w": torch.arange(70_000.0), "many": [torch.tensor(float(n)) for n in range(66_000)]}
    CheckpointEngine().save(payload, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt")["many"][65_999] == 65_999
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert len(archive.infolist()) == 66_001 + 5


def test_layout_as_documented(tmp_path: Path) -> None:
    payload = realistic_payload()
    CheckpointEngine().save(payload, tmp_path / "a.ckpt", summary=SUMMARY)
    data = (tmp_path / "a.ckpt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        manifest = json.loads(archive.read("archive/holdfast/records.json"))
        summary = json.loads(archive.read("archive/holdfast/summary.json"))
    assert names[:-5] == [f"archive/data/{number}" for number in range(len(names) - 5)]
    assert names[-5:] == [
        "archive/data.pkl",
        "archive/version",
        "archive/byteorder",
        "archive/holdfast/records.json",
        "archive/holdfast/summary.json",
    ]
    for info in infos:
        name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
        assert (info.header_offset + 30 + name_length + extra_length) % 64 == 0
    rows = {row[0]: row for row in manifest["records"]}
    weight = payload["state_dict"]["0.weight"]
    row = next(row for row in rows.values() if row[4] and row[4][0][0] == "state_dict/0.weight")
    assert row[4] == [["state_dict/0.weight", "float32", [4, 1, 3, 3]]]
    assert data[row[1] : row[1] + row[2]] == weight.numpy().tobytes()
    assert summary["step"] == 120 and summary["metrics"] == {"val_loss": 0.25} and summary["format"] == 1
    assert summary["contents"] == list(payload)
    where = summary["records"]
    assert json.loads(data[where["offset"] : where["offset"] + where["length"]]) == manifest


def test_the_same_state_gives_the_same_bytes_but_for_the_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        CheckpointEngine().save(realistic_payload(), tmp_path / name)
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        end = archive.getinfo("archive/holdfast/summary.json").header_offset
    assert a[:end] == b[:end]


def test_files_with_the_storages_after_the_pickle_are_read(tmp_path: Path) -> None:
    """As the first files have them."""
    payload = realistic_payload()
    CheckpointEngine().save(payload, tmp_path / "new.ckpt", summary=SUMMARY)
    with zipfile.ZipFile(tmp_path / "new.ckpt") as archive:
        records = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    manifest = json.loads(records[container.RECORDS])
    tensors = {row[0]: [json.dumps(tensor) for tensor in row[4]] for row in manifest["records"]}
    summary = json.loads(records[container.SUMMARY])
    data, entries = bytearray(), []

    def add(name: str, record: bytes) -> container.Entry:
        header = container.local_header(name, len(data), len(record), crc32(record))
        at = len(data) + len(header)
        entries.append(container.Entry(name, len(data), at, len(record), crc32(record)))
        data.extend(header + record)
        return entries[-1]

    storages = [name for name in records if name.startswith("data/")]
    for name in ["data.pkl", "version", "byteorder", *storages]:
        add(name, records[name])
    placed = add(container.RECORDS, container.records_bytes(entries, tensors, manifest["types"], []))
    add(container.SUMMARY, container.summary_bytes(summary, placed))
    (tmp_path / "old.ckpt").write_bytes(data + container.directory(entries, len(data)))
    read = load(tmp_path / "old.ckpt")
    assert list(read) == list(payload)
    for key, tensor in payload["state_dict"].items():
        assert torch.equal(read["state_dict"][key], tensor)
    (tmp_path / "old.ckpt").write_bytes(data[:-1] + b"x" + container.directory(entries, len(data)))
    with pytest.raises(CheckpointError):
        load(tmp_path / "old.ckpt")


def test_a_summary_holds_plain_values_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointEngine().save({}, tmp_path / "a.ckpt", summary={"metrics": {"loss": torch.ones(1)}})
    assert str(caught.value) == (
        "summary: metrics.loss is a Tensor; a summary holds plain values only "
        "(text, numbers, True, False, None, and lists and dicts of them)."
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", ["catalog", "commit", "container", "integrity", "checksum"])
def test_listing_and_checking_need_no_torch(module: str) -> None:
    code = f"import sys, holdfast.checkpoint.{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("through_the_cache", [False, True])
def test_saving_takes_little_memory_over_the_state(through_the_cache: bool, tmp_path: Path) -> None:
    """In a process of its own: a state several times the bound: one tensor, many, and one with gaps."""
    code = f"""
import resource, torch
from holdfast.checkpoint import direct
from holdfast.checkpoint.engine import CheckpointEngine
if {through_the_cache}:
    direct._DIRECT = 0
CheckpointEngine().save({{"warm": torch.ones(10)}}, {str(tmp_path / "w.ckpt")!r})
state = {{"one": torch.ones(24 << 20), "many": [torch.ones(64 << 10) for _ in range(256)],
         "strided": torch.ones(16 << 20, 4)[:, 1]}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
CheckpointEngine().save(state, {str(tmp_path / "a.ckpt")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 64 << 10  # KiB
