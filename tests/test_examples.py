"""The examples do what they say, run as a user runs them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
