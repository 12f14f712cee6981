"""TorchMetrics objects in a checkpoint: their states, and what collections and wrappers know besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.utilities.wrapped_names import plain_names


def capture(module: nn.Module, objects: Mapping[str, Any]) -> dict[str, Any]:
    """All that the TorchMetrics objects in a module have gathered, for `restore`.

    Args:
        module: The module.
        objects: What `found_in` found in it.
    """
    return {
        "objects": {path: _metric_state(metric) for path, metric in objects.items()},
        "groups": {path: one._groups for path, one in _collections(module).items() if one._groups_checked},
        "trackers": {path: int(tracker.n_steps) for path, tracker in _trackers(module).items()},
    }


def restore(module: nn.Module, state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Put back what `capture` gave; returns the objects by path."""
    for path, tracker in _trackers(module).items():
        while tracker.n_steps < state.get("trackers", {}).get(path, 0):
            tracker.increment()
    objects = found_in(module)
    for path, saved in state["objects"].items():
        if path in objects:
            _restore_metric(objects[path], saved, device)
    for path, collection in _collections(module).items():
        if path in state.get("groups", {}):
            _restore_groups(collection, state["groups"][path])
    return objects


def found_in(module: nn.Module) -> dict[str, Any]:
    """The TorchMetrics objects in a module, by path. Their states are in no ``state_dict`` by default.

    Those in a list, tuple or dict that is an attribute are found too, though torch does not register them.
    """
    plain = plain_names(module)
    found: dict[str, Any] = {}
    for path, child in module.named_modules():
        if _is_metric(child):
            found[plain(path)] = child
        for name, held in vars(child).items():
            # By its type: what is referred to weakly may be gone, and then it answers no question.
            if name[:1] == "_" or not issubclass(type(held), (list, tuple, dict)):
                continue
            for key, one in held.items() if isinstance(held, dict) else enumerate(held):
                if isinstance(one, nn.Module):
                    where = f"{path}.{name}[{key!r}]".lstrip(".")
                    parts = {inner: part for inner, part in one.named_modules() if _is_metric(part)}
                    found.update({f"{where}.{inner}".rstrip("."): part for inner, part in parts.items()})
    return found


def _is_metric(value: Any) -> bool:
    # Of every layer of a network the first is asked, and what a module lacks is slow to ask for by hasattr.
    return "_defaults" in vars(value) and hasattr(value, "_update_count") and hasattr(value, "compute")


def _trackers(module: nn.Module) -> dict[str, Any]:
    """The MetricTrackers in a module: they get one metric more at each ``increment``."""
    plain = plain_names(module)
    return {
        plain(path): child
        for path, child in module.named_modules()
        if hasattr(type(child), "n_steps") and hasattr(type(child), "increment")
    }


def _collections(module: nn.Module) -> dict[str, Any]:
    """The MetricCollections in a module that share states between metrics which compute them alike."""
    plain = plain_names(module)
    return {
        plain(path): child
        for path, child in module.named_modules()
        if "_groups_checked" in vars(child) and "_groups" in vars(child)
    }


def _restore_groups(collection: Any, groups: dict[int, list[str]]) -> None:
    """Share states as they were shared: the groups are found at the first update, by comparing values."""
    if _members(groups) == _members(collection._groups):
        collection._groups = {index: list(names) for index, names in groups.items()}
        collection._groups_checked, collection._state_is_copy = True, False
        collection.values(copy_state=False)  # where torchmetrics makes the references


def _members(groups: Mapping[int, list[str]]) -> list[str]:
    return sorted(name for names in groups.values() for name in names)


def _metric_state(metric: Any) -> dict[str, Any]:
    return {
        "states": {name: getattr(metric, name) for name in metric._defaults},
        "updates": metric._update_count,
        "beside": {name: vars(metric)[name] for name in _kept_beside(metric)},
    }


def _kept_beside(metric: Any) -> list[str]:
    """What torchmetrics' wrappers keep besides their states: extremes seen, the number of values seen."""
    if not any(cls.__module__.startswith("torchmetrics.wrappers.") for cls in type(metric).__mro__[:-1]):
        return []
    of_each = {"_update_count", "_computed", "_forward_cache", *metric._defaults}
    return [
        name
        for name, value in vars(metric).items()
        if name not in of_each
        and (isinstance(value, Tensor) or (name.startswith("_num") and isinstance(value, int)))
    ]


def _restore_metric(metric: Any, saved: dict[str, Any], device: torch.device) -> None:
    for name, value in saved["states"].items():
        # Copies: metrics of one compute group shared their states, and each is updated by itself at first.
        copied = (
            value.to(device, copy=True)
            if isinstance(value, Tensor)
            else [item.to(device, copy=True) for item in value]
        )
        setattr(metric, name, copied)
    for name, value in saved.get("beside", {}).items():
        setattr(metric, name, value.to(device) if isinstance(value, Tensor) else value)
    metric._update_count = saved["updates"]
    metric._computed = None
