"""Gradients of which each rank has a part: scaling, clipping, and those that have not been reduced yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.strategies.parts import local


class ShardedGradScaler(torch.amp.GradScaler):
    """A gradient scaler whose ranks agree on whether a gradient is infinite: each sees its part alone.

    Args:
        device: The kind of device, such as "cuda".
        group: The ranks to agree with; None for all.
        like: A scaler whose settings it takes over.
    """

    def __init__(self, device: str, group: Any = None, like: torch.amp.GradScaler | None = None) -> None:
        if like is None:
            super().__init__(device)
        else:
            super().__init__(
                device,
                init_scale=like.get_scale(),
                growth_factor=like.get_growth_factor(),
                backoff_factor=like.get_backoff_factor(),
                growth_interval=like.get_growth_interval(),
                enabled=like.is_enabled(),
            )
        self._group = group

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    part = local(parameter.grad)
                    by_kind.setdefault((part.device, part.dtype), []).append(part)
        found: dict[torch.device, Tensor] = {}
        with torch.no_grad():
            for (device, _), parts in by_kind.items():
                infinite = found.setdefault(device, found_inf.to(device, copy=True))
                torch._amp_foreach_non_finite_check_and_unscale_(parts, infinite, inv_scale.to(device))
            # All ranks are asked, also one that has no part of any gradient.
            any_device = self._device if not found else next(iter(found)).type
            total = torch.zeros((), device=any_device)
            for infinite in found.values():
                total += infinite.to(total.device).squeeze()
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self._group)
        return {device: total.to(device).reshape_as(one) for device, one in found.items()} or {
            total.device: total
        }


def clip_by_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down together so that the norm of all ranks' parts is at most ``max_norm``.

    Ranks: all that hold a part. Blocks: until all have told the norm of theirs.

    Returns:
        The norm that they had.
    """
    from torch.distributed.tensor import DTensor

    gradients = [one.grad for one in parameters if one.grad is not None]
    sharded: dict[Any, list[Tensor]] = {}
    for one in gradients:
        sharded.setdefault(one.device_mesh if isinstance(one, DTensor) else None, []).append(one)
    norms = []
    for mesh, some in sharded.items():
        norm = torch.nn.utils.get_total_norm(some)
        norms.append(norm if mesh is None else norm.full_tensor())  # type: ignore[attr-defined]
    if not norms:
        return torch.tensor(0.0)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for one in gradients:
        part = local(one)
        by_kind.setdefault((part.device, part.dtype), []).append(part)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for (device, _), parts in by_kind.items():
        torch._foreach_mul_(parts, factor.to(device))
    return total


def clip_by_value(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Cut the values of this rank's part of each gradient to the range around 0."""
    for one in parameters:
        if one.grad is not None:
            local(one.grad).clamp_(-clip_value, clip_value)


# -- gradients that wait to be reduced -----------------------------------------------------------------------


def groups_in(module: nn.Module) -> Iterator[Any]:
    """Torch's own groups of sharded parameters in a model; none if torch keeps them elsewhere by now."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        state: Any = part._get_fsdp_state()
        many = getattr(state, "_fsdp_param_groups", None)
        one = getattr(state, "_fsdp_param_group", None)
        yield from (many if many is not None else [one] if one is not None else [])


def can_see_waiting(module: nn.Module) -> bool:
    """Whether `waiting` and `put_back` find what they need in this version of torch."""
    return all(
        hasattr(one, "unsharded_accumulated_grad") and hasattr(one, "sharded_param")
        for group in groups_in(module)
        for one in group.fsdp_params
    )


def waiting(root: nn.Module) -> dict[Any, Tensor]:
    """Whole gradients of this rank alone that have been added up and not reduced, by sharded parameter."""
    found: dict[Any, Tensor] = {}
    for group in groups_in(root):
        for one in group.fsdp_params:
            gradient = one.unsharded_accumulated_grad
            if gradient is None and hasattr(one, "_unsharded_param"):
                gradient = one._unsharded_param.grad
            if gradient is not None:
                found[one.sharded_param] = gradient
    return found


def put_back(root: nn.Module, gradients: dict[Any, Tensor]) -> None:
    """Have the next backward add to what `waiting` gave, in the process that goes on."""
    for group in groups_in(root):
        for one in group.fsdp_params:
            gradient = gradients.get(one.sharded_param)
            if gradient is not None:
                one.unsharded_accumulated_grad = gradient.to(one.sharded_param.device)
