"""What a directory holds, told from the files' tails."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from holdfast.checkpoint import catalog, commit
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.errors import CheckpointIncomplete, CheckpointNotFound, StorageError


def save(path: Path, **summary: object) -> None:
    CheckpointEngine().save({"state_dict": {"w": torch.ones(100)}, "epoch": 1}, path, summary=summary)


def test_a_summary_comes_back(tmp_path: Path) -> None:
    metrics = {"loss": 0.5, "nan": math.nan, "inf": math.inf, "minus": -math.inf}
    save(tmp_path / "a.ckpt", step=7, epoch=2, metrics=metrics, exact=True, kind="weights", note=["x", None])
    summary = catalog.read_summary(tmp_path / "a.ckpt")
    assert (summary.format, summary.step, summary.epoch) == (1, 7, 2)
    assert math.isnan(summary.metrics.pop("nan"))
    assert summary.metrics == {"loss": 0.5, "inf": math.inf, "minus": -math.inf}
    assert (summary.exact, summary.kind, summary.contents) == (True, "weights", ("state_dict", "epoch"))
    assert summary.values["note"] == ["x", None]
    assert abs(summary.saved_at - os.stat(tmp_path / "a.ckpt").st_mtime) < 60


def test_a_summary_longer_than_one_block_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", metrics={f"metric {n}": float(n) for n in range(20_000)})
    assert catalog.read_summary(tmp_path / "a.ckpt").metrics["metric 19999"] == 19_999


def test_a_folder_of_good_broken_foreign_and_temporary_files(tmp_path: Path) -> None:
    save(tmp_path / "good.ckpt", step=3, epoch=1, metrics={"loss": 0.5}, exact=True, kind="full")
    data = (tmp_path / "good.ckpt").read_bytes()
    save(tmp_path / "newer.ckpt", step=4)
    os.link(tmp_path / "newer.ckpt", tmp_path / "linked.ckpt")
    torch.save({"w": torch.ones(3)}, tmp_path / "torch.ckpt")
    foreign = (tmp_path / "torch.ckpt").read_bytes()
    torch.save({"w": torch.ones(3)}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.ckpt").write_bytes(data[:-1])
    (tmp_path / "cut foreign.ckpt").write_bytes(foreign[:-1])
    (tmp_path / "flipped.ckpt").write_bytes(data.replace(b'{"format"', b'{"f0rmat"'))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "dangling.ckpt").symlink_to("nowhere")
    (tmp_path / "directory.ckpt").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".a.ckpt.1.00000000.tmp").write_bytes(data)
    for number, name in enumerate(sorted(os.listdir(tmp_path))):
        os.utime(tmp_path / name, (1000 + number,) * 2, follow_symlinks=False)

    entries = catalog.scan(tmp_path)
    assert [os.path.basename(entry.path) for entry in entries[:3]] == [
        "newer.ckpt",
        "linked.ckpt",
        "good.ckpt",
    ]
    by_name = {os.path.basename(entry.path): entry for entry in entries}
    assert {name: (entry.whole, entry.foreign, entry.reason) for name, entry in by_name.items()} == {
        "good.ckpt": (True, False, None),
        "newer.ckpt": (True, False, None),
        "linked.ckpt": (True, False, None),
        "torch.ckpt": (True, True, None),
        "legacy.ckpt": (False, True, "only loading it shows whether it is whole"),
        "cut.ckpt": (False, False, "it does not end with a zip directory"),
        "cut foreign.ckpt": (False, True, "it does not end with a zip directory"),
        "flipped.ckpt": (False, False, "its summary has a wrong checksum"),
        "empty.ckpt": (False, False, "it is not a checkpoint"),
        "text.ckpt": (False, False, "it is not a checkpoint"),
        "dangling.ckpt": (False, False, "it is a link to a file that does not exist"),
    }
    good = by_name["good.ckpt"]
    assert (good.step, good.epoch, good.metrics, good.exact, good.kind) == (3, 1, {"loss": 0.5}, True, "full")
    assert good.size_bytes == len(data)
    rest = [entry.saved_at for entry in entries[3:]]
    assert rest == sorted(rest, reverse=True)


def test_below_and_not_below(tmp_path: Path) -> None:
    save(tmp_path / "version_0" / "checkpoints" / "a.ckpt", step=1)
    save(tmp_path / "b.ckpt", step=2)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [entry.step for entry in catalog.scan(tmp_path)] == [2]
    assert [entry.step for entry in catalog.scan(tmp_path, recursive=True)] == [2, 1]


def test_nothing_there_and_nothing_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalog.scan(tmp_path) == []
    with pytest.raises(CheckpointNotFound) as missing:
        catalog.scan(tmp_path / "nowhere")
    assert str(missing.value) == f"There is no directory {tmp_path}/nowhere."
    with pytest.raises(CheckpointNotFound) as missing:
        catalog.read_summary(tmp_path / "a.ckpt")
    assert str(missing.value) == f"There is no checkpoint {tmp_path}/a.ckpt."
    (tmp_path / "a.ckpt").write_text("hello")
    with pytest.raises(CheckpointIncomplete) as broken:
        catalog.read_summary(tmp_path / "a.ckpt")
    assert str(broken.value) == "a.ckpt is not a whole checkpoint: it does not end with a zip directory."

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError) as refused:
        catalog.scan(tmp_path)
    assert str(refused.value) == (
        f"Could not read the directory {tmp_path}: Permission denied. Check the permissions of the directory."
    )


def test_names_of_temporary_files_are_recognised(tmp_path: Path) -> None:
    with commit.replacing(str(tmp_path / "a.b.ckpt")) as file:
        assert commit.is_temporary(os.path.basename(file.temporary))
    for name in ("a.ckpt", ".a.ckpt", "a.ckpt.1.00000000.tmp", ".a.ckpt.1.00.tmp", ".tmp"):
        assert not commit.is_temporary(name)


def test_an_entry_has_all_that_the_saver_said(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", step=7, note=["x", None])
    (entry,) = catalog.scan(tmp_path)
    assert (entry.step, entry.values["note"], entry.contents) == (7, ["x", None], ("state_dict", "epoch"))
    torch.save({"w": 1}, tmp_path / "a.ckpt")
    (entry,) = catalog.scan(tmp_path)
    assert (entry.values, entry.contents) == ({}, ())


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's count of bytes read")
def test_only_the_tails_are_read(tmp_path: Path) -> None:
    for number in range(4):
        payload = {"state_dict": {"w": torch.ones(2_000_000)}}
        CheckpointEngine().save(payload, tmp_path / f"{number}.ckpt", summary={"step": number})
    catalog.scan(tmp_path)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    assert [entry.step for entry in catalog.scan(tmp_path)] == [3, 2, 1, 0]
    assert bytes_read() - before < 500_000  # of 32 million
