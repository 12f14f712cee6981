"""A training process killed at any instant and started again by the same command loses next to nothing.

One run directory goes through twenty SIGKILLs, with the default place of temporary files on another file
system than the run's. After each kill every file under a final name is read and checked; each start says
where it goes on; and the run that ends at last is bit for bit the one that was never killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from holdfast.checkpoint.load import load

CHILD = Path(__file__).with_name("child.py")
KILLS = 20
SAVE_EVERY_N_STEPS = 5
STEPS = 12 * 40

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@dataclass
class Start:
    """What one start of the child said before it ended or was killed."""

    lines: list[list[str]] = field(default_factory=list)
    log: str = ""

    @property
    def resumed_from(self) -> str | None:
        said = next(line for line in self.lines if line[0] == "started")
        return None if said[2] == "None" else said[2]

    @property
    def first_step(self) -> int:
        return int(next(line for line in self.lines if line[0] == "started")[1])

    @property
    def last_step(self) -> int:
        """The last step whose hooks had run."""
        return max((int(line[1]) for line in self.lines if line[0] == "step"), default=self.first_step)

    @property
    def done(self) -> bool:
        return self.lines[-1][0] == "done"


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path | None]:
    """A directory on another file system than the run's; None where the machine offers no second one."""
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        yield None
        return
    place = Path(tempfile.mkdtemp(dir=shared_memory))
    yield place
    shutil.rmtree(place)


def start(root: Path, temporary: Path | None, kill: tuple[int, float] | None = None) -> Start:
    """Run the child; with ``kill`` = (steps, seconds), SIGKILL it that long after it said so many steps."""
    environment = dict(os.environ) if temporary is None else {**os.environ, "TMPDIR": str(temporary)}
    said = Start()
    with (root.parent / f"{root.name}.log").open("w+") as log:
        command = [sys.executable, str(CHILD), str(root)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert child.stdout is not None
        with child:
            for line in child.stdout:
                if line.startswith(("started ", "step ", "done ")):
                    said.lines.append(line.split())
                if kill is not None and sum(words[0] == "step" for words in said.lines) == kill[0]:
                    time.sleep(kill[1])  # the instant of the kill, not a wait for anything
                    child.kill()
                    kill = None
        log.seek(0)
        said.log = log.read()
    assert child.returncode in (0, -signal.SIGKILL), said.log
    return said


def checkpoints(root: Path) -> list[Path]:
    return sorted(root.rglob("*.ckpt"))


def assert_all_verified(root: Path) -> None:
    """Every file under a final name is whole, and every byte of it is what was written."""
    for path in checkpoints(root):
        payload = load(path)  # raises, naming the file, for a torn or changed one
        assert payload["global_step"] > 0


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """The run that is never killed."""
    root = tmp_path / "reference"
    root.mkdir()
    assert start(root, None).done
    return root


def test_twenty_kills_lose_nothing(tmp_path: Path, reference: Path, other_file_system: Path | None) -> None:
    root = tmp_path / "killed"
    root.mkdir()
    chance = random.Random(20)
    last_step = 0
    for _ in range(KILLS):
        had_checkpoint = bool(checkpoints(root))
        said = start(root, other_file_system, (chance.randint(1, 20), chance.uniform(0, 0.02)))
        assert not said.done, "the run is long enough to be killed so often"
        assert_start_goes_on(said, had_checkpoint, last_step)
        assert_all_verified(root)
        last_step = said.last_step
    finished = start(root, other_file_system)
    assert_start_goes_on(finished, True, last_step)
    assert finished.done and finished.last_step == STEPS
    assert_all_verified(root)
    assert_same_end(reference, root)


def test_killed_in_its_first_save_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no checkpoint to go on from, so the next start writes elsewhere, and tidies up all the same."""
    root = tmp_path / "run"
    root.mkdir()
    monkeypatch.setenv("HOLDFAST_CRASH_AT", "synced")
    said = start(root, None)
    assert said.last_step == SAVE_EVERY_N_STEPS and checkpoints(root) == []
    assert len(list(root.rglob("*.tmp"))) == 1
    monkeypatch.delenv("HOLDFAST_CRASH_AT")
    said = start(root, None, (1, 0.0))
    assert said.resumed_from is None
    assert list(root.rglob("*.tmp")) == []


def assert_start_goes_on(said: Start, had_checkpoint: bool, last_step: int) -> None:
    """It resumed if there was anything to resume from, said from where, and lost one interval at most."""
    assert (said.resumed_from is not None) == had_checkpoint
    if said.resumed_from is not None:
        assert Path(said.resumed_from).name in said.log, "the log says which file the run goes on from"
    assert last_step - SAVE_EVERY_N_STEPS <= said.first_step <= last_step


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
