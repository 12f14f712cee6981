"""BatchNorm layers that use the statistics of the global batch, for as long as a run lasts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.errors import ConfigError


class SyncedBatchNorms:
    """A module's BatchNorm layers, replaced by `torch.nn.SyncBatchNorm` until `revert`.

    Args:
        module: Whose; its other parts stay the objects that they are.
        device: Where it trains.

    Raises:
        ConfigError: torch has no such layer for the device.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        found = [
            (parent, name, layer)
            for parent in list(module.modules())
            for name, layer in parent._modules.items()
            if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
        ]
        if found and device.type == "cpu":
            layers = [path for path, part in module.named_modules() if isinstance(part, _BatchNorm)]
            raise ConfigError(
                f"Trainer(sync_batchnorm=True): torch has no SyncBatchNorm for the CPU, and "
                f"{type(module).__name__} has BatchNorm layers: {', '.join(layers)}. Train on GPUs, or leave "
                "sync_batchnorm out: each process then uses the statistics of its own part of a batch."
            )
        made: dict[int, nn.Module] = {}
        for parent, name, layer in found:
            if id(layer) not in made:
                made[id(layer)] = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
            parent._modules[name] = made[id(layer)]
            self._replaced.append((parent, name, layer, made[id(layer)]))

    def revert(self) -> None:
        """Put the layers that were there back, with the values that there are now."""
        for parent, name, before, synced in self._replaced:
            before._parameters.update(synced._parameters)
            before._buffers.update(synced._buffers)
            before.training = synced.training
            if parent._modules.get(name) is synced:
                parent._modules[name] = before
        self._replaced = []
