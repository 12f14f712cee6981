"""What a rank takes of a checkpoint, by how many there were and how many there are now."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.training import rank_state, rng


def saved_by_three() -> dict[str, Any]:
    """The run of a checkpoint of three ranks, of which the middle one differs in all."""
    return {
        "world_size": 3,
        "seed": 11,
        "progress": {"global_step": 5},
        "generators": [{"of": 0}],
        "own_generators": {"module": 0},
        "data": {"now": 0},
        "validation_data": None,
        "metrics": {"of": 0},
        "gradients": {"w": torch.tensor([3.0]), "b": torch.tensor([1.0])},
        "ranks": [
            {},
            {
                "generators": [{"of": 1}], "own_generators": {"module": 1}, "data": {"now": 1},
                "metrics": {"of": 1}, "gradients": {"w": torch.tensor([6.0]), "b": None},
                "buffers": {"mean": torch.tensor(1.0)},
            },
            {"generators": [{"of": 2}], "gradients": {"w": torch.tensor([0.0])}},
        ],
    }  # fmt: skip


def test_as_many_ranks_go_on_each_from_its_own_state() -> None:
    run = saved_by_three()
    rank_state.take_part(run, rank=1, world_size=3)
    assert "ranks" not in run
    assert (run["generators"], run["own_generators"], run["data"]) == ([{"of": 1}], {"module": 1}, {"now": 1})
    assert (run["metrics"], run["gradients"]) == ({"of": 1}, {"w": torch.tensor([6.0]), "b": None})
    assert run["buffers"] == {"mean": torch.tensor(1.0)}


def test_what_is_not_told_of_a_rank_is_rank_zeros() -> None:
    run = saved_by_three()
    rank_state.take_part(run, rank=2, world_size=3)
    assert (run["generators"], run["data"], run["metrics"]) == ([{"of": 2}], {"now": 0}, {"of": 0})
    assert run["gradients"] == {"w": torch.tensor([0.0]), "b": torch.tensor([1.0])}
    assert "buffers" not in run


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_ranks_shares_the_gradients_of_a_window(
    world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(world_size):
        run = saved_by_three()
        rank_state.take_part(run, rank=rank, world_size=world_size)
        torch.testing.assert_close(run["gradients"], {"w": torch.tensor([3.0]), "b": torch.tensor([2 / 3])})
        assert run["metrics_of_ranks"] == [{"of": 0}, {"of": 1}, {"of": 0}]
        if rank < 3:
            assert run["generators"] == [{"of": rank}]
            assert run["data"] == {"now": int(rank == 1)}
    now = "1 process" if world_size == 1 else f"{world_size} processes"
    assert (
        capsys.readouterr().err.splitlines() + capsys.readouterr().out.splitlines()
        == [f"saved by 3 processes, goes on with {now}"] * world_size
    )


def test_a_rank_that_there_was_not_is_seeded_from_the_run_its_rank_and_the_step() -> None:
    drawn = []
    for rank, step in ((3, 5), (4, 5), (3, 6), (3, 5)):
        run = {**saved_by_three(), "progress": {"global_step": step}}
        rank_state.take_part(run, rank=rank, world_size=5)
        with rng.apart(0):
            assert rank_state.restore_generators(run["generators"][0]) == []
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2] and drawn[1] != drawn[2]


def test_a_file_of_one_process_gives_every_rank_its_state_and_the_first_its_generators() -> None:
    run: dict[str, Any] = {
        "seed": 1,
        "progress": {"global_step": 2},
        "generators": [{"of": 0}],
        "gradients": None,
    }
    first, second = dict(run), dict(run)
    rank_state.take_part(first, rank=0, world_size=2)
    rank_state.take_part(second, rank=1, world_size=2)
    assert first["generators"] == [{"of": 0}]
    assert list(second["generators"][0]) == ["seed"]
    assert first["gradients"] is second["gradients"] is None
