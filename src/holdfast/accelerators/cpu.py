"""The CPU."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.accelerators.base import Accelerator
from holdfast.errors import ArgumentError


class CPUAccelerator(Accelerator):
    """The CPU: always there. ``devices`` is the number of processes that share it."""

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """The number of processes.

        Raises:
            ArgumentError: it is not a positive number.
        """
        text = devices.strip() if isinstance(devices, str) else devices
        count = int(text) if isinstance(text, str) and text.isdigit() else text
        count = 1 if count == "auto" else count
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ArgumentError(
                f"Trainer(devices={devices!r}): on the CPU it is a number of processes, at least 1, or "
                "'auto'."
            )
        return count

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The CPU, once for each process."""
        return [torch.device("cpu")] * CPUAccelerator.parse_devices(devices)

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def name() -> str:
        """The name in ``Trainer(accelerator="cpu")``."""
        return "cpu"
