"""What of a model's and its callbacks' state is in no checkpoint, as far as can be seen before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.training.optimizer import LightningOptimizer
from holdfast.utilities.attributes import attributes_of
from holdfast.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def reasons(trainer: Trainer) -> Iterator[str]:
    """One full sentence, which names the remedy, for each thing that a resume starts anew with.

    Args:
        trainer: Whose optimizers are made and whose callbacks are set up.
    """
    yield from _kept_apart(trainer)
    yield from _copies(trainer)


def _kept_apart(trainer: Trainer) -> Iterator[str]:
    """Optimizers and schedulers that the module made, keeps, and did not return."""
    module = trainer.lightning_module
    if is_overridden("on_save_checkpoint", module):
        return
    waiting: list[Any] = [*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]
    known: set[int] = set()
    while waiting:  # what is in others, as in SequentialLR or an optimizer that wraps one, is theirs to save
        one = waiting.pop()
        if id(one) in known:
            continue
        known.add(id(one))
        for _, value in attributes_of(one):
            parts = value if isinstance(value, (list, tuple)) else [value]
            waiting += [part for part in parts if isinstance(part, (Optimizer, LRScheduler))]
    for name, value in attributes_of(module):
        if isinstance(value, LightningOptimizer) or id(value) in known:
            continue
        if isinstance(value, (Optimizer, LRScheduler)):
            yield (
                f"{type(module).__name__}.{name} is a {type(value).__name__} that configure_optimizers did "
                "not return, so its state is in no checkpoint. Return it, or save it in on_save_checkpoint."
            )


def _copies(trainer: Trainer) -> Iterator[str]:
    """Copies of the model or of a part of it, such as a momentum encoder, in callbacks that save no state."""
    module = trainer.lightning_module
    forms: set[Any] | None = None
    for callback in trainer.callbacks:
        if any(is_overridden(hook, callback) for hook in ("state_dict", "on_save_checkpoint")):
            continue
        if type(callback).__module__.startswith("holdfast."):
            continue
        for name, value in attributes_of(callback):
            if name == "_module" or not isinstance(value, nn.Module) or not list(value.parameters()):
                continue
            if forms is None:
                forms = {_form(part) for part in module.modules()}
            if _form(value) in forms and not any(value is part for part in module.modules()):
                yield (
                    f"{type(callback).__name__}.{name} is a copy of the model, or of a part of it, and is in "
                    f"no checkpoint. Give {type(callback).__name__} state_dict and load_state_dict."
                )


def _form(module: nn.Module) -> Any:
    shapes = ((name, None if is_lazy(one) else one.shape) for name, one in module.named_parameters())
    return type(module), tuple(shapes)
