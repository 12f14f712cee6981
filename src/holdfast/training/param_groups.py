"""Which parameters are in an optimizer's groups, by name: torch's own state knows them by number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from holdfast.utilities.wrapped_names import plain_names

Groups = list[list[str | None]]


def groups_of(optimizers: Sequence[Optimizer], module: nn.Module) -> list[Groups]:
    """For each optimizer the names of the parameters in its groups; None for one that the module lacks."""
    plain = plain_names(module)
    names = {id(one): plain(name) for name, one in module.named_parameters()}
    return [
        [[names.get(id(one)) for one in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def regroup(optimizer: Optimizer, saved: Groups, state: Mapping[str, Any], module: nn.Module) -> None:
    """Give an optimizer the groups that training had added to it, and its parameters the order they had.

    Everything else is left as it is, and for torch to refuse.

    Args:
        optimizer: As ``configure_optimizers`` made it.
        saved: What `groups_of` gave for it.
        state: Its state, for the options of the groups.
        module: Whose parameters they are.
    """
    now = groups_of([optimizer], module)[0]
    plain = plain_names(module)
    parameters = {plain(name): one for name, one in module.named_parameters()}
    everything = [name for group in saved for name in group]
    options = state.get("param_groups")
    if (
        now == saved
        or len(now) > len(saved)
        or any(name not in parameters for name in everything)
        or any(set(mine) != set(theirs) or len(mine) != len(theirs) for mine, theirs in zip(now, saved))
        or not isinstance(options, Sequence)
        or len(options) != len(saved)
    ):
        return
    for group, names in zip(optimizer.param_groups, saved):
        group["params"][:] = [parameters[name] for name in names if name is not None]
    for names, given in list(zip(saved, options))[len(now) :]:
        own = [parameters[name] for name in names if name is not None]
        optimizer.add_param_group({**{key: given[key] for key in given if key != "params"}, "params": own})
