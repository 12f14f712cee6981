"""Values of several processes: reduced to one, gathered, and sent as objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from holdfast.errors import ConfigError
from holdfast.utilities.nested import mapped


def reduced(value: Any, group: Any, reduce_op: Any) -> Any:
    """Return the value reduced over the group's processes: a new tensor, or a number for a number.

    Means are of a floating point type; so that they are right, too, half-precision is added up in float32.

    Args:
        value: A tensor or a number.
        group: The processes; None for all.
        reduce_op: "mean" or "avg", "sum", "min", "max", "product", or one of torch's.

    Ranks: all of the group. Blocks: until all have given theirs.

    Raises:
        ConfigError: there is no such operation.
    """
    number = not isinstance(value, torch.Tensor)
    given = (
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if number else value
    )
    name = reduce_op.lower() if isinstance(reduce_op, str) else ""
    mean = name in ("mean", "avg") or reduce_op == dist.ReduceOp.AVG
    op: Any = dist.ReduceOp.SUM if mean else reduce_op
    if isinstance(op, str):
        op = getattr(dist.ReduceOp, name.upper(), None)
        if op is None:
            raise ConfigError(
                f"reduce(reduce_op={reduce_op!r}): expected 'mean', 'sum', 'min', 'max' or 'product', or one "
                "of torch.distributed.ReduceOp."
            )
    sent = given.detach()
    adds = op in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT)
    if sent.dtype == torch.bool:
        sent = sent.to(torch.int64 if adds else torch.uint8)
    elif adds and sent.dtype in (torch.float16, torch.bfloat16):
        sent = sent.float()
    total = sent.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=op, group=group)
    if mean:
        total = total / dist.get_world_size(group)
    if given.is_floating_point() or (given.dtype == torch.bool and not adds):
        total = total.to(given.dtype)
    return total.item() if number else total


def gathered(tensor: torch.Tensor, group: Any, sync_grads: bool) -> torch.Tensor:
    """Return every process's tensor, stacked in the order of ranks.

    Args:
        tensor: This process's, of the same shape everywhere.
        group: The processes; None for all.
        sync_grads: Let gradients flow back to the process that a tensor came from.

    Ranks: all of the group. Blocks: until all have given theirs.
    """
    if sync_grads and torch.is_grad_enabled():
        from torch.distributed.nn.functional import all_gather

        everything = all_gather(tensor.contiguous(), group or dist.group.WORLD)
        return torch.stack(everything)
    sent = tensor.detach().contiguous()
    found = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, sent, group=group)
    return torch.stack(found)


@dataclass(frozen=True)
class _OnGpu:
    """A tensor on the way to another process, where it is to be on that one's own device."""

    tensor: torch.Tensor


def packed(obj: Any) -> Any:
    """The object with its tensors on the CPU, so that no other process opens this one's GPU for them."""
    return mapped(obj, _on_cpu)


def unpacked(obj: Any, device: torch.device) -> Any:
    """What `packed` was given, with tensors that were on a GPU on ``device``."""
    return mapped(obj, lambda one: one.tensor.to(device) if isinstance(one, _OnGpu) else one)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return _OnGpu(value.cpu())
    return value
