"""What the saving benchmarks save: a transformer's weights with AdamW's state, or many small tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# As a transformer layer has them: four square matrices, two that are four times as wide, and the norms.
_PARTS = (
    ("attention.query", 1), ("attention.key", 1), ("attention.value", 1), ("attention.output", 1),
    ("mlp.up", 4), ("mlp.down", 4),
)  # fmt: skip


class Weights(nn.Module):
    """``layers`` layers of 32 parameters each, of ``size_bytes`` in all."""

    def __init__(self, size_bytes: int, layers: int = 24) -> None:
        super().__init__()
        floats = size_bytes // 4 // layers
        width = int((floats / 12) ** 0.5)
        self.layers = nn.ModuleList(self._layer(width) for _ in range(layers))

    @staticmethod
    def _layer(width: int) -> nn.ModuleDict:
        layer = nn.ModuleDict()
        for name, times in _PARTS:
            layer[name.replace(".", "_")] = nn.Linear(width, times * width)
        for number in range(10):
            layer[f"norm_{number}"] = nn.LayerNorm(width)
        return layer


def trained(size_bytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module and its AdamW after one step; weights and both moments have ``size_bytes`` together."""
    torch.manual_seed(0)
    module = Weights(size_bytes // 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return module, optimizer


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 1}


def small_tensors(count: int) -> dict[str, Any]:
    """``count`` tensors of 1 KiB."""
    return {"state_dict": {f"t{number}": torch.randn(256) for number in range(count)}}


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a state by a name of their own, as formats need it that know nothing else."""
    found: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                visit(item, f"{path}.{number}")

    visit(state, "")
    return found


def size_of(state: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in flat(state).values())
