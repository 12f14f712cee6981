"""A script that resumes exactly passes, whatever it trains on and however it is stopped."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch

from holdfast.callbacks import ModelCheckpoint
from holdfast.testing import ExactResume, assert_exact_resume

from .scripts import GOOD, fit, good

STOP_FILE = "lightning_logs/version_0/checkpoints/stopped-by-test.ckpt"


@pytest.mark.filterwarnings("ignore:The total number of parameters:UserWarning")
@pytest.mark.parametrize("name", GOOD)
def test_passes_wherever_it_is_stopped(name: str, tmp_path: Path) -> None:
    proof = assert_exact_resume(GOOD[name], tmp_path, stops=100)
    assert len(proof.resumed_from) == len(proof.stops) >= proof.batches
    assert proof.compared >= proof.batches


def test_says_what_was_stopped_gone_on_from_and_compared(tmp_path: Path) -> None:
    assert assert_exact_resume(good, tmp_path, at=[1, 4]) == ExactResume(
        stops=(
            "on_train_batch_end of epoch 0, batch 1",
            "on_validation_batch_end of epoch 0, batch 3",
            "on_train_epoch_end of epoch 0",
            "on_train_batch_end of epoch 1, batch 0",
        ),
        resumed_from=(STOP_FILE,) * 4,
        batches=8,
        compared=8,
    )


def test_chooses_telling_places_and_the_seed_chooses_others(tmp_path: Path) -> None:
    first = assert_exact_resume(good, tmp_path / "first")
    assert len(first.stops) == 4
    assert any("validation" in stop for stop in first.stops)
    assert assert_exact_resume(good, tmp_path / "again").stops == first.stops
    assert assert_exact_resume(good, tmp_path / "other", seed=5).stops != first.stops


def test_the_run_is_left_as_it_is(tmp_path: Path) -> None:
    """The watched run logs, saves and ends as one that nobody watches."""
    (tmp_path / "alone").mkdir()
    good(tmp_path / "alone")
    assert_exact_resume(good, tmp_path, at=[2])
    assert files(tmp_path / "whole") == files(tmp_path / "alone")
    assert set(files(tmp_path / "stopped")) == {*files(tmp_path / "alone"), Path(STOP_FILE)}
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole") == metrics(tmp_path / "alone")


def test_the_generators_are_put_back(tmp_path: Path) -> None:
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert_exact_resume(good, tmp_path, stops=1)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == state[1:]


def test_the_directory_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")

    def train(root: Path) -> None:
        fit(root, callbacks=[ModelCheckpoint(dirpath=root / "models", save_top_k=2, monitor="loss")])

    assert assert_exact_resume(train, tmp_path / "link", at=[6]).resumed_from == (
        "models/stopped-by-test.ckpt",
    )


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def metrics(root: Path) -> str:
    return (root / "lightning_logs/version_0/metrics.csv").read_text()
