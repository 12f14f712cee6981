"""Stopping by SIGTERM and by SIGKILL, and what can be wrong with a script or an argument."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast import ConfigError
from holdfast.testing import ExactResume, assert_exact_resume

from . import scripts
from .scripts import good, script

CHECKPOINTS = "lightning_logs/version_0/checkpoints"


# -- SIGTERM ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_handler_is_left() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def test_by_sigterm_the_trainer_saves_by_itself(tmp_path: Path) -> None:
    proof = assert_exact_resume(good, tmp_path, at=[1, 3], by="sigterm")
    assert proof == ExactResume(
        stops=("on_train_batch_end of epoch 0, batch 0", "on_train_batch_end of epoch 0, batch 2"),
        resumed_from=(f"{CHECKPOINTS}/stopped.ckpt", f"{CHECKPOINTS}/stopped.ckpt"),
        batches=8,
        compared=8,
    )


def test_by_sigterm_everywhere(tmp_path: Path) -> None:
    proof = assert_exact_resume(good, tmp_path, stops=100, by="sigterm")
    assert "on_validation_end of epoch 0, batch 1" in proof.stops
    assert "on_train_epoch_end of epoch 0" in proof.stops
    assert proof.compared == proof.batches == 8


def test_by_sigterm_a_broken_script_fails_likewise(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as raised:
        assert_exact_resume(script(module=scripts.Counts), tmp_path, at=[2], by="sigterm")
    assert str(raised.value).splitlines()[:3] == [
        "The stopped run is not the run that never stopped. They part at epoch 0, batch 2 (global step 3):",
        "  parameter weight: 2 of 2 values differ, by 2 at most",
        f"The run was stopped by SIGTERM in on_train_batch_end of epoch 0, batch 1 (stop 1 of 1), and went on "
        f"from {CHECKPOINTS}/stopped.ckpt at epoch 0, batch 2.",
    ]


def test_by_sigterm_nothing_is_saved_without_a_checkpoint_callback(tmp_path: Path) -> None:
    train = script(module=scripts.Plain, enable_checkpointing=False)
    with pytest.raises(AssertionError) as raised:
        assert_exact_resume(train, tmp_path, at=[2], by="sigterm")
    assert str(raised.value) == (
        "The run was stopped in on_train_batch_end of epoch 0, batch 1. When it was started again, it did not go "
        "on from a checkpoint, but from the start. None was saved: on SIGTERM the trainer saves where it has a "
        "checkpoint callback."
    )


def retries(root: Path) -> None:
    """Takes whatever ends a fit for an accident."""
    for _ in range(3):
        try:
            scripts.fit(root, scripts.OnIds())
        except BaseException:
            continue
        return


@pytest.mark.parametrize("by", ["exception", "sigterm"])
def test_a_script_that_goes_on_after_an_error_stays_stopped(by: Any, tmp_path: Path) -> None:
    assert len(assert_exact_resume(retries, tmp_path, at=[2, 6], by=by).stops) == 2


def test_a_trainer_that_leaves_sigterm_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        assert_exact_resume(script(module=scripts.Plain, stop_signals=()), tmp_path, at=[2], by="sigterm")
    assert str(raised.value) == (
        'assert_exact_resume(by="sigterm"): this trainer leaves SIGTERM to end the process. Train in the main '
        'thread and with Trainer(stop_signals=("SIGTERM",)), or take by="sigkill".'
    )


# -- SIGKILL ------------------------------------------------------------------------------------------------


def test_by_sigkill_each_start_is_a_process_of_its_own(tmp_path: Path) -> None:
    proof = assert_exact_resume(good, tmp_path, at=[3], by="sigkill")
    assert proof == ExactResume(
        ("on_train_batch_end of epoch 0, batch 3",), (f"{CHECKPOINTS}/stopped-by-test.ckpt",), 8, 8
    )


def test_by_sigkill_train_has_to_be_importable(tmp_path: Path) -> None:
    def train(root: Path) -> None: ...

    with pytest.raises(ConfigError) as raised:
        assert_exact_resume(train, tmp_path, by="sigkill")
    start, _, end = str(raised.value).partition(repr(train))
    assert start == (
        'assert_exact_resume(train, by="sigkill") starts train in processes of its own, so train has to be a '
        "function at the top level of a module, and "
    )
    assert end.startswith(" cannot be sent there: ")
    assert end.endswith('. by="exception" takes any function.')


def fails(root: Path) -> None:
    raise ValueError("no data")


def test_by_sigkill_what_the_script_raises_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        assert_exact_resume(fails, tmp_path, by="sigkill")
    first, *_, last = str(raised.value).splitlines()
    assert first == "train(root) ended its process with exit code 1."
    assert last == "ValueError: no data"


# -- what cannot work ---------------------------------------------------------------------------------------


def test_what_the_script_raises_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data"):
        assert_exact_resume(fails, tmp_path)


def nothing(root: Path) -> None: ...


def elsewhere(root: Path) -> None:
    scripts.fit(root.parent / "elsewhere", scripts.Plain())


@pytest.mark.parametrize(
    "train, arguments, message",
    [
        (good, {"stops": 0}, "assert_exact_resume(stops=0) must be at least 1."),
        (good, {"at": []}, "assert_exact_resume(at=[]) names no batch to stop behind."),
        (good, {"by": "x"}, 'assert_exact_resume(by=\'x\') must be "exception", "sigterm" or "sigkill".'),
        (
            good,
            {"at": [9]},
            "assert_exact_resume(at=[9]): there is no batch 9. The run has 8 of them, counted from 1 over all "
            "epochs and fits.",
        ),
        (
            nothing,
            {},
            "assert_exact_resume: train(root) did not call Trainer.fit, so there is nothing to stop.",
        ),
        (
            script(module=scripts.Plain, max_epochs=0),
            {},
            "assert_exact_resume: train(root) trained no batch, so there is nothing to stop.",
        ),
        (
            elsewhere,
            {},
            "assert_exact_resume: train(root) went on from "
            f"../elsewhere/{CHECKPOINTS}/epoch=1-step=8.ckpt, which is not below root. Give the trainer "
            "default_root_dir=root, and let loggers and checkpoint callbacks write below it.",
        ),
    ],
)
def test_refuses(train: Any, arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        assert_exact_resume(train, tmp_path, **arguments)
    assert str(raised.value) == message


def test_needs_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    with pytest.raises(ConfigError) as raised:
        assert_exact_resume(good, tmp_path)
    assert str(raised.value) == (
        f"assert_exact_resume: {tmp_path / 'whole'} is there already. Give an empty directory."
    )


# -- as a user has it ---------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset

from holdfast import LightningModule, Trainer, seed_everything


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        {attribute}

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return (self.layer(batch[0]) / self.seen).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(root):
    seed_everything(1)
    data = DataLoader(TensorDataset(torch.randn(12, 2)), batch_size=4, shuffle=True)
    Trainer(default_root_dir=root, max_epochs=2, accelerator="cpu").fit(Line(), data, ckpt_path="auto")


if __name__ == "__main__":
    train("runs")
"""

TEST = """
import broken
import right

from holdfast.testing import assert_exact_resume


def test_the_right_one(tmp_path):
    assert_exact_resume(right.train, tmp_path)


def test_the_broken_one(tmp_path):
    assert_exact_resume(broken.train, tmp_path)
"""


def test_scripts_with_a_test_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(
        SCRIPT.format(attribute="self.register_buffer('seen', torch.zeros(()))")
    )
    (tmp_path / "broken.py").write_text(SCRIPT.format(attribute="self.seen = 0"))
    (tmp_path / "test_scripts.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_scripts.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 passed" in ran.stdout
    assert "FAILED test_scripts.py::test_the_broken_one" in ran.stdout
    assert "AssertionError: The stopped run is not the run that never stopped. They part at" in ran.stdout
    assert "parameter layer.weight: 2 of 2 values differ, by " in ran.stdout
