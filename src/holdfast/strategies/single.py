"""One process, one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from holdfast.strategies.base import Strategy

if TYPE_CHECKING:
    from holdfast.accelerators.base import Accelerator
    from holdfast.checkpoint.checkpoint_io import CheckpointIO
    from holdfast.training.precision import Precision

T = TypeVar("T")


class SingleDeviceStrategy(Strategy):
    """Everything on one device; agreement is immediate.

    Args:
        device: The device; an int is a GPU's index.
        accelerator: The kind of device; None lets the trainer choose.
        checkpoint_io: What writes and reads checkpoints; None for holdfast's own engine.
        precision_plugin: The number format; None lets the trainer's ``precision=`` decide.
    """

    strategy_name = "single_device"

    def __init__(
        self,
        device: torch.device | str | int = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self._device = torch.device(device)

    @property
    def root_device(self) -> torch.device:
        """The device."""
        return self._device

    @property
    def is_global_zero(self) -> bool:
        """Always True."""
        return True

    def barrier(self, name: str | None = None) -> None:
        """There is nobody to wait for."""

    def broadcast(self, obj: T, src: int = 0) -> T:
        """The object itself."""
        return obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The value itself."""
        return tensor

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """The tensor itself."""
        return tensor
