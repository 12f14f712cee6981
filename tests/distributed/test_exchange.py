"""What ranks exchange through a strategy: barrier, broadcast, reduce, all_gather, and who starts them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import holdfast as pl
from holdfast.strategies import ParallelStrategy
from holdfast.strategies.exchange import _OnGpu, packed, unpacked
from holdfast.utilities import rank_zero
from tests.training.toys import Toy, rows

from .ranks import run_ranks


def connected() -> tuple[ParallelStrategy, int]:
    strategy = pl.Trainer(accelerator="cpu", logger=False, max_epochs=1).strategy
    assert isinstance(strategy, ParallelStrategy)
    strategy.setup_environment()
    return strategy, strategy.global_rank


def reductions() -> list[Any]:
    strategy, rank = connected()
    mine = torch.tensor([1.0, 3.0]) * (rank + 1)
    reduce = strategy.reduce
    pair = dist.new_group([0, 1])
    found = [
        reduce(mine).tolist(), reduce(mine, reduce_op="sum").tolist(), reduce(mine, reduce_op="MAX").tolist(),
        reduce(mine, reduce_op=dist.ReduceOp.MIN).tolist(), mine.tolist() == [rank + 1.0, 3.0 * (rank + 1)],
        reduce(torch.tensor(rank)).item(), reduce(torch.tensor(rank), reduce_op="sum").tolist(),
        reduce(rank), reduce(rank, reduce_op="sum"), reduce(rank == 1, reduce_op="max"), reduce(0.5 + rank),
        reduce(torch.tensor([rank == 1]), reduce_op="max").tolist(), reduce("text"),
        reduce(torch.tensor([rank == 1, True]), reduce_op="sum").tolist(),
        reduce(torch.full((2,), 1.0 + rank, dtype=torch.bfloat16)).dtype,
        reduce(torch.arange(4.0).reshape(2, 2).t() * rank).tolist(),
    ]  # fmt: skip
    if rank < 2:
        found.append(reduce(torch.tensor(float(rank)), group=pair).item())
    return found


def test_reduce() -> None:
    whole = [
        [2.0, 6.0], [6.0, 18.0], [3.0, 9.0], [1.0, 3.0], True,
        1.0, 3, 1.0, 3, 1, 1.5, [True], "text", [1, 3], torch.bfloat16, [[0.0, 2.0], [1.0, 3.0]],
    ]  # fmt: skip
    assert run_ranks(reductions, ranks=3) == [[*whole, 0.5], [*whole, 0.5], whole]


def gathers() -> tuple[Any, ...]:
    strategy, rank = connected()
    nested = strategy.all_gather({"a": torch.tensor([rank]), "b": (rank, "text")})
    mine = torch.tensor([1.0 + rank], requires_grad=True)
    (strategy.all_gather(mine, sync_grads=True) * torch.tensor([[1.0], [10.0]])).sum().backward()
    plain = strategy.all_gather(mine)
    assert mine.grad is not None
    return (
        nested["a"].tolist(), nested["b"][0].tolist(), nested["b"][1], strategy.all_gather(torch.tensor(rank)).shape,
        mine.grad.tolist(), plain.tolist(), plain.requires_grad, strategy.gather({"rank": rank}, dst=1),
    )  # fmt: skip


def test_all_gather() -> None:
    same = ([[0], [1]], [0, 1], "text", torch.Size([2]))
    plain = ([[1.0], [2.0]], False)
    # Each process's gradient of what all of them computed from its tensor.
    assert run_ranks(gathers) == [
        (*same, [2.0], *plain, None), (*same, [20.0], *plain, [{"rank": 0}, {"rank": 1}]),
    ]  # fmt: skip


def decisions() -> tuple[Any, ...]:
    strategy, rank = connected()
    strategy.barrier("here")
    told = {"rank": rank, "tensor": torch.full((2,), float(rank))}
    found: Any = strategy.broadcast(told, src=1)
    return (
        found["rank"], found["tensor"].tolist(), (found is told) == (rank == 1),
        strategy.reduce_boolean_decision(rank == 1), strategy.reduce_boolean_decision(rank == 1, all=False),
    )  # fmt: skip


def test_broadcast_and_decisions() -> None:
    assert run_ranks(decisions) == [(1, [1.0, 1.0], True, False, True)] * 2


def test_tensors_of_another_device_come_to_the_own_one() -> None:
    """No rank opens the GPU of the one that sent them."""
    there = packed({"b": torch.ones(1), "c": ("text", 1)})
    assert there == {"b": torch.ones(1), "c": ("text", 1)}
    assert unpacked({"a": [_OnGpu(torch.ones(2))]}, torch.device("meta"))["a"][0].device.type == "meta"


def under_slurm() -> tuple[Any, ...]:
    rank = os.environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        del os.environ[name]
    os.environ |= {
        "SLURM_NTASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank,
        "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.[1,2]", "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }  # fmt: skip
    silent = rank_zero._rank_from_environment()
    trainer = pl.Trainer(
        accelerator="cpu", num_nodes=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Toy(), rows(16))
    return silent, trainer.global_rank, trainer.node_rank, trainer.world_size, trainer.global_step


def test_tasks_of_slurm() -> None:
    assert run_ranks(under_slurm) == [(0, 0, 0, 2, 2), (1, 1, 1, 2, 2)]


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"RANK": "3", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
    ],
)
def test_who_speaks_from_the_first_import(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (rank_zero._rank_from_environment() == 0) is first
