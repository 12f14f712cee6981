"""An optimizer's state back into it, with the dtypes that it was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.utilities.wrapped_names import plain_names


def load_optimizer_state(
    optimizer: Optimizer, state: Mapping[str, Any], module: nn.Module, weights: Mapping[str, Any]
) -> None:
    """``optimizer.load_state_dict(state)``, bit for bit where the weights have the dtype they were saved in.

    Torch casts all that is kept for a parameter to the parameter's dtype. What an optimizer keeps in float32
    for half precision weights (NAdam's ``mu_product``, ASGD's ``eta``) would lose its bits, and so would
    counters that are integers.

    Args:
        optimizer: The optimizer.
        state: What its ``state_dict()`` was.
        module: Whose parameters it has.
        weights: The ``state_dict`` that was saved with it. Where a weight has another dtype there, the run
            has another precision now, and torch's cast is the one that is wanted.

    Raises:
        ValueError: the state has other parameter groups.
    """
    tensors = [
        {key: one for key, one in group.items() if isinstance(one, Tensor)}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(dict(state))
    for group, live in zip(optimizer.param_groups, tensors, strict=False):
        for key, tensor in live.items():
            if isinstance(group.get(key), Tensor) and group[key].shape == tensor.shape:
                # A learning rate that is a tensor stays the user's own, on its device.
                group[key] = tensor.copy_(group[key])
    plain = plain_names(module)
    names = {parameter: plain(name) for name, parameter in module.named_parameters()}
    saved, groups = state.get("state"), state.get("param_groups")
    if not isinstance(saved, Mapping) or not groups:
        return
    keys = [key for group in groups for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter in zip(keys, parameters, strict=False):
        weight = weights.get(names.get(parameter, ""))
        if key not in saved or not isinstance(weight, Tensor) or weight.dtype != parameter.dtype:
            continue
        kept = optimizer.state[parameter]
        for name, value in saved[key].items():
            if name in kept:
                kept[name] = _as_saved(kept[name], value)


def _as_saved(now: Any, value: Any) -> Any:
    """What was loaded, with each tensor in it as it was saved."""
    if isinstance(now, Tensor) and isinstance(value, Tensor):
        return now if now.dtype == value.dtype else value.to(now.device)
    if isinstance(now, dict) and isinstance(value, Mapping):
        return {key: _as_saved(one, value.get(key)) for key, one in now.items()}
    if isinstance(now, (list, tuple)) and isinstance(value, (list, tuple)) and len(now) == len(value):
        values = [_as_saved(*pair) for pair in zip(now, value, strict=True)]
        return values if isinstance(now, list) else tuple(values)
    return now
