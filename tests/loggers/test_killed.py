"""A run that is killed with SIGKILL and started again shows the very logs of one that was left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.loggers.child import SAVE_EVERY_N_STEPS
from tests.loggers.events import series

CHILD = Path(__file__).with_name("child.py")
LOGS = Path("lightning_logs")


def start(root: Path, kill_at: int | None = None) -> None:
    command = [sys.executable, str(CHILD), str(root), *([] if kill_at is None else [str(kill_at)])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == (0 if kill_at is None else -signal.SIGKILL), ran.stderr


def test_the_same_points_and_the_same_rows(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    start(straight)
    # Just after a save, just before one, and in the middle; the first one at a step that is logged twice.
    for step in (SAVE_EVERY_N_STEPS + 3, 2 * SAVE_EVERY_N_STEPS, 4 * SAVE_EVERY_N_STEPS - 1):
        start(killed, step)
    start(killed)
    for root in (straight, killed):
        # The first logger has the checkpoints, the second one the next version.
        assert sorted(path.name for path in (root / LOGS).iterdir()) == ["version_0", "version_1"]
    points = series(straight / LOGS / "version_0")
    assert len(points["loss_step"]) == 24 and len(points["bounds_high:bounds"]) == 24
    assert points["hp_metric"] == [(0, -1.0)]
    assert series(killed / LOGS / "version_0") == points
    for file in ("version_0/hparams.yaml", "version_1/hparams.yaml", "version_1/metrics.csv"):
        assert (killed / LOGS / file).read_text() == (straight / LOGS / file).read_text()
