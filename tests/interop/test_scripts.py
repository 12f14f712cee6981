"""Five scripts written for Lightning run here with their imports changed, and end with the same weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "scripts"
# The images are augmented by the dataset, whose random numbers holdfast seeds batch by batch: other values.
SAME_WEIGHTS = ["gan", "language_model", "contrastive", "tabular"]


def run(script: str, package: str, root: Path) -> str:
    """What a script prints, run with its imports taken from ``package``."""
    root.mkdir()
    text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
    changed, count = re.subn(r"\blightning\.pytorch\b", package, text)
    assert count >= 2
    path = root / f"{script}.py"
    path.write_text(changed, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(path), "--root", str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def results(printed: str) -> str:
    """The lines that a script prints itself, with ``name=value`` in them; Lightning prints others too."""
    return "\n".join(line for line in printed.splitlines() if re.match(r"\w+=\S", line))


@pytest.mark.parametrize("script", SAME_WEIGHTS)
def test_ends_with_lightnings_weights(script: str, tmp_path: Path) -> None:
    theirs = results(run(script, "lightning.pytorch", tmp_path / "theirs"))
    mine = results(run(script, "holdfast", tmp_path / "mine"))
    assert theirs != ""
    assert mine == theirs
    weights = [torch.load(tmp_path / whose / "weights.pt") for whose in ("theirs", "mine")]
    assert weights[0].keys() == weights[1].keys()
    different = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
    assert different == []


def test_learns_as_well_from_augmented_images(tmp_path: Path) -> None:
    printed = [
        results(run("image_classifier", package, tmp_path / package)).split()
        for package in ("lightning.pytorch", "holdfast")
    ]
    (theirs, mine) = (dict(part.split("=") for part in parts) for parts in printed)
    assert mine.keys() == theirs.keys()
    assert (mine["kept"], mine["steps"]) == (theirs["kept"], theirs["steps"])
    assert float(theirs["test_accuracy"]) > 0.85
    assert float(mine["test_accuracy"]) > 0.85


@pytest.mark.parametrize("script", [*SAME_WEIGHTS, "image_classifier"])
def test_is_a_script_as_people_write_them(script: str) -> None:
    text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
    assert 60 <= len(text.splitlines()) <= 200
    assert "import lightning.pytorch as pl" in text
    assert "holdfast" not in text
