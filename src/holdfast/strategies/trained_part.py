"""What DistributedDataParallel is shown of a LightningModule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule

STEP = object()
"""As the first argument: it is the training step that is called."""


class TrainedPart(nn.Module):
    """What the wrapper sees of a module: its weights, and the training step as one more way to call it."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        if ignored is not None:
            self._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name in ignored]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is STEP:
            return self.module.training_step(*args[1:], **kwargs)
        return self.module(*args, **kwargs)


def trainable(module: LightningModule) -> dict[str, nn.Parameter]:
    """What is trained by its name, also where another optimizer is toggled on at the moment."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", None) or ())
    toggled: dict[nn.Parameter, bool] = getattr(module, "_toggled", {})
    return {
        name: one
        for name, one in module.named_parameters()
        if toggled.get(one, one.requires_grad) and name not in ignored
    }


@contextmanager
def untoggled(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A block in which these parameters require gradients."""
    off = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in off:
        parameter.requires_grad = True
    try:
        yield
    finally:
        for parameter in off:
            parameter.requires_grad = False
