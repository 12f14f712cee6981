"""A file that is not what was written is refused, by the name of what is wrong in it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from realistic import SUMMARY, realistic_payload

from holdfast.checkpoint import catalog, container, integrity
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.single import load_tensor
from holdfast.checkpoint.verify import verify
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointNotFound,
)

NAME = "state_dict/3.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "epoch=3.ckpt"
    CheckpointEngine().save(realistic_payload(), path, summary=SUMMARY)
    return path


def regions(path: Path) -> dict[str, list[range]]:
    """Every byte of a file by what it is."""
    with open(path, "rb") as file:
        tail = container.read_tail(file.fileno())
        records = integrity.read_manifest(file.fileno(), tail).records
    found: dict[str, list[range]] = {}
    for record in records:
        entry = record.entry
        name_at = entry.header + 30
        padding_at = name_at + len("archive/") + len(entry.name)
        kind = "data" if entry.name.startswith("data/") else entry.name
        found.setdefault("zip headers", []).append(range(entry.header, padding_at))
        found.setdefault("padding", []).append(range(padding_at, entry.offset))
        found.setdefault(kind, []).append(range(entry.offset, entry.offset + entry.length))
    size = path.stat().st_size
    found["zip directory"] = [range(tail.directory, size - 22)]
    found["end of the directory"] = [range(size - 22, size)]
    assert sum(len(part) for parts in found.values() for part in parts) == size
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_1000_flipped_bits_are_each_refused(whole: Path) -> None:
    """A hundred in every kind of byte: loading refuses each, and so does `verify`, which also names the record."""
    good, expected = whole.read_bytes(), load_tensor(whole, NAME)
    assert same(load(whole), realistic_payload())
    rng = random.Random(0)
    by_kind = regions(whole)
    assert len(by_kind) == 10
    harmless = 0
    for kind, parts in by_kind.items():
        for _ in range(100):
            part = rng.choice([part for part in parts if len(part)])
            position, bit = rng.choice(part), rng.randrange(8)
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            whole.write_bytes(bad)
            for read in (load, verify):
                with pytest.raises(CheckpointError) as caught:
                    read(whole)
                assert caught.value.path == str(whole), kind
                assert str(caught.value).startswith("epoch=3.ckpt is "), kind
            try:
                tensor = load_tensor(whole, NAME)
            except CheckpointError:
                continue
            assert torch.equal(tensor, expected), (kind, position, bit)
            harmless += 1
    assert 0 < harmless < 1000  # it reads what it needs; no other tensor ever came back
    whole.write_bytes(good)
    assert same(load(whole), realistic_payload())


def test_every_byte_of_the_headers_and_the_tail_is_covered(tmp_path: Path) -> None:
    """All bytes of a small file, so that each field of each zip structure has its turn."""
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"w": torch.ones(3)}, path, summary=SUMMARY)
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x40 if position % 2 else 0x01
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(path)


def test_truncation_at_any_length_is_refused(whole: Path) -> None:
    good = whole.read_bytes()
    parts = [part for kind in regions(whole).values() for part in kind]
    lengths = {0, 1, 3, 22, 64, len(good) - 1}
    for part in parts:  # at each boundary, beside it, and within
        lengths |= {part.start - 1, part.start, part.start + 1, (part.start + part.stop) // 2}
    for length in sorted(length for length in lengths if 0 <= length < len(good)):
        whole.write_bytes(good[:length])
        for read in (load, verify, lambda path: load_tensor(path, NAME)):
            with pytest.raises(CheckpointIncomplete) as caught:
                read(whole)
            assert str(caught.value).startswith("epoch=3.ckpt is not a ")
        assert not catalog.scan(whole.parent)[0].whole


def test_bytes_that_were_added_are_refused(whole: Path) -> None:
    good = whole.read_bytes()
    for bad in (good + b"\0", good + good, b"\0" + good, good[:64] + b"\0" * 64 + good[64:]):
        whole.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(whole)


def flip(path: Path, found: bytes) -> None:
    data = path.read_bytes()
    at = data.index(found)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_the_message_names_the_record_the_tensor_and_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    weight = torch.arange(100.0)
    for epoch in (1, 2, 3):
        payload = {"state_dict": {"layers.0.bias": torch.ones(2) * 9, "layers.0.weight": weight}}
        CheckpointEngine().save(payload, tmp_path / f"epoch={epoch}.ckpt", summary={"epoch": epoch})
    flip(tmp_path / "epoch=3.ckpt", weight.numpy().tobytes())
    bad = weight.clone()
    bad.view(torch.uint8)[0] ^= 1
    import zlib

    expected, found = zlib.crc32(weight.numpy().tobytes()), zlib.crc32(bad.numpy().tobytes())
    with pytest.raises(CheckpointCorrupt) as caught:
        load(tmp_path / "epoch=3.ckpt")
    assert str(caught.value) == (
        f"epoch=3.ckpt is corrupt: data/1 (state_dict/layers.0.weight) has checksum {found:08x}, "
        f"the manifest says {expected:08x}.\n"
        f"Newest whole checkpoint in {tmp_path}: epoch=2.ckpt. Check them all: holdfast verify {tmp_path}"
    )
    assert caught.value.path == str(tmp_path / "epoch=3.ckpt")
    assert load(tmp_path / "epoch=3.ckpt", verify=False)["state_dict"]["layers.0.weight"][0] != weight[0]


def test_a_damaged_zip_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"w": torch.ones(3)}, path)
    flip(path, b"archive/data/0")
    with pytest.raises(CheckpointCorrupt) as caught:
        load(path)
    assert str(caught.value) == (
        "a.ckpt is corrupt: the zip header of data/0 (w) is not the one that was written."
    )


def test_a_damaged_manifest_and_a_damaged_summary_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"w": torch.ones(3)}, path)
    good = path.read_bytes()
    flip(path, b'{"columns"')
    with pytest.raises(CheckpointCorrupt, match=r"^a.ckpt is corrupt: holdfast/records.json has checksum "):
        load(path)
    path.write_bytes(good)
    flip(path, b'{"format"')
    with pytest.raises(CheckpointIncomplete) as caught:
        load(path)
    assert str(caught.value) == "a.ckpt is not a whole checkpoint: its summary has a wrong checksum."


def test_a_skipped_record_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"w": torch.ones(3), "optimizer_states": torch.arange(50.0)}, path)
    flip(path, torch.arange(50.0).numpy().tobytes())
    assert load(path, skip=["optimizer_states"])["w"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointCorrupt):
        load(path)


def test_a_missing_file_names_the_nearest_names(tmp_path: Path) -> None:
    for name in ("epoch=1-step=10.ckpt", "epoch=2-step=20.ckpt", "notes.txt"):
        CheckpointEngine().save({}, tmp_path / name)
    with pytest.raises(CheckpointNotFound) as caught:
        load(tmp_path / "epoch=1-step=1.ckpt")
    assert str(caught.value) == (
        f"There is no checkpoint {tmp_path}/epoch=1-step=1.ckpt. "
        "The nearest names there: epoch=1-step=10.ckpt, epoch=2-step=20.ckpt."
    )
    with pytest.raises(CheckpointNotFound) as caught:
        load(tmp_path / "runs" / "a.ckpt")
    assert str(caught.value) == (
        f"There is no checkpoint {tmp_path}/runs/a.ckpt. There is no directory {tmp_path}/runs either."
    )
    (tmp_path / "empty" / "directories are no checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as plain:
        load(tmp_path / "empty" / "a.ckpt")
    assert str(plain.value) == (
        f"There is no checkpoint {tmp_path}/empty/a.ckpt. That directory has no checkpoints."
    )


def test_what_is_not_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"hello world, this is text")
    with pytest.raises(CheckpointIncomplete) as caught:
        load(tmp_path / "a.ckpt")
    assert str(caught.value) == "a.ckpt is not a checkpoint: it begins with b'hello world, thi'."
    (tmp_path / "b.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointIncomplete) as caught:
        load(tmp_path / "b.ckpt")
    assert str(caught.value) == "b.ckpt is not a checkpoint: it is empty."
    with pytest.raises(CheckpointIncomplete) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path} is a directory, not a checkpoint file."


def test_a_file_of_a_newer_format_is_told_apart_from_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.checkpoint import container

    monkeypatch.setattr(container, "FORMAT", 7)
    CheckpointEngine().save({}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    with pytest.raises(CheckpointIncompatible) as caught:
        load(tmp_path / "a.ckpt")
    assert str(caught.value) == (
        "a.ckpt has format 7; this holdfast reads formats up to 1. Update holdfast to read it."
    )


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = whole.read_bytes()
    read = os.preadv

    def shrinking(fd: int, buffers: list[memoryview], at: int) -> int:
        os.truncate(whole, len(good) // 2)
        return read(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(CheckpointCorrupt, match=r"the file ends within data"):
        load(whole)
