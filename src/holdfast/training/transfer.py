"""A batch on its way to the device, through the hooks of whoever overrides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from holdfast.training.hooks import profiled
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.nested import move_to_device

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def make_transfer(trainer: Trainer) -> Callable[[Any, int], Any] | None:
    """A function ``(batch, dataloader_idx) -> batch``, or None where there is nothing to do at all."""
    device, strategy, precision = trainer.strategy.root_device, trainer.strategy, trainer.precision_plugin
    convert = precision.convert_input if precision.converts_input else None
    by_strategy = is_overridden("batch_to_device", strategy)
    owners: dict[str, Any] = {}
    for name in _HOOKS:
        # The datamodule's win, as its loaders do.
        if is_overridden(name, trainer.datamodule):
            owners[name] = trainer.datamodule
        elif is_overridden(name, trainer.lightning_module):
            owners[name] = trainer.lightning_module
    if not owners and not by_strategy:
        if device.type == "cpu":
            return None if convert is None else lambda batch, index: convert(batch)
        action = f"[Strategy]{type(strategy).__name__}.batch_to_device"
        moved = profiled(trainer, action, move_to_device)
        if convert is None:
            return lambda batch, index: moved(batch, device)
        return lambda batch, index: moved(convert(batch), device)
    before = getattr(owners.get(_HOOKS[0]), _HOOKS[0], None)
    move = getattr(owners.get(_HOOKS[1]), _HOOKS[1], None)
    after = getattr(owners.get(_HOOKS[2]), _HOOKS[2], None)

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if convert is not None:
            batch = convert(batch)
        if before is not None:
            batch = before(batch, dataloader_idx)
        if by_strategy:
            batch = strategy.batch_to_device(batch, device, dataloader_idx=dataloader_idx)
        else:
            batch = move_to_device(batch, device) if move is None else move(batch, device, dataloader_idx)
        return batch if after is None else after(batch, dataloader_idx)

    return transfer
