"""Which parts of a model become groups of sharded parameters, and doing it with torch's `fully_shard`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.strategies.parts import digest

Policy = Collection[type[nn.Module]] | Callable[[nn.Module], bool]
"""What `FSDPStrategy(auto_wrap_policy=)` takes: classes, or a function that says of a module whether."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward, which is where a group's parameters are gathered."""

ROOT = "_sharded_as"
"""Under this name in a module's ``__dict__`` is the `Root` that it was sharded under."""


class Root(nn.Module):
    """A module around a LightningModule, whose forward runs any of its steps: the root that is sharded.

    So the LightningModule keeps its class, and what it holds itself is whole in all of its steps, whatever
    they call.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``run`` returns."""
        return run(*args, **kwargs)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module or a part of it has been given to `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def check_policy(policy: Any) -> None:
    """Refuse a policy that cannot be asked.

    Raises:
        ConfigError: it is neither classes nor a function of one module.
    """
    if policy is None:
        return
    if not callable(policy):
        classes = list(policy) if isinstance(policy, Iterable) else [policy]
        if not all(isinstance(one, type) and issubclass(one, nn.Module) for one in classes):
            raise ConfigError(
                f"FSDPStrategy(auto_wrap_policy={policy!r}): expected a set of module classes, such as "
                "{nn.TransformerEncoderLayer}, or a function that takes a module and returns a bool."
            )
        return
    try:
        names = inspect.signature(policy).parameters
    except (TypeError, ValueError):
        return
    if "recurse" in names or "nonwrapped_numel" in names:
        raise ConfigError(
            "FSDPStrategy(auto_wrap_policy=...): this is a policy of FSDP1, which torch asks with recurse= "
            "and nonwrapped_numel=. Give a set of module classes, or a function that takes a module and "
            "returns a bool."
        )


def parts_to_shard(module: nn.Module, policy: Policy | None) -> list[nn.Module]:
    """The parts that become groups of their own, inner ones first; what is left belongs to the root.

    A part that shares a parameter with something outside of it is none: whoever holds both has it.

    Args:
        module: The whole model.
        policy: Classes, or a function; None means each direct child that has parameters.
    """
    if policy is None:
        chosen = list(_children(module))
    elif callable(policy):
        chosen = [one for one in module.modules() if one is not module and policy(one)]
    else:
        classes = tuple(policy)
        chosen = [one for one in module.modules() if one is not module and isinstance(one, classes)]
    users: dict[nn.Parameter, set[int]] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                users.setdefault(parameter, set()).add(id(part))
    found = []
    for part in chosen:
        within = {id(one) for one in part.modules()}
        parameters = list(part.parameters())
        if not parameters or isinstance(part, _CONTAINERS):
            continue
        if all(users[one] <= within for one in parameters):
            found.append(part)
    return found[::-1]  # modules() lists what is outside first


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield child


def shard(
    module: nn.Module,
    parts: list[nn.Module],
    *,
    mesh: Any,
    policy: Any,
    root_policy: Any,
    reshard_after_forward: bool | int | None,
    offload: Any,
    ignored: set[nn.Parameter],
) -> Root:
    """Shard the parts, and all that is left under a new root.

    Args:
        module: The whole model.
        parts: What `parts_to_shard` gave.
        mesh: The ranks, as a DeviceMesh.
        policy: The parts' MixedPrecisionPolicy.
        root_policy: The root's.
        reshard_after_forward: As `fully_shard` takes it.
        offload: An OffloadPolicy.
        ignored: Parameters to leave as they are.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    more: dict[str, Any] = {"ignored_params": ignored} if ignored else {}
    options = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": offload,
        **more,
    }
    if policy.param_dtype is not None:
        # Its statistics are in full precision, and torch wants its weights to be the same.
        full = MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False)
        norms = [
            one
            for one in module.modules()
            if isinstance(one, nn.modules.batchnorm._BatchNorm) and any(True for _ in one.parameters())
        ]
        for norm in norms:
            fully_shard(norm, mp_policy=full, **options)
        parts = [part for part in parts if part not in norms]
    for part in parts:
        fully_shard(part, mp_policy=policy, **options)
    root = Root(module)
    fully_shard(root, mp_policy=root_policy, **options)
    module.__dict__[ROOT] = root
    return root


def equalize(module: nn.Module, group: Any) -> None:
    """Give all ranks rank 0's weights and buffers, if they differ.

    Ranks: all.
    Blocks: until all have them.
    """
    tensors = [one for one in (*module.parameters(), *module.buffers()) if not one.is_meta]
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest(tensors), group=group)
    if len(set(digests)) == 1:
        return
    with torch.no_grad():
        for one in tensors:
            # The group is gloo's, which wants memory of the host.
            held = one.detach().to("cpu", copy=True).contiguous()
            dist.broadcast(held, src=0, group=group)
            one.copy_(held)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Bring to the device what sharding has left where it was: ignored parameters and buffers."""
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        for one in _own(part):
            if not isinstance(one, DTensor) and one.device != device:
                one.data = one.data.to(device)


def give_values(module: nn.Module, device: torch.device) -> None:
    """Give memory and first values to what was built on the device meta.

    Raises:
        ConfigError: a part of it cannot say what its first values are.
    """
    parts = [(name, part) for name, part in module.named_modules() if any(one.is_meta for one in _own(part))]
    lacking = [name for name, part in parts if not callable(getattr(part, "reset_parameters", None))]
    if lacking:
        raise ConfigError(
            f"FSDPStrategy(): {', '.join(lacking)} was built on the device meta and has no reset_parameters "
            "method to give it its first values."
        )
    with torch.no_grad():
        for _, part in parts:
            part.to_empty(device=device, recurse=False)
            part.reset_parameters()


def _own(part: nn.Module) -> list[Tensor]:
    return [one for one in (*part._parameters.values(), *part._buffers.values()) if one is not None]
