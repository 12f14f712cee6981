"""What the ranks of a job do in the tests of sharded checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "even": ((6, 4), 0),
    "uneven": ((10, 3), 0),
    "second": ((5, 7), 1),
    "small": ((2,), 0),
    "one": ((1, 3), 0),
    "none": ((0, 3), 0),
    "scalar": ((), None),
    "replicated": ((4, 4), None),
    "half": ((9, 2), 0),
}
"""The model's parameters: shape, and the dimension that is sharded; None for those that every rank has."""


def full(name: str, add: float = 0.0) -> torch.Tensor:
    """The whole of one, the same in every process."""
    shape, _ = SHAPES[name]
    number = list(SHAPES).index(name)
    dtype = torch.bfloat16 if name == "half" else torch.float32
    made = torch.randn(shape, generator=torch.Generator().manual_seed(number)) + add
    return made.to(dtype)


def plain_payload(add: float = 0.0) -> dict[str, Any]:
    """What one process has in memory, whole: what a sharded checkpoint has to come to."""
    weights = OrderedDict((name, full(name, add)) for name in SHAPES)
    weights["tied"] = weights["even"]
    weights["norm.running_mean"] = torch.full((3,), 0.0)
    state = {name: {"step": torch.tensor(5.0), "exp_avg": full(name, add) / 2} for name in SHAPES}
    return {
        "epoch": 3,
        "global_step": 7,
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1, "params": list(SHAPES)}]}],
        "callbacks": {"a": {"best": torch.tensor(0.25)}},
        "holdfast": {"ranks": [{"noise": torch.arange(4)}], "place": Path("runs/a")},
    }


@contextlib.contextmanager
def a_group() -> Iterator[tuple[int, int]]:
    """Be a rank: gives its number, and how many there are."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def sharded_payload(rank: int, world_size: int, add: float = 0.0) -> dict[str, Any]:
    """The same as one of the ranks has it; BatchNorm's statistics differ from rank to rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))

    def spread(name: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = SHAPES[name][1]
        return distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)])

    payload = plain_payload(add)
    weights = payload["state_dict"]
    for name in SHAPES:
        weights[name] = spread(name, weights[name])
        moments = payload["optimizer_states"][0]["state"][name]
        moments["exp_avg"] = spread(name, moments["exp_avg"])
    weights["tied"] = weights["even"].detach()
    weights["norm.running_mean"] = torch.full((3,), float(rank))
    return payload


def save(path: str, add: float = 0.0, names: tuple[str, ...] = ()) -> Any:
    """Save it; gives the report, and with nothing added which keys the same ranks then load otherwise."""
    from holdfast.checkpoint import sharded

    with a_group() as (rank, world_size):
        rest, tensors = sharded.split(sharded_payload(rank, world_size, add))
        report = sharded.save(
            path, rest if rank == 0 else None, tensors,
            rank=rank, world_size=world_size, names=names, summary={"step": 7, "epoch": 3, "exact": True},
        )  # fmt: skip
        return report, [] if add else _load_into(path, rank, world_size)


def load_into(path: str) -> list[str]:
    """Load it into zeros, sharded over as many ranks as there are; gives the keys that came out otherwise."""
    with a_group() as (rank, world_size):
        return _load_into(path, rank, world_size)


def _load_into(path: str, rank: int, world_size: int) -> list[str]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from holdfast.checkpoint import sharded

    _, wanted = sharded.split(sharded_payload(rank, world_size))
    live = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    sharded.load_into(path, live, group=dist.group.WORLD)
    wrong = []
    for key, tensor in live.items():
        expected: Any = wanted[key]
        if "running_mean" in key:
            expected = torch.zeros(3)
        if isinstance(tensor, DTensor):
            tensor, expected = tensor.to_local(), expected.to_local()
        if not torch.equal(tensor, expected):
            wrong.append(key)
    return wrong


def fail_to_load(path: str, damaged: str) -> tuple[str, str, bool]:
    """Load where one rank finds damage: gives the error, and whether all live tensors are as they were."""
    import torch.distributed as dist

    from holdfast.checkpoint import sharded
    from holdfast.errors import HoldfastError

    with a_group() as (rank, world_size):
        _, wanted = sharded.split(sharded_payload(rank, world_size))
        live = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
        if rank == 1 and damaged:
            os.truncate(os.path.join(path, damaged), 0)
        dist.barrier()
        try:
            sharded.load_into(path, live, group=dist.group.WORLD)
        except HoldfastError as error:
            zero = all(not getattr(one, "_local_tensor", one).any() for one in live.values())
            return type(error).__name__, str(error), zero
        return "", "", False


def save_with_a_full_disk(path: str, full_rank: int, call: str) -> tuple[str, str, int | None]:
    """Save where one rank's disk is full; gives the error."""
    import errno

    from holdfast.checkpoint import commit, sharded
    from holdfast.errors import HoldfastError

    with a_group() as (rank, world_size):
        if rank == full_rank:
            import os as module

            def refuse(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            if call == "write":
                commit.write_all = refuse
            else:
                module.fsync = refuse
        rest, tensors = sharded.split(sharded_payload(rank, world_size, 1.0))
        try:
            sharded.save(path, rest, tensors, rank=rank, world_size=world_size)
        except HoldfastError as error:
            return type(error).__name__, str(error), getattr(error, "errno", None)
        return "", "", None


def killed_while_saving(path: str, killed: int, point: str, names: tuple[str, ...] = ()) -> str:
    """Save where one rank is killed at a named point; gives the kind of error that the others meet."""
    from holdfast.checkpoint import sharded

    with a_group() as (rank, world_size):
        rest, tensors = sharded.split(sharded_payload(rank, world_size, 1.0))
        if rank == killed:
            os.environ["HOLDFAST_CRASH_AT"] = point
        try:
            sharded.save(path, rest, tensors, rank=rank, world_size=world_size, names=names)
        except Exception as error:
            return type(error).__name__
        return "saved"


LARGE_BYTES = 128 << 20


def save_large(path: str) -> None:
    """Save a tensor of `LARGE_BYTES`, half of it on each of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from holdfast.checkpoint import sharded

    with a_group() as (rank, world_size):
        mesh = init_device_mesh("cpu", (world_size,))
        local = torch.full((1024, LARGE_BYTES // 4096 // world_size), float(rank))
        weight = DTensor.from_local(local, mesh, [Shard(1)])
        rest, tensors = sharded.split({"state_dict": {"weight": weight, "small": torch.ones(3)}})
        sharded.save(path, rest, tensors, rank=rank, world_size=world_size)


def merge_and_measure(path: str, out: str) -> int:
    """Merge it in this process; gives by how many bytes its memory grew at most."""
    import resource

    from holdfast.checkpoint import sharded

    # What is imported and started the first time is no matter of the size.
    rest, tensors = sharded.split({"state_dict": {"small": torch.ones(3)}})
    sharded.save(out + ".first", rest, tensors, rank=0, world_size=1)
    sharded.merge(out + ".first", out)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sharded.merge(path, out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def load_and_measure(path: str) -> int:
    """Load half of it into memory of another layout; gives by how many bytes the process grew at most."""
    import resource

    from holdfast.checkpoint import sharded

    live = torch.ones(LARGE_BYTES // 4096, 1024).t()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sharded.load_into(path, {'["state_dict","weight"]': live})
    assert live[:, 0].eq(0).all()
    assert live[:, -1].eq(1).all()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
