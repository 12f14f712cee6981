"""Whose a file is, where one may be put, and which may be deleted."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from holdfast.callbacks import lineage
from holdfast.callbacks.lineage import Claims
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.retention import Found


def save(path: Path, step: int, run: str, score: float | None = None, *names: Path) -> str:
    extra = lineage.summary_extra("key", run=run, names=[str(path), *map(str, names)], score=score)
    CheckpointEngine().save({"step": step}, path, names=names, summary={"step": step, **extra})
    return str(path)


def test_names_that_a_kill_came_before_in_another_directory(tmp_path: Path) -> None:
    """Two callbacks share one save; of the second one's names a kill left the older file, or none."""
    mine, theirs = tmp_path / "a" / "epoch=1.ckpt", tmp_path / "b" / "epoch=1.ckpt"
    last = save(tmp_path / "b" / "last.ckpt", 3, "q")
    extra = {
        **lineage.summary_extra("key", run="r", names=[str(mine)], score=None),
        **lineage.summary_extra("key", run="q", names=[str(theirs), last], score=2.0),
    }
    CheckpointEngine().save({}, mine, summary={"step": 6, **extra})
    directory = str(tmp_path / "b")
    assert lineage.give_missing_names(str(mine), "q", 6, directory) == [str(theirs), last]
    assert lineage.describe(str(theirs), "q") == Found(str(theirs), 6, "q", 2.0)
    assert lineage.describe(last, "q") == Found(last, 6, "q", None)
    assert lineage.give_missing_names(str(mine), "q", 6, directory) == []
    assert lineage.give_missing_names(str(mine), "r", 6, str(tmp_path / "a")) == []


def test_two_owners_of_files_with_one_name_in_two_directories(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "epoch=1.ckpt", tmp_path / "b" / "epoch=1.ckpt"
    extra = {
        **lineage.summary_extra("key", run="r", names=[str(one)], score=1.0),
        **lineage.summary_extra("key", run="q", names=[str(other)], score=2.0),
    }
    CheckpointEngine().save({}, one, names=[other], summary={"step": 3, **extra})
    assert lineage.describe(str(other), "q") == Found(str(other), 3, "q", 2.0)
    assert lineage.describe(str(one), "r") == Found(str(one), 3, "r", 1.0)


@pytest.mark.parametrize("score", [0.1, math.inf, -math.inf, math.nan, None])
def test_a_file_says_whose_it_is_and_what_it_was_ranked_on(tmp_path: Path, score: float | None) -> None:
    path = save(tmp_path / "a.ckpt", 3, "r", score, tmp_path / "last.ckpt")
    found = lineage.describe(path)
    assert repr(found) == repr(Found(path, 3, "r", score))
    assert lineage.describe(str(tmp_path / "last.ckpt")) == Found(str(tmp_path / "last.ckpt"), 3, "r", None)


def test_a_file_of_two_callbacks_belongs_to_each_under_its_own_names(tmp_path: Path) -> None:
    one, other = tmp_path / "one.ckpt", tmp_path / "other.ckpt"
    extra = {
        **lineage.summary_extra("key", run="r", names=[str(one)], score=1.0),
        **lineage.summary_extra("key", run="q", names=[str(other)], score=2.0),
    }
    CheckpointEngine().save({}, one, names=[other], summary={"step": 3, **extra})
    assert lineage.describe(str(one)) == Found(str(one), 3, "r", 1.0)
    assert lineage.describe(str(other)) == Found(str(other), 3, "q", 2.0)


def test_a_renamed_copy_belongs_to_nobody(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 3, "r", 0.1)
    os.rename(path, tmp_path / "keep-me.ckpt")
    assert lineage.describe(str(tmp_path / "keep-me.ckpt")) == Found(str(tmp_path / "keep-me.ckpt"), 3)


def test_files_that_are_no_checkpoints_are_nobodys(tmp_path: Path) -> None:
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 and no more")
    assert lineage.describe(str(tmp_path / "torn.ckpt")) is None
    assert lineage.describe(str(tmp_path / "missing.ckpt")) is None
    assert lineage.describe_all(str(tmp_path)) == {}
    assert lineage.describe_all(str(tmp_path / "missing")) == {}


def test_where_a_save_may_be_put(tmp_path: Path) -> None:
    older = save(tmp_path / "older.ckpt", 3, "r")
    newer = save(tmp_path / "newer.ckpt", 9, "r")
    used = save(tmp_path / "used.ckpt", 9, "r")
    foreign = save(tmp_path / "foreign.ckpt", 9, "q")
    free, reserved = str(tmp_path / "free.ckpt"), str(tmp_path / "reserved.ckpt")
    claims = Claims("r", 6, frozenset({used}), frozenset({reserved}))
    paths = (older, newer, used, foreign, free, reserved)
    assert [claims.allow(path) for path in paths] == [True, True, False, False, True, False]
    assert claims.allow(used, free=[used])
    keeps_all = Claims("r", 6, frozenset({used}), keeps_all=True)
    assert [keeps_all.allow(path) for path in (older, newer)] == [False, True]
    protecting = Claims("r", 6, frozenset({used}), protected=newer)
    assert not protecting.allow(newer)
    assert not protecting.allow(newer, free=[newer])
    assert [claims.allow_last(path, "") for path in paths] == [True, True, False, False, True, False]
    assert claims.allow_last(foreign, foreign)
    assert not Claims(None, 6, frozenset()).allow(older)


def test_where_the_state_that_an_exception_left_may_be_put(tmp_path: Path) -> None:
    def left(name: str, step: int, run: str = "r") -> str:
        path, extra = tmp_path / name, lineage.exception_extra("key", run=run)
        CheckpointEngine().save({"step": step}, path, summary={"step": step, **extra})
        return str(path)

    good, before, ahead = save(tmp_path / "good.ckpt", 9, "r"), left("before.ckpt", 6), left("ahead.ckpt", 7)
    others, free, reserved = (
        left("others.ckpt", 3, "q"),
        str(tmp_path / "free.ckpt"),
        str(tmp_path / "new.ckpt"),
    )
    paths = (good, before, ahead, others, free, reserved)
    claims = Claims("r", 6, frozenset(), frozenset({reserved}))
    assert [claims.allow_on_exception(path) for path in paths] == [False, True, False, False, True, False]
    # A good file of the run takes the place of what an exception left, and of its own future.
    assert [claims.allow(path) for path in paths] == [True, True, False, False, True, False]
    for kept in (
        Claims("r", 6, frozenset(), protected=before),
        Claims("r", 6, frozenset({before})),
        Claims("r", 5, frozenset()),
    ):
        assert not kept.allow_on_exception(before)
        assert not kept.allow(before)
    # Nobody owns it: it is never ranked and never swept up.
    assert lineage.describe(before) == Found(before, 6)


def test_what_is_never_deleted(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    outside = save(tmp_path / "out.ckpt", 3, "r")
    kept = save(inside / "kept.ckpt", 3, "r")
    os.link(kept, inside / "link.ckpt")
    (inside / "directory.ckpt").mkdir()
    (inside / "elsewhere").symlink_to(tmp_path)
    for path in (
        outside,
        inside / ".." / "out.ckpt",
        inside / "elsewhere" / "out.ckpt",
        kept,
        inside / "link.ckpt",
        inside / "directory.ckpt",
        inside / "missing.ckpt",
    ):
        assert not lineage.remove(str(path), inside=str(inside), protected=kept)
    assert lineage.remove(kept, inside=str(inside), protected=None)
    assert sorted(os.listdir(inside)) == ["directory.ckpt", "elsewhere", "link.ckpt"]
    assert os.path.exists(outside)


def test_a_symlink_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = save(tmp_path / "target.ckpt", 3, "r")
    (tmp_path / "last.ckpt").symlink_to("target.ckpt")
    assert lineage.remove(str(tmp_path / "last.ckpt"), inside=str(tmp_path), protected=None)
    assert os.listdir(tmp_path) == [os.path.basename(target)]


def test_a_plugin_deletes_what_it_wrote_a_directory_too(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    outside, gone = tmp_path.parent / "b.ckpt", []
    for path in (tmp_path / "a.ckpt", outside):
        lineage.remove(str(path), inside=str(tmp_path), protected=None, delete=gone.append)
    assert gone == [str(tmp_path / "a.ckpt")]


def test_a_file_that_will_not_go_is_said_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.ckpt", 3, "r")

    def refuse(path: str) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.warns(UserWarning, match="made way") as warned:
        assert not lineage.remove(path, inside=str(tmp_path), protected=None)
    assert str(warned[0].message) == (
        f"{path} should have made way for a newer checkpoint, but: "
        f"[Errno 1] Operation not permitted: '{path}'."
    )
