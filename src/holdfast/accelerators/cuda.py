"""NVIDIA's GPUs, and AMD's through ROCm."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.accelerators.base import Accelerator, parse_indices
from holdfast.errors import ConfigError


class CUDAAccelerator(Accelerator):
    """GPUs as torch.cuda sees them."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Their indices.

        Raises:
            ConfigError: it means none, or some that are not there.
        """
        return parse_indices(devices, torch.cuda.device_count(), "GPU")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The GPUs with these indices."""
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """How many torch sees."""
        return torch.cuda.device_count()

    @staticmethod
    def is_available() -> bool:
        """Whether torch sees one."""
        return torch.cuda.is_available()

    @staticmethod
    def name() -> str:
        """The name in ``Trainer(accelerator="cuda")``."""
        return "cuda"

    def setup_device(self, device: torch.device) -> None:
        """Make it this process's current GPU.

        Raises:
            ConfigError: it is not a GPU.
        """
        if device.type != "cuda":
            raise ConfigError(f"CUDAAccelerator: expected a device such as 'cuda:0', found {str(device)!r}.")
        torch.cuda.set_device(device)

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Statistics of the GPU's memory."""
        return torch.cuda.memory_stats(device)

    def teardown(self) -> None:
        """Give unused memory back to the GPU."""
        torch.cuda.empty_cache()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Indices of GPUs that answer, the first ones first.

    Args:
        num_devices: How many are wanted; -1 for all that there are.

    Raises:
        ConfigError: there are fewer.
    """
    usable: list[int] = []
    for index in range(torch.cuda.device_count()):
        if len(usable) == num_devices:
            break
        try:
            torch.zeros(1, device=torch.device("cuda", index))
        except RuntimeError:
            continue
        usable.append(index)
    if num_devices > len(usable):
        raise ConfigError(
            f"find_usable_cuda_devices({num_devices}): {len(usable)} GPUs can be used: {usable}."
        )
    return usable
