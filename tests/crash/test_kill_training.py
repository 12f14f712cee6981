"""A training process killed at any instant and started again by the same command loses next to nothing.

One run directory goes through dozens of SIGKILLs, with the default place of temporary files now on another file
system than the run's and now on the same one. After each kill every file under a final name is read and checked;
whatever had been said to be saved is there; each start says where it goes on; and the run that ends at last is
bit for bit the one that was never killed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from child import BATCHES, EPOCHS, SAVE_EVERY_N_STEPS
from lives import Life

from holdfast.checkpoint.load import load

KILLS = 60
STEPS = EPOCHS * BATCHES

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on a file system in memory."""
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK):
        pytest.skip("there is no /dev/shm here")
    place = Path(tempfile.mkdtemp(dir=shared_memory))
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never killed, and is the real command."""
    root = tmp_path_factory.mktemp("reference") / "run"
    life = Life(root, "child", command=True).end()
    assert life.code == 0 and life.done, life.log
    return root


def checkpoints(root: Path) -> list[Path]:
    return sorted(root.rglob("*.ckpt"))


def assert_all_verified(root: Path) -> None:
    """Every file under a final name is whole, and every byte of it is what was written."""
    for path in checkpoints(root):
        payload = load(path)  # raises, naming the file, for a torn or changed one
        assert payload["global_step"] > 0


def last_saved(life: Life) -> int:
    """The newest step that a line of this life had said is saved."""
    return max((int(step) for step in re.findall(r"^saved .*  step (\d+)  ", life.log, re.M)), default=0)


def kill_and_go_on(root: Path, places: list[Path], kills: int, seed: int, **checkpoint: object) -> None:
    """Start, kill and check ``kills`` times, then let it end; what may be lost depends on how it saves."""
    chance = random.Random(seed)
    lost_at_most = SAVE_EVERY_N_STEPS * (2 if checkpoint.get("background", True) else 1)
    last_step = saved_step = 0
    for number in range(kills + 1):
        had_checkpoint = bool(checkpoints(root)) if root.exists() else False
        environment = {"TMPDIR": str(places[number % len(places)])}
        life = Life(root, "child", environment=environment, checkpoint=checkpoint)
        if number < kills:
            steps = chance.choice([0, *range(1, 15)])  # 0: while it starts, and reads what the last one left
            for _ in range(steps):
                life.hear("step")
            time.sleep(
                chance.uniform(0, 0.02 if steps else 0.2)
            )  # the instant of the kill, no wait for anything
            life.kill()
            assert life.code == -signal.SIGKILL, "the run is long enough to be killed so often"
        else:
            life.end()
        assert_all_verified(root)
        if not life.said("started"):
            continue
        assert (life.resumed_from is not None) == had_checkpoint
        if life.resumed_from is not None:
            assert Path(life.resumed_from).name in life.log, "the log says which file the run goes on from"
        assert saved_step <= life.first_step, "what was said to be saved is there"
        assert last_step - lost_at_most <= life.first_step <= last_step
        last_step, saved_step = life.last_step, max(saved_step, last_saved(life))
    assert (life.code, life.done, life.last_step, saved_step) == (0, True, STEPS, STEPS), life.log


def test_sixty_kills_lose_nothing(tmp_path: Path, reference: Path, memory: Path) -> None:
    """A save goes on while the next interval is trained: a kill costs an interval and that save, no more."""
    root, same_disk = tmp_path / "killed", tmp_path / "temporary"
    same_disk.mkdir()
    kill_and_go_on(root, [memory, same_disk], KILLS, seed=20)
    assert_same_end(reference, root)


def test_kills_of_a_run_in_memory_that_saves_in_the_foreground(
    tmp_path: Path, reference: Path, memory: Path
) -> None:
    """A save has ended before training goes on: a kill costs one interval. The file system is another kind."""
    root = memory / "killed"
    kill_and_go_on(root, [tmp_path], 12, seed=21, background=False)
    assert_same_end(reference, root)


@pytest.mark.parametrize("background", [True, False])
def test_a_clock_that_is_set_back_makes_no_new_file_look_old(tmp_path: Path, background: bool) -> None:
    """What a start goes on from is what was saved last, by whatever clock."""
    root, how = tmp_path / "run", {"background": background}
    last_step = 0
    for fast_s in (7200.0, 3600.0, 0.0, -3600.0):
        life = Life(root, "child", checkpoint=how, fast_s=fast_s)
        for _ in range(23):
            life.hear("step")
        life.kill()
        assert last_step - 2 * SAVE_EVERY_N_STEPS <= life.first_step <= last_step
        last_step = life.last_step


def test_killed_in_its_first_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """There is no checkpoint to go on from, so the next start writes elsewhere, and tidies up all the same."""
    root = tmp_path / "run"
    life = Life(root, "child", environment={"HOLDFAST_CRASH_AT": "synced"}).end()
    assert life.code == -signal.SIGKILL
    assert SAVE_EVERY_N_STEPS <= life.last_step <= 2 * SAVE_EVERY_N_STEPS and checkpoints(root) == []
    assert list(root.rglob("*.tmp")) != []
    life = Life(root, "child").hear("step").kill()
    assert life.resumed_from is None
    assert list(root.rglob("*.tmp")) == []


def version(root: Path) -> Path:
    """The one version directory that has checkpoints; a start killed before its first save leaves another."""
    (directory,) = {path.parent.parent for path in checkpoints(root)}
    return directory


def assert_same_end(reference: Path, root: Path) -> None:
    """Weights, metrics and the set of files kept are those of the run that was never killed."""
    weights, expected = torch.load(root / "final.pt"), torch.load(reference / "final.pt")
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not weights[name].equal(expected[name])] == []
    mine, theirs = version(root), version(reference)
    assert [path.name for path in checkpoints(mine)] == [path.name for path in checkpoints(theirs)]
    assert (mine / "metrics.csv").read_text() == (theirs / "metrics.csv").read_text()
    assert list(root.rglob("*.tmp")) == [], "what a kill left half written is cleaned up by a later start"
