"""Weights into a module: names matched, shapes compared, and then all of them or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from holdfast.checkpoint.payload import encode
from holdfast.errors import CheckpointIncompatible
from holdfast.utilities.rank_zero import rank_zero_warn
from holdfast.utilities.wrapped_names import matched, plain_names

EXTRA_STATE = "_extra_state"
"""The last part of the key under which torch puts what ``get_extra_state`` gives."""


def load_weights(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    source: str,
    omitted: Collection[str] = (),
) -> None:
    """Load weights; what does not fit is listed whole, and then the module is as it was before.

    Names that differ in a wrapper's part only, such as ``_orig_mod.net.weight`` and ``net.weight``, are one.

    Args:
        module: Where to.
        state_dict: From what.
        strict: Whether every key must be on both sides. Shapes must match either way.
        source: The file's name, for the message.
        omitted: Keys that the file could not hold; ``set_extra_state`` is not called for them.

    Raises:
        CheckpointIncompatible: keys or shapes do not match, or with ``strict=False`` not one key does.
    """
    own = module.state_dict()
    state_dict = matched(state_dict, own, module)
    if omitted:
        strict = _without_extra_states(module, own, state_dict, omitted, strict, source)
    problems = _problems(own, state_dict, strict)
    matches_none = bool(own) and bool(state_dict) and not any(key in state_dict for key in own)
    if not problems and not matches_none:
        # Through the module's own method: it, or a child, may have overridden it.
        module.load_state_dict(state_dict, strict=strict)
        return
    # The module may know better: a hook of it may rename keys, an old BatchNorm may do without a counter.
    before = {key: value.detach().clone() for key, value in own.items() if _is_initialised(value)}
    try:
        result = module.load_state_dict(state_dict, strict=strict)
        loaded = not matches_none or len(getattr(result, "missing_keys", own)) < len(own)
        refusal: Exception | None = None
    except Exception as error:
        loaded, refusal = False, error
    if loaded:
        return
    with torch.no_grad():
        for key, value in before.items():
            own[key].copy_(value)
    raise CheckpointIncompatible(
        _message(type(module).__name__, own, state_dict, problems, matches_none, source)
    ) from refusal


def unstorable_extra_states(state_dict: Mapping[str, Any]) -> list[str]:
    """Keys of what ``get_extra_state`` gave that a checkpoint cannot hold any part of."""
    return [
        key
        for key, value in state_dict.items()
        if key.rpartition(".")[2] == EXTRA_STATE and any(not path for path, _ in encode(value).omissions)
    ]


def _without_extra_states(
    module: nn.Module,
    own: dict[str, Any],
    state_dict: Mapping[str, Any],
    omitted: Collection[str],
    strict: bool,
    source: str,
) -> bool:
    """Say what the file could not hold; returns how strict torch may be where nothing else is missing."""
    plain = plain_names(module)
    lost = [key for key in own if plain(key) in omitted and key not in state_dict]
    for key in lost:
        del own[key]
    if lost:
        rank_zero_warn(
            f"{source} could not hold the extra state of {type(module).__name__} ({', '.join(lost)}), so it "
            "is what __init__ made it. Have get_extra_state return plain values and tensors."
        )
    return strict and not (lost and not _problems(own, state_dict, strict))


def _is_initialised(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, UninitializedTensorMixin) and not value.is_meta


def _problems(own: Mapping[str, Any], state_dict: Mapping[str, Any], strict: bool) -> list[str]:
    problems = []
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shared = [(key, value, own[key]) for key, value in state_dict.items() if key in own]
    tensors = [(key, value, mine) for key, value, mine in shared if isinstance(value, Tensor)]
    misshapen = [
        f"{key}: {tuple(value.shape)} in the file, {tuple(mine.shape)} in the model"
        for key, value, mine in tensors
        if isinstance(mine, Tensor)
        and not isinstance(mine, UninitializedTensorMixin)  # has no shape yet, and no attribute for it
        and value.shape != mine.shape
    ]
    no_values = [
        key for key, value, mine in tensors if isinstance(mine, Tensor) and value.is_meta and not mine.is_meta
    ]
    if missing and strict:
        problems.append(f"{len(missing)} missing from the file:\n  " + "\n  ".join(missing))
    if unexpected and strict:
        problems.append(
            f"{len(unexpected)} in the file that the model does not have:\n  " + "\n  ".join(unexpected)
        )
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape:\n  " + "\n  ".join(misshapen))
    if no_values:
        problems.append(f"{len(no_values)} without values, on the device meta:\n  " + "\n  ".join(no_values))
    return problems


def _message(
    name: str,
    own: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    problems: list[str],
    matches_none: bool,
    source: str,
) -> str:
    if matches_none:
        first, there = next(iter(own)), next(iter(state_dict))
        return (
            f"{source} does not fit {name}: not one of its {len(state_dict)} keys is the model's. The model "
            f"has {first!r}, the file has {there!r}. Is it the right file, or is there a prefix to strip?"
        )
    advice = "\nstrict=False loads what matches."
    if any("of another shape" in problem for problem in problems):
        advice = (
            "\nBuild the model with the arguments it was trained with; or remove these keys in "
            "on_load_checkpoint and load with strict=False."
        )
    elif any("without values" in problem for problem in problems):
        advice = "\nLoad it onto a device that has memory, such as the CPU."
    return f"{source} does not fit {name}. Keys " + "\nKeys ".join(problems) + advice
