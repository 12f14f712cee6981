"""The examples do what they say, run as a user runs them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.load import load

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str | Path) -> str:
    """Run an example to its end; returns what it printed to both streams."""
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """The demo's own functions, without running it."""
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    try:
        return runpy.run_path(str(EXAMPLES / "demo.py"), run_name="demo")
    finally:
        sys.path[:] = before


def test_the_demo_proves_what_it_says(tmp_path: Path) -> None:
    """SIGKILL in mid-epoch, the same command again: the same bits as the run that was never stopped."""
    printed = run("demo.py", "--root", tmp_path, "--epochs", "4", "--kills", "2", "--workers", "2")
    assert printed.count("SIGKILL at step") == 2
    assert "PROVEN" in printed
    assert re.search(r"All \d+ tensors are bit-identical", printed)
    assert "The logged metrics are the same" in printed
    weights = [
        torch.load(tmp_path / name / "final.ckpt", weights_only=True)["state_dict"]
        for name in ("uninterrupted", "killed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    hashes = re.findall(r"sha256 of the final weights: ([0-9a-f]{64})", printed)
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]


def test_the_demo_sees_a_single_bit(tmp_path: Path, demo: dict[str, Any]) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    payload = {"state_dict": {"w": torch.ones(2, 2)}, "optimizer_states": [optimizer], "lr_schedulers": []}
    torch.save(payload, tmp_path / "a.ckpt")
    assert demo["compare"](tmp_path / "a.ckpt", tmp_path / "a.ckpt") == (2, [])
    payload["state_dict"]["w"].view(torch.int32)[1, 0] ^= 1
    optimizer["state"][0]["exp_avg"][2] = -0.0  # equal as a number, not as bits
    torch.save(payload, tmp_path / "b.ckpt")
    different = demo["compare"](tmp_path / "a.ckpt", tmp_path / "b.ckpt")[1]
    assert different == ["/optimizer_states/0/state/0/exp_avg", "/state_dict/w"]


def test_the_demo_sees_a_missing_tensor(tmp_path: Path, demo: dict[str, Any]) -> None:
    both: dict[str, Any] = {"optimizer_states": [], "lr_schedulers": []}
    torch.save({**both, "state_dict": {"w": torch.ones(2), "b": torch.ones(1)}}, tmp_path / "a.ckpt")
    torch.save({**both, "state_dict": {"w": torch.ones(2, dtype=torch.float64)}}, tmp_path / "b.ckpt")
    assert demo["compare"](tmp_path / "a.ckpt", tmp_path / "b.ckpt") == (
        2,
        ["/state_dict/b", "/state_dict/w"],
    )


def test_chargpt_learns_keeps_three_and_writes(tmp_path: Path) -> None:
    arguments = ["--quick", "--characters", "60000", "--validate-every", "15", "--sample", "80"]
    printed = run("chargpt.py", "--root", tmp_path, *arguments, "--steps", "60")
    kept = {path.name for path in tmp_path.rglob("step=*-val_loss=*.ckpt")}
    losses = sorted(float(re.search(r"val_loss=([\d.]+)\.ckpt", name)[1]) for name in kept)  # type: ignore[index]
    best, score = re.search(r"best model: (.+) \(val_loss ([\d.]+)\)", printed).groups()  # type: ignore[union-attr]
    assert len(kept) == 3
    assert Path(best).is_file()
    assert losses[0] == pytest.approx(float(score), abs=1e-3)
    assert float(score) < 3.6 < 4.56  # ln 97, what a model that knows nothing scores
    sample = printed.partition("what it writes after 'def ':\n\n")[2]
    assert sample.startswith("def ")
    assert len(sample) >= len("def ") + 80


# -- loops of one's own, killed and started again -----------------------------------------------------------------


class Start:
    """One start of an example that saves into ``root``, until it ends or is killed.

    Args:
        script: The example.
        root: Where it saves.
        crash_at: A point within a save at which the process is killed.
    """

    def __init__(self, script: str, root: Path, crash_at: str = "") -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / script), str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HOLDFAST_CRASH_AT": crash_at, "OMP_NUM_THREADS": "1"},
        )

    def end(self, kill_at: str | None = None) -> int:
        """Read on to the end, or kill it when it says a line that begins so; returns the exit code."""
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self.lines.append(line.rstrip())
                if kill_at is not None and line.startswith(kill_at):
                    self.process.kill()
        return self.process.wait()

    def first_step(self) -> int:
        """Where it went on."""
        return int(next((line.split()[3].rstrip(",") for line in self.lines if "restored" in line), 0))

    def digest(self) -> str:
        (line,) = [line for line in self.lines if line.startswith("sha256")]
        return line.split()[-1]


@pytest.fixture
def never_killed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """The example that the test is about, running in a folder of its own."""
    start = Start(request.param, tmp_path / "never killed")
    yield start
    start.process.kill()
    start.process.wait()


def assert_all_verified(root: Path) -> None:
    for path in root.glob("*.ckpt"):
        load(path)


def goes_on_to_the_same_end(
    script: str, root: Path, never_killed: Start, kills: list[tuple[str, str | None]], every: int
) -> None:
    """Kill it at each of ``kills``, (point within a save, line it says), then let it end."""
    reached = 0
    for crash_at, line in kills:
        life = Start(script, root, crash_at)
        assert life.end(line) == -9, life.lines
        assert_all_verified(root)
        assert life.first_step() >= reached
        reached = life.first_step()
        if line is not None:  # it loses no more than one interval, and the save that was under way
            reached = int(line.split()[1]) // every * every - every
    life = Start(script, root)
    assert life.end() == 0, life.lines
    assert life.first_step() >= reached > 0
    assert never_killed.end() == 0, never_killed.lines
    assert life.digest() == never_killed.digest()
    assert sorted(path.name for path in root.iterdir()) == sorted(
        path.name for path in (root.parent / "never killed").iterdir()
    )


@pytest.mark.parametrize("never_killed", ["raw_loop.py"], indirect=True)
def test_a_raw_loop_killed_at_any_instant_ends_with_the_same_bits(
    tmp_path: Path, never_killed: Start
) -> None:
    kills = [
        ("temp-created", None),
        ("written", None),
        ("", "step 120 "),
        ("renamed", None),
        ("", "step 470 "),
    ]
    goes_on_to_the_same_end("raw_loop.py", tmp_path / "killed", never_killed, kills, 50)
    source = (EXAMPLES / "raw_loop.py").read_text().partition('"""\n\n')[2].splitlines()
    assert len([line for line in source if line.strip() and not line.lstrip().startswith("#")]) <= 30


@pytest.mark.parametrize("never_killed", ["accelerate_loop.py"], indirect=True)
def test_an_accelerate_loop_killed_in_mid_epoch_ends_with_the_same_bits(
    tmp_path: Path, never_killed: Start
) -> None:
    pytest.importorskip("accelerate")
    kills = [("", "step 70 "), ("", "step 190 ")]
    goes_on_to_the_same_end("accelerate_loop.py", tmp_path / "killed", never_killed, kills, 20)
