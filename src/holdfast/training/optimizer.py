"""An optimizer as manual optimization and ``optimizer_step`` see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class LightningOptimizer:
    """An optimizer whose ``step`` counts towards ``trainer.global_step`` and follows the precision.

    Everything else is the wrapped optimizer's, and it passes for one of its class:
    ``isinstance(optimizer, torch.optim.Adam)`` is what it is for the optimizer inside.

    Args:
        optimizer: The optimizer.
        trainer: Whose fit it belongs to; without one, ``step`` is the optimizer's own.
    """

    def __init__(self, optimizer: Optimizer, trainer: Trainer | None = None) -> None:
        self._optimizer = optimizer
        self._trainer = trainer

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer: gradients unscaled, hooks called, the step counted.

        Args:
            closure: Runs forward and backward; None if that is done.
            kwargs: For the optimizer's own ``step``.

        Raises:
            ConfigError: the closure cannot be called.
        """
        if closure is not None and not callable(closure):
            raise ConfigError(
                f"optimizer.step(closure={closure!r}): expected a function without arguments, or None, found "
                f"{type(closure).__name__}."
            )
        if self._trainer is None:
            return self._optimizer.step(closure, **kwargs)
        return self._trainer.optimization.step_optimizer(self._optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """A context in which only this optimizer's parameters require gradients.

        Args:
            sync_grad: Whether processes average the gradients of these backwards; no where more are to be
                added to them first.
        """
        if self._trainer is None:
            raise ConfigError("optimizer.toggle_model() works inside of trainer.fit only.")
        sync = nullcontext() if sync_grad else self._trainer.strategy.block_backward_sync()
        with sync, self._trainer.lightning_module.toggled_optimizer(self._optimizer):
            yield

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # What isinstance asks for besides type(). A subclass of both would have the optimizer's methods run
        # on this object, and what they set would be lost to the optimizer.
        inside: Any = type(self.__dict__.get("_optimizer"))
        return type(self) if inside is type(None) else _class_for(inside)

    def __getattr__(self, name: str) -> Any:
        optimizer = self.__dict__.get("_optimizer")
        if optimizer is None:  # while it is being copied
            raise AttributeError(name)
        return getattr(optimizer, name)

    def __repr__(self) -> str:
        return f"Lightning{self._optimizer!r}"


@cache
def _class_for(cls: Any) -> type[Any]:
    return type(f"Lightning{cls.__name__}", (LightningOptimizer, cls), {})
