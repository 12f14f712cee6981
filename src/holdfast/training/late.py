"""Which tensors a save may still be copying while the next batch runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from holdfast.callbacks.lambda_function import LambdaCallback
from holdfast.checkpoint import stateful
from holdfast.training.progress import END
from holdfast.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.training.trainer import Trainer

_BEFORE_BACKWARD = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward")
"""The hooks between a save and the place where the step waits for the rest of its copy."""


def tensors(trainer: Trainer) -> list[Tensor]:
    """Those that nothing but an optimizer's step should change: what it trains, and its own state.

    Everything else may change in a forward pass or in a hook: buffers, gradients, frozen weights and
    averages of weights. That these do not is assumed here and checked by the engine, which says what it found
    changed. Known to break it, and left out: embeddings with ``max_norm``, which forward rescales, and
    optimizers that change weights outside of their steps (`stateful.steps_otherwise`). Nothing is late
    if somebody's own hook comes before backward, or begins the next epoch where one has just ended: it may
    change a few weights now and then, which the engine does not find out by comparing the first snapshots.
    """
    hooks: tuple[str, ...] = _BEFORE_BACKWARD
    if trainer.progress.stage == END:
        hooks = ("on_train_epoch_start", *hooks)
    if any(_somebody_uses(hook, trainer) for hook in hooks):
        return []
    rescaled = {
        id(layer.weight)
        for layer in trainer.lightning_module.modules()
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None
    }
    found: dict[int, Tensor] = {}
    for optimizer in trainer.optimizers:
        if not stateful.steps_otherwise(optimizer):
            found.update((id(one), one) for one in _of(optimizer) if id(one) not in rescaled)
    return list(found.values())


def _somebody_uses(hook: str, trainer: Trainer) -> bool:
    """Whether the hook is more than holdfast's own."""
    callbacks = (one for one in trainer.callbacks if one.uses_hook(hook))
    return any(is_overridden(hook, one) for one in (trainer.lightning_module, trainer.strategy)) or any(
        not type(one).__module__.startswith("holdfast.") or isinstance(one, LambdaCallback)
        for one in callbacks
    )


def _of(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (one for one in group["params"] if one.requires_grad)
    for state in optimizer.state.values():
        values: Any = state.values() if isinstance(state, dict) else ()
        yield from (one for one in values if isinstance(one, Tensor))
