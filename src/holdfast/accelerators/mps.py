"""Apple's GPU."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.accelerators.base import Accelerator, parse_indices


class MPSAccelerator(Accelerator):
    """The one GPU of an Apple machine."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Its index, 0.

        Raises:
            ConfigError: it means more than that one.
        """
        return parse_indices(devices, 1, "GPU")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """That GPU."""
        return [torch.device("mps", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Whether this torch was built for it, and it is there."""
        return torch.backends.mps.is_available()

    @staticmethod
    def name() -> str:
        """The name in ``Trainer(accelerator="mps")``."""
        return "mps"

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """How much memory torch and its driver hold, in bytes."""
        return {
            "allocated_bytes": torch.mps.current_allocated_memory(),
            "driver_allocated_bytes": torch.mps.driver_allocated_memory(),
        }
