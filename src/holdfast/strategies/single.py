"""One process, one device."""

from __future__ import annotations

from typing import TypeVar

import torch

from holdfast.errors import ConfigError

T = TypeVar("T")


class SingleDeviceStrategy:
    """Everything on one device; agreement is immediate."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def root_device(self) -> torch.device:
        """The device."""
        return self._device

    @property
    def global_rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def local_rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    @property
    def is_global_zero(self) -> bool:
        """Always True."""
        return True

    def barrier(self, name: str = "") -> None:
        """There is nobody to wait for."""

    def broadcast(self, obj: T, src: int = 0) -> T:
        """The object itself."""
        return obj

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The decision itself."""
        return decision


def choose_device(accelerator: str, devices: int | str | list[int]) -> torch.device:
    """The one device that ``Trainer(accelerator=, devices=)`` means.

    Raises:
        ConfigError: it is not here, or more than one is asked for.
    """
    known = ("auto", "cpu", "gpu", "cuda", "mps")
    if accelerator not in known:
        raise ConfigError(
            f"Trainer(accelerator={accelerator!r}): expected one of {', '.join(map(repr, known))}."
        )
    index = 0
    if isinstance(devices, list) and len(devices) == 1:
        index = devices[0]
    elif devices not in (1, "1", "auto", -1, "-1"):
        raise ConfigError(
            f"Trainer(devices={devices!r}): one process on one device is what there is so far. Use devices=1."
        )
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        if accelerator == "gpu" and torch.backends.mps.is_available():
            return torch.device("mps")
        raise ConfigError(
            f"Trainer(accelerator={accelerator!r}): torch sees no GPU here. Use accelerator='auto'."
        )
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", index)
    if accelerator == "mps":
        return torch.device("mps")
    return torch.device("cpu")
