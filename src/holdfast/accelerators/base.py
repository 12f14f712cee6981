"""What a kind of device has to answer, and how its indices are spelled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from holdfast.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class Accelerator(ABC):
    """A kind of device. Subclass it for hardware of your own and hand it to ``Trainer(accelerator=...)``."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Any) -> Any:
        """Turn ``Trainer(devices=...)`` into what `get_parallel_devices` takes.

        Raises:
            ConfigError: it means no device of this kind.
        """

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The devices that `parse_devices` found."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """How many devices of this kind this machine has."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Whether there is one."""

    @staticmethod
    def name() -> str:
        """What messages call it."""
        return "accelerator"

    def setup_device(self, device: torch.device) -> None:
        """Make this process use the device; called when a run starts."""

    def setup(self, trainer: Trainer) -> None:
        """Called when a run starts, after `setup_device`."""

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Numbers about the device as it is now, such as its memory."""
        return {}

    def teardown(self) -> None:
        """Called when a run is over."""


def parse_indices(devices: Any, there: int, kind: str) -> list[int]:
    """The indices of the devices that ``Trainer(devices=...)`` means.

    Args:
        devices: "auto", a count, -1 for all, or indices: a list, or text such as "0, 1" or "1,".
        there: How many there are.
        kind: What the message calls them: "GPU".

    Raises:
        ArgumentError: it means none.
        ConfigError: some are not there.
    """
    listed = devices
    if isinstance(devices, str) and "," in devices:
        listed = [part for part in devices.split(",") if part.strip()]
    try:
        if isinstance(listed, (list, tuple)):
            found = [int(index) for index in listed]
        else:
            found = list(range(there if listed in ("auto", -1, "-1") else int(listed)))
    except (TypeError, ValueError):
        found = []
    if isinstance(devices, (bool, float)) or not found or len(set(found)) != len(found):
        raise ArgumentError(
            f"Trainer(devices={devices!r}): expected a number of {kind}s, a list of their indices, -1 or "
            "'auto'."
        )
    if any(index < 0 or index >= there for index in found):
        raise ConfigError(
            f"Trainer(devices={devices!r}): there are {there} {kind}s here: {list(range(there))}."
        )
    return found
