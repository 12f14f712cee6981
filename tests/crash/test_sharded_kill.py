"""Ranks that are killed, or whose disk is full, in the middle of a sharded save: the old one, or the new one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

import sharded_jobs

from holdfast.checkpoint import catalog, commit, directories, sharded
from tests.distributed.ranks import run_ranks, start_ranks


def save_alone(path: Path, add: float = 0.0) -> None:
    rest, tensors = sharded.split(sharded_jobs.plain_payload(add))
    sharded.save(path, rest, tensors, rank=0, world_size=1)


def value_of(path: Path) -> int:
    """Which save it is: 0 or 1."""
    sharded.verify(path)
    found = sharded.load(path)["state_dict"]["even"] - sharded_jobs.full("even")
    return round(found.mean().item())


SAVES = [
    (0, "directory-begun", 0),
    (0, "shard-writing", 0),
    (1, "shard-writing", 0),
    (1, "shard-synced", 0),
    (0, "manifest-written", 0),
    (0, "directory-renamed", 1),
    (0, "directory-in-place", 1),
    (0, "name-filled", 1),
]
CHANGES: list[tuple[str, str, int | str | None]] = [
    ("remove", "nameless", None),
    ("move aside", "moved-aside", 0),
    ("move aside", "directory-renamed", 1),
    ("move aside", "nameless", 1),
    ("file over it", "synced", 0),
    ("file over it", "renamed", "file"),
]


def test_every_point_is_tried() -> None:
    source = "".join(path.read_text() for path in Path(directories.__file__).parent.glob("*.py"))
    points = set(re.findall(r'sharded_point\("([a-z-]+)"\)', source))
    assert points == {point for _, point, _ in (*SAVES, *CHANGES)} - {"synced", "renamed"}


@pytest.mark.parametrize(("killed", "point", "value"), SAVES)
def test_a_rank_that_is_killed(tmp_path: Path, killed: int, point: str, value: int) -> None:
    path, last = tmp_path / "a.ckpt", tmp_path / "last.ckpt"
    save_alone(path)
    ended = start_ranks(sharded_jobs.killed_while_saving, str(path), killed, point, (str(last),)).wait()
    assert ended[killed].code == -9
    assert (ended[1 - killed].error, ended[1 - killed].value) == ("", "RuntimeError"), ended[
        1 - killed
    ].output
    assert value_of(path) == value
    assert [one.path for one in catalog.scan(tmp_path)] == [str(path)]
    save_alone(tmp_path / "b.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt"]  # and nothing of the killed one is left


def test_a_rank_that_is_killed_in_a_first_save_leaves_nothing_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    ended = start_ranks(sharded_jobs.killed_while_saving, str(path), 1, "shard-writing").wait()
    assert (ended[1].code, ended[0].value) == (-9, "RuntimeError")
    assert catalog.scan(tmp_path, recursive=True) == []
    assert not sharded.is_sharded(path)
    assert os.listdir(tmp_path) == []  # rank 0 lives, and has tidied up


@pytest.mark.parametrize("full_rank", [0, 1])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_is_full_is_every_ranks_error(tmp_path: Path, full_rank: int, call: str) -> None:
    path = tmp_path / "a.ckpt"
    save_alone(path)
    found = run_ranks(sharded_jobs.save_with_a_full_disk, str(path), full_rank, call, ranks=2)
    assert found[0] == found[1]
    kind, text, code = found[0]
    assert (kind, code) == ("StorageError", 28)
    assert re.fullmatch(
        rf"Could not write rank {full_rank}'s part of {re.escape(str(path))}: No space left on device. What was there before is "
        r"untouched. [\d,]+ bytes are needed, [\d,]+ bytes are free: make room, or save somewhere else.",
        text,
    ), text
    assert value_of(path) == 0
    assert os.listdir(tmp_path) == ["a.ckpt"]


def crash(act: str, path: str, point: str) -> None:
    os.environ["HOLDFAST_CRASH_AT"] = point
    if act == "remove":
        sharded.remove(path)
    elif act == "move aside":
        directories._exchange = lambda *_: False  # type: ignore[assignment]
        save_alone(Path(path), 1.0)
    elif act == "file over it":
        from holdfast.checkpoint.engine import CheckpointEngine

        CheckpointEngine().save({"w": 1}, path)


@pytest.mark.parametrize(("act", "point", "there"), CHANGES)
def test_a_process_that_is_killed_while_names_change_over(
    tmp_path: Path, act: str, point: str, there: int | str | None
) -> None:
    path = tmp_path / "a.ckpt"
    save_alone(path)
    (ended,) = start_ranks(crash, act, str(path), point, ranks=1).wait()
    assert ended.code == -9, ended.error
    if there is None:
        assert catalog.scan(tmp_path) == []
    else:
        assert [(one.path, one.whole) for one in catalog.scan(tmp_path)] == [(str(path), True)]
    if isinstance(there, int):
        assert value_of(path) == there
    commit.remove_stray_temp_files(tmp_path)
    save_alone(path, 1.0)
    assert value_of(path) == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]
