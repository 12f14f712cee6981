"""Names of what a model is made of, with and without what torch.compile and its like put into them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, DDP, FSDP and activation checkpointing put into the names of what they wrap."""


def plain_names(module: nn.Module) -> Callable[[str], str]:
    """A function that gives the name that a parameter, buffer or part would have if nothing were compiled.

    Checkpoints use these names: what was trained compiled goes on without it, and the other way round.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing can be compiled, and importing it takes a second
        return str
    compiled = dynamo.OptimizedModule
    if not _has_part(module, compiled):
        return str
    inner = {
        f"{path}._orig_mod".lstrip(".")
        for path, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, compiled)
    }

    def plain(name: str) -> str:
        parts = name.split(".")
        return ".".join(part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in inner)

    return plain


def _has_part(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module or a part of it is of a kind; without their paths, which cost most of the time."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if isinstance(part, kind):
            return True
        if part is not None:
            waiting += part._modules.values()
    return False


def plain_state(state_dict: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """A module's state under the names that it would have if nothing were compiled."""
    plain = plain_names(module)
    if plain is str:
        return state_dict
    return _renamed(state_dict, {key: plain(key) for key in state_dict}, lambda part: [plain(part)])


def buffers_of(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Every buffer, those that are None too: its plain name, the part that holds it, and its name there."""
    plain = plain_names(module)
    return [
        (plain(f"{path}.{key}" if path else key), part, key)
        for path, part in module.named_modules()
        for key in part._buffers
    ]


def put_buffers(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give buffers values by their plain names: in place where they fit, else as new tensors."""
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for name, owner, key in buffers_of(module):
            if name not in values:
                continue
            value, now = values[name], owner._buffers[key]
            if (
                isinstance(value, Tensor)
                and isinstance(now, Tensor)
                and not is_lazy(now)
                and (value.dtype, value.shape) == (now.dtype, now.shape)
            ):
                now.copy_(value)
            else:
                owner._buffers[key] = value.to(device) if isinstance(value, Tensor) else value


def matched(state_dict: Mapping[str, Any], own: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """A state under the module's own names, where they differ in the parts of wrappers only.

    Args:
        state_dict: What a file holds.
        own: The module's own state.
        module: The module.
    """
    by_core: dict[str, str | None] = {}
    for key in own:
        core = _core(key)
        by_core[core] = None if core in by_core else key  # two of one name: then it says nothing
    renamed = {
        key: target
        for key in state_dict
        if key not in own and (target := by_core.get(_core(key))) is not None and target not in state_dict
    }
    if not renamed or len(set(renamed.values())) < len(renamed):
        return state_dict
    parts: dict[str, list[str]] = {}
    for name, _ in module.named_modules(remove_duplicate=False):
        parts.setdefault(_core(name), []).append(name)
    return _renamed(state_dict, renamed, lambda name: parts.get(_core(name), ()))


def _renamed(
    state_dict: Mapping[str, Any], names: Mapping[str, str], of_part: Callable[[str], Sequence[str]]
) -> Mapping[str, Any]:
    made = OrderedDict((names.get(key, key), value) for key, value in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if isinstance(versions, Mapping):
        # What loading goes by in each module, such as the version of a BatchNorm's state. What is inside of
        # a wrapper comes after it and counts.
        made._metadata = {  # type: ignore[attr-defined]
            target: version for name, version in versions.items() for target in of_part(name)
        }
    return made


def _core(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
