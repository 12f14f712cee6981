"""One content under several names: no space taken, and no way for one name to change another."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import commit
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.errors import StorageError


def value(path: Path) -> float:
    return float(load(path)["w"][0])


def save(number: float, path: Path, *names: Path) -> tuple[str, ...]:
    return CheckpointEngine().save({"w": torch.full((1000,), number)}, path, names=names).links


def refuse(monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
    """Stand for a file system that cannot reflink, hard-link or symlink."""

    def no(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    for call in calls:
        monkeypatch.setattr(fcntl if call == "ioctl" else os, call, no)


def test_a_hard_link_where_reflinks_are_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "ioctl")
    best, last = tmp_path / "best.ckpt", tmp_path / "sub" / "last.ckpt"
    assert save(1, best, last) == ("hard link",)
    assert best.samefile(last)
    assert best.stat().st_mode & 0o222 == 0  # whoever opens one of them to write into it is stopped
    assert value(last) == 1
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "sub"] and os.listdir(tmp_path / "sub") == [
        "last.ckpt"
    ]


def test_a_second_name_lets_nobody_read_who_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "ioctl")
    before = os.umask(0o077)
    try:
        assert save(1, tmp_path / "best.ckpt", tmp_path / "last.ckpt") == ("hard link",)
    finally:
        os.umask(before)
    assert (tmp_path / "best.ckpt").stat().st_mode & 0o777 == 0o400


def test_saving_over_one_name_leaves_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "ioctl")
    best, last, third = tmp_path / "best.ckpt", tmp_path / "last.ckpt", tmp_path / "third.ckpt"
    save(1, best, last)
    save(2, last)
    assert (value(best), value(last)) == (1, 2)
    save(3, third, last)
    assert (value(best), value(last), value(third)) == (1, 3, 3)
    third.unlink()
    assert value(last) == 3
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]


def test_the_same_two_names_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rename() onto the same inode does nothing and leaves the old name behind."""
    refuse(monkeypatch, "ioctl")
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    for number in range(3):
        save(number, best, last, best, last)
        assert (value(best), value(last)) == (number, number)
        assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]


def test_a_relative_symlink_where_hard_links_are_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "ioctl", "link")
    best, last = tmp_path / "run" / "best.ckpt", tmp_path / "run" / "last.ckpt"
    assert save(1, best, last) == ("symlink",)
    assert os.readlink(last) == "best.ckpt"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert value(tmp_path / "moved" / "last.ckpt") == 1
    save(2, tmp_path / "moved" / "last.ckpt")
    assert value(tmp_path / "moved" / "best.ckpt") == 1


def test_a_symlink_that_another_run_tidied_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "ioctl", "link")
    removed: list[str] = []

    def tidy_once(point: str) -> None:
        if point == "link-made" and not removed:
            removed.extend(commit.remove_stray_temp_files(tmp_path))

    monkeypatch.setattr(commit, "crash_point", tidy_once)
    assert save(1, tmp_path / "best.ckpt", tmp_path / "last.ckpt") == ("symlink",)
    assert len(removed) == 1
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]


def test_a_copy_where_nothing_else_is_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "ioctl", "link", "symlink")
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    assert save(1, best, last) == ("copy",)
    assert last.read_bytes() == best.read_bytes() and not best.samefile(last)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]


def test_whatever_this_file_system_supports(tmp_path: Path) -> None:
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    assert save(1, best, last)[0] in ("reflink", "hard link")
    save(2, best)
    assert (value(best), value(last)) == (2, 1)


def test_a_name_that_cannot_be_made_is_told_and_the_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(StorageError) as caught:
        save(1, tmp_path / "best.ckpt", tmp_path / "last.ckpt")
    assert str(caught.value) == (
        f"Could not link {tmp_path}/last.ckpt: Is a directory. Choose another name: a directory has this one."
    )
    assert value(tmp_path / "best.ckpt") == 1
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]


def test_the_report_says_what_was_done(tmp_path: Path) -> None:
    report = CheckpointEngine().save(
        {"w": torch.ones(1), "f": print},
        tmp_path / "a.ckpt",
        names=[str(tmp_path / "b.ckpt")],
    )
    assert value(tmp_path / "b.ckpt") == 1
    assert report.path == str(tmp_path / "a.ckpt") and report.names == (str(tmp_path / "b.ckpt"),)
    assert report.size_bytes == (tmp_path / "a.ckpt").stat().st_size
    assert 0 < report.blocked_s <= report.durable_s
    assert report.omissions == [("f", "a function (print) cannot be stored")]
