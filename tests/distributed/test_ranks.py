"""The harness itself: real ranks, which a strategy finds as torchrun's."""

from __future__ import annotations

import pytest

import holdfast as pl

from .ranks import run_ranks, start_ranks


def who_am_i() -> tuple[int, int, int]:
    trainer = pl.Trainer(strategy="ddp", accelerator="cpu", logger=False, max_epochs=1)
    trainer.strategy.setup_environment()
    total = trainer.strategy.reduce_boolean_decision(trainer.global_rank == 1, all=False)
    return trainer.global_rank, trainer.world_size, int(total)


def fail_on_rank_one() -> None:
    import os

    if os.environ["RANK"] == "1":
        raise ValueError("no")


def test_every_rank_knows_who_it_is_and_hears_of_the_others() -> None:
    assert run_ranks(who_am_i, ranks=3) == [(0, 3, 1), (1, 3, 1), (2, 3, 1)]


def test_a_rank_that_fails_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="(?s)^1 of 2 ranks failed:\nrank 1, code 1:\n.*ValueError: no"):
        run_ranks(fail_on_rank_one)
    assert [one.code for one in start_ranks(fail_on_rank_one).wait()] == [0, 1]
