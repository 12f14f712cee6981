"""SIGKILL at every named point of a save: the old file or the new one, whole, and never anything else."""

from __future__ import annotations

import itertools
import re
import signal
from pathlib import Path

import pytest
from lives import Life
from saving_child import inventory, state

import holdfast
from holdfast.checkpoint import commit
from holdfast.checkpoint.engine import CheckpointEngine

SOURCE = Path(holdfast.__path__[0])


def named_points() -> list[str]:
    """Every crash_point in the source: a new one is tested without being listed here."""
    text = "".join(path.read_text() for path in sorted(SOURCE.rglob("*.py")))
    return sorted(set(re.findall(r'crash_point\("([a-z-]+)"\)', text)))


def test_the_points_are_those_of_a_save() -> None:
    names = {"temp-created", "writing", "written", "synced", "renamed", "directory-synced"}
    assert set(named_points()) >= names | {"link-made", "link-renamed", "link-synced"}


def test_every_point_has_a_name_that_can_be_found() -> None:
    for path in SOURCE.rglob("*.py"):
        calls = re.findall(r"(?<!def )\bcrash_point\((.*?)\)", path.read_text())
        assert [call for call in calls if not re.fullmatch(r'"[a-z-]+"', call)] == [], path


@pytest.mark.parametrize("point", named_points())
def test_killed_at(point: str, tmp_path: Path) -> None:
    """In the foreground and in the background, in a first save and in one over an older file."""
    ends = []
    for number, (background, over) in enumerate(itertools.product([False, True], repeat=2)):
        root = tmp_path / str(number)
        root.mkdir()
        CheckpointEngine().save(state(1), root / "epoch=1.ckpt", names=[root / "last.ckpt"])
        life = Life(root, "saving_child", do="killed", point=point, background=background, over=over).end()
        ends.append(life.code)
        assert life.code in (0, -signal.SIGKILL), life.log
        assert_old_or_new(root, over, done=life.code == 0)
        again = Life(root, "saving_child", do="killed", point="none", background=background, over=over).end()
        assert again.code == 0, again.log
        assert_old_or_new(root, over, done=True)
    assert -signal.SIGKILL in ends, "no save comes by this point: add one that does"


def assert_old_or_new(root: Path, over: bool, *, done: bool) -> None:
    """Every name has the old content or the new one, the second name not the new one before the first."""
    left = inventory(root)  # reads all that is under a final name, every byte of it
    name = "epoch=1.ckpt" if over else "new/epoch=2.ckpt"
    numbers = {path: number for path, number in left.items() if number is not None}
    assert set(numbers) <= {"epoch=1.ckpt", "last.ckpt", "new/epoch=2.ckpt"}
    assert numbers["epoch=1.ckpt"] in ((1, 2) if over else (1,))
    assert numbers.get(name, 1) in (1, 2)
    assert numbers["last.ckpt"] in ((1, 2) if numbers.get(name) == 2 else (1,))
    if done:
        assert (numbers[name], numbers["last.ckpt"]) == (2, 2)
        assert left == numbers, "what a kill had left half written is gone"
    else:
        assert len(left) - len(numbers) <= 1
        for folder in (root, root / "new"):
            commit.remove_stray_temp_files(folder)
        assert inventory(root) == numbers
