"""What ``Trainer(plugins=...)`` means, beside ``precision=`` and what the strategy brought along."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.checkpoint.checkpoint_io import CheckpointIO
from holdfast.errors import ConfigError
from holdfast.strategies.base import Strategy
from holdfast.strategies.environments import ClusterEnvironment
from holdfast.training.precision import Precision, make_precision

_KINDS: dict[str, type[Any]] = {
    "precision": Precision,
    "CheckpointIO": CheckpointIO,
    "cluster environment": ClusterEnvironment,
}


def environment_of(plugins: Any) -> ClusterEnvironment | None:
    """The cluster environment among a trainer's plugins, which has to be known before its strategy."""
    found: ClusterEnvironment | None = _by_kind(plugins).get("cluster environment")
    return found


def sort_plugins(
    plugins: Any, precision: Any, device: torch.device, strategy: Strategy | None = None
) -> tuple[Precision, ClusterEnvironment | None]:
    """The precision and the cluster environment of a trainer; its strategy gets the checkpoint plugin.

    Args:
        plugins: One plugin, several, or None.
        precision: ``Trainer(precision=...)``.
        device: Where the run computes.
        strategy: Whose own plugins count too; it is given what was found.

    Raises:
        ConfigError: something is no plugin, there are two of a kind, or a precision comes from two places.
    """
    found = _by_kind(plugins)
    number_format = _one_precision(found.get("precision"), precision, device, strategy)
    own_io = None if strategy is None else strategy.given[0]
    checkpoint_io = found.get("CheckpointIO", own_io)
    if own_io is not None and checkpoint_io is not own_io:
        raise ConfigError(
            f"Trainer(plugins=[{type(checkpoint_io).__name__}]) and "
            f"{type(strategy).__name__}(checkpoint_io=...) both give a CheckpointIO. Leave one out."
        )
    if strategy is not None:
        strategy.take(checkpoint_io, number_format)
    return number_format, found.get("cluster environment")


def _by_kind(plugins: Any) -> dict[str, Any]:
    listed = (
        [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple, set)) else [plugins]
    )
    found: dict[str, Any] = {}
    for plugin in listed:
        kind = next((name for name, cls in _KINDS.items() if isinstance(plugin, cls)), None)
        if kind is None:
            told = f"the class {plugin.__name__}" if isinstance(plugin, type) else type(plugin).__name__
            if isinstance(plugin, str):
                told = repr(plugin)
            raise ConfigError(
                "Trainer(plugins=[...]): expected objects of Precision, CheckpointIO or ClusterEnvironment, "
                f"found {told}."
            )
        if kind in found:
            raise ConfigError(
                f"Trainer(plugins=[...]): {type(found[kind]).__name__} and {type(plugin).__name__} are both "
                f"a {kind}. Leave one out."
            )
        found[kind] = plugin
    return found


def _one_precision(
    plugin: Precision | None, argument: Any, device: torch.device, strategy: Strategy | None
) -> Precision:
    of_strategy = None if strategy is None else strategy.given[1]
    sources = {
        f"precision={argument!r}": argument,
        f"plugins=[{type(plugin).__name__}]": plugin,
        f"strategy={type(strategy).__name__}(precision_plugin={type(of_strategy).__name__})": of_strategy,
    }
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        raise ConfigError(f"Trainer({', '.join(given)}): each gives a precision. Leave one out.")
    for chosen in (plugin, of_strategy):
        if chosen is not None:
            return chosen
    return make_precision(argument, device)
