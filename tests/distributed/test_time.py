"""Time with several ranks: rank 0's clock decides, and all do the same at the same batch."""

from __future__ import annotations

import itertools
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import holdfast as pl
from holdfast.callbacks import model_checkpoint, timer
from holdfast.training import validation_schedule

from .ranks import run_ranks
from .saving_jobs import At, checkpoint, files, loader, new_model, rank, trainer_in, weights


def clocks(trainer: pl.Trainer, *, seconds_a_batch: float = 1.0) -> None:
    """On rank 0 each batch takes a second, as the callbacks see it; other ranks' clocks are far off."""
    ahead = 1e6 if rank() == 1 else 0.0

    def now() -> float:
        batches = trainer.progress.total_batches
        return batches * seconds_a_batch * (1.0 + ahead) + ahead

    for module in (model_checkpoint, validation_schedule):
        module.time = types.SimpleNamespace(monotonic=now)  # type: ignore[attr-defined]
    timer.monotonic = now  # type: ignore[assignment]


class Validations(pl.Callback):
    """The batches after which validation ran."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.after.append(trainer.progress.total_batches)


def at_intervals(place: Path) -> tuple[list[str], list[int], list[int]]:
    kept = checkpoint(place, train_time_interval=timedelta(seconds=5), save_top_k=-1)
    seen, counts = Validations(), []
    count = [At(step, lambda t: counts.append(t.strategy.agreement.operations)) for step in (1, 4)]
    trainer = trainer_in(
        place, kept, seen, *count, val_check_interval=timedelta(seconds=5), check_val_every_n_epoch=None,
        max_epochs=8,
    )  # fmt: skip
    clocks(trainer)
    trainer.fit(new_model(), loader(), loader(8))
    return files(place), seen.after, counts


@pytest.mark.parametrize("ranks", [2, 3])
def test_saves_and_validations_by_time_are_rank_zeros_on_every_rank(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(at_intervals, tmp_path, ranks=ranks)
    assert all(one == found[0] for one in found)
    saved, validated, operations = found[0]
    # At 1 s a batch no two are closer than 5; by rank 1's clock each batch would be one.
    assert saved
    assert all(later - earlier >= 5 for earlier, later in itertools.pairwise(validated))
    assert operations[0] == operations[1], "steps without anything due exchange nothing"


def until_the_time_is_up(
    place: Path, max_time: Any, ckpt_path: str | None = None
) -> tuple[int, list[str], list[float]]:
    pl.seed_everything(1)
    model = new_model()
    kept = checkpoint(place, every_n_train_steps=6, save_top_k=-1)
    trainer = trainer_in(place, kept, max_time=max_time)
    clocks(trainer)
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer.progress.total_batches, files(place), weights(model)


def test_max_time_is_rank_zeros_and_a_resume_with_more_time_is_exact(tmp_path: Path) -> None:
    whole = run_ranks(until_the_time_is_up, tmp_path / "whole", None)
    found = run_ranks(until_the_time_is_up, tmp_path / "cut", {"seconds": 4})
    assert found[0] == found[1]
    batches, saved, _ = found[0]
    assert batches >= 4 and "stopped.ckpt" in saved
    again = run_ranks(until_the_time_is_up, tmp_path / "cut", {"days": 1}, "auto")
    assert again[0] == again[1]
    assert (again[0][0], again[0][2]) == (whole[0][0], whole[0][2])
    if batches < 12:  # a later save of the run's has taken its place
        assert "stopped.ckpt" not in again[0][1]


def by_epochs(place: Path) -> tuple[int, list[str]]:
    timed = pl.callbacks.Timer(duration=timedelta(seconds=10), interval="epoch")
    trainer = trainer_in(place, timed, checkpoint(place), max_epochs=9)
    clocks(trainer)
    trainer.fit(new_model(), loader())
    return trainer.progress.total_batches, files(place)


def test_a_timer_that_looks_after_epochs_stops_all_ranks_there(tmp_path: Path) -> None:
    assert run_ranks(by_epochs, tmp_path) == [(16, ["epoch=1-step=16.ckpt", "stopped.ckpt"])] * 2
