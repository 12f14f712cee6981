"""SIGKILL at every named point of a save: the old file or the new one, whole, and never anything else."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import holdfast.checkpoint
from holdfast.checkpoint import catalog, commit
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load

# Children are forked from one process that has torch imported already and has done nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "holdfast.checkpoint.engine"])


def save_twice(folder: Path, point: str | None) -> None:
    """What a child does: a new file with a second name, then a file over an old one."""
    if point is not None:
        os.environ["HOLDFAST_CRASH_AT"] = point
    os.environ["TMPDIR"] = str(folder / "not-there")
    torch.set_num_threads(1)
    state = {"number": 2, "large": torch.full((3_000_000,), 2.0), "small": [torch.ones(9) for _ in range(50)]}
    CheckpointEngine().save(state, folder / "new" / "epoch=2.ckpt", names=[folder / "last.ckpt"])
    CheckpointEngine().save(state, folder / "epoch=1.ckpt")


def named_points() -> list[str]:
    """Every crash_point in the source: a new one is tested without being listed here."""
    folder = Path(holdfast.checkpoint.__path__[0])
    text = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    return sorted(set(re.findall(r'crash_point\("([a-z-]+)"\)', text)))


def run_child(folder: Path, point: str | None) -> int | None:
    child = PROCESSES.Process(target=save_twice, args=(folder, point))
    child.start()
    child.join()
    return child.exitcode


@pytest.fixture
def run(tmp_path: Path) -> Path:
    state = {"number": 1, "large": torch.zeros(10)}
    CheckpointEngine().save(state, tmp_path / "epoch=1.ckpt", names=[tmp_path / "last.ckpt"])
    return tmp_path


def test_the_points_are_those_of_a_save() -> None:
    assert set(named_points()) >= {
        "temp-created",
        "writing",
        "written",
        "synced",
        "renamed",
        "directory-synced",
    }


@pytest.mark.parametrize("point", named_points())
def test_killed_at(point: str, run: Path) -> None:
    assert run_child(run, point) == -signal.SIGKILL
    entries = catalog.scan(run, recursive=True)
    assert all(entry.whole for entry in entries)
    numbers = {os.path.relpath(entry.path, run): load(entry.path)["number"] for entry in entries}
    assert numbers["epoch=1.ckpt"] == 1  # killed in the first of the child's two saves
    assert set(numbers) <= {"epoch=1.ckpt", "last.ckpt", "new/epoch=2.ckpt"}
    assert numbers.get("new/epoch=2.ckpt", 2) == 2
    assert numbers["last.ckpt"] in ((1, 2) if "new/epoch=2.ckpt" in numbers else (1,))

    for folder in (run, run / "new"):
        commit.remove_stray_temp_files(folder)
    left = {os.path.relpath(os.path.join(at, name), run) for at, _, names in os.walk(run) for name in names}
    assert left == set(numbers)
    assert not any(commit.is_temporary(name) for name in left)

    assert run_child(run, None) == 0
    assert [load(run / name)["number"] for name in ("epoch=1.ckpt", "last.ckpt", "new/epoch=2.ckpt")] == [
        2,
        2,
        2,
    ]
