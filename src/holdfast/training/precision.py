"""In which number format a step computes: full precision, or autocast with or without loss scaling."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.errors import ConfigError

_SPELLINGS: dict[Any, str] = {
    None: "32-true",
    32: "32-true",
    "32": "32-true",
    "32-true": "32-true",
    16: "16-mixed",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
}


class Precision:
    """Full precision: nothing is changed and nothing is added to the step."""

    def __init__(self, precision: str = "32-true") -> None:
        self.precision = precision
        self.scaler: Any = None
        self.context: Any = None
        """Context manager for the forward pass, made once and entered at every step; None for none."""

    @property
    def state_key(self) -> str:
        """Key of this state in a checkpoint, Lightning's."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The gradient scaler's state; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the scaler back."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class MixedPrecision(Precision):
    """Autocast to float16, with a gradient scaler, or to bfloat16.

    Args:
        precision: "16-mixed" or "bf16-mixed".
        device: Device type to autocast for: "cpu", "cuda".
        scaler: A GradScaler of your own for "16-mixed".
    """

    def __init__(self, precision: str, device: str, scaler: Any = None) -> None:
        super().__init__(precision)
        self.device = device
        if precision == "16-mixed":
            self.scaler = scaler if scaler is not None else torch.amp.GradScaler(device)
            self.context = torch.autocast(device, dtype=torch.float16)
        else:
            self.context = torch.autocast(device, dtype=torch.bfloat16)


def make_precision(precision: Any, device: torch.device) -> Precision:
    """The precision for an argument in any of its spellings.

    Raises:
        ConfigError: it is none of them.
    """
    name = _SPELLINGS.get(precision)
    if name is None:
        raise ConfigError(
            f"Trainer(precision={precision!r}): expected one of '32-true', 'bf16-mixed', '16-mixed'."
        )
    return Precision(name) if name == "32-true" else MixedPrecision(name, device.type)
