"""SIGKILL at every named point of a save: the old file or the new one, whole, and never anything else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast.checkpoint
from holdfast.checkpoint import catalog, commit
from holdfast.checkpoint.load import load

CHILD = """
import sys, torch
from holdfast.checkpoint.engine import CheckpointEngine
folder = sys.argv[1]
state = {"number": 2, "large": torch.full((3_000_000,), 2.0), "small": [torch.full((9,), 2.0) for _ in range(50)]}
CheckpointEngine().save(state, f"{folder}/new/epoch=2.ckpt", names=[f"{folder}/last.ckpt"])
CheckpointEngine().save(state, f"{folder}/epoch=1.ckpt")
"""


def named_points() -> list[str]:
    """Every crash_point in the source: a new one is tested without being listed here."""
    folder = Path(holdfast.checkpoint.__path__[0])
    text = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    return sorted(set(re.findall(r'crash_point\("([a-z-]+)"\)', text)))


def run_child(folder: Path, point: str | None) -> int:
    environment = {**os.environ, "TMPDIR": str(folder / "not-there"), "OMP_NUM_THREADS": "1"}
    environment.pop("HOLDFAST_CRASH_AT", None)
    if point is not None:
        environment["HOLDFAST_CRASH_AT"] = point
    return subprocess.run([sys.executable, "-c", CHILD, str(folder)], env=environment, check=False).returncode


@pytest.fixture
def run(tmp_path: Path) -> Path:
    import torch

    from holdfast.checkpoint.engine import CheckpointEngine

    state = {"number": 1, "large": torch.zeros(10)}
    CheckpointEngine().save(state, tmp_path / "epoch=1.ckpt", names=[tmp_path / "last.ckpt"])
    return tmp_path


def test_the_points_are_those_of_a_save() -> None:
    assert set(named_points()) >= {"temp-created", "writing", "written", "synced", "renamed", "directory-synced"}


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
        catalog.remove_stray_temp_files(folder)
    left = {os.path.relpath(os.path.join(at, name), run) for at, _, names in os.walk(run) for name in names}
    assert left == set(numbers)
    assert not any(commit.is_temporary(name) for name in left)

    assert run_child(run, None) == 0
    assert [load(run / name)["number"] for name in ("epoch=1.ckpt", "last.ckpt", "new/epoch=2.ckpt")] == [2, 2, 2]
