"""Gradients that outlive a batch: in an accumulation window, and where nobody clears them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.wrapped_names import plain_names

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_SEE_GRADIENTS = (
    "backward",
    "configure_gradient_clipping",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_batch_start",
    "optimizer_step",
)
"""Where code of the user's may look at the gradients of parameters that no optimizer holds."""


def gradients(trainer: Trainer, *, half_window: bool) -> dict[str, Tensor] | None:
    """The gradients that the next batch goes on from; None where it starts by clearing them.

    Args:
        trainer: Whose run.
        half_window: More batches are to be added to the gradients that there are.
    """
    found = _gradients(trainer, half_window)
    return trainer.strategy.gradients_to_save(found)


def _gradients(trainer: Trainer, half_window: bool) -> dict[str, Tensor] | None:
    module = trainer.lightning_module
    plain = plain_names(module)
    found = {plain(name): (one, one.grad) for name, one in module.named_parameters() if one.grad is not None}
    if half_window or _kept(trainer):
        return {name: gradient for name, (_, gradient) in found.items()}
    if not any(is_overridden(hook, one) for hook in _SEE_GRADIENTS for one in (module, *trainer.callbacks)):
        return None
    # These nobody clears: they add up from the first batch on.
    cleared = {
        id(one)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for one in group["params"]
    }
    return {name: gradient for name, (one, gradient) in found.items() if id(one) not in cleared} or None


def _kept(trainer: Trainer) -> bool:
    """Whether gradients outlive their step: somebody else clears them, or looks at them before they go."""
    module = trainer.lightning_module
    return (
        not module.automatic_optimization
        or is_overridden("optimizer_zero_grad", module)
        or any(is_overridden("on_before_zero_grad", one) for one in (module, *trainer.callbacks))
        or any(type(optimizer).zero_grad is not Optimizer.zero_grad for optimizer in trainer.optimizers)
    )
