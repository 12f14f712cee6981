"""Every hook a module or datamodule can define, and how the loops find those that are.

Only hooks that somebody overrides are called: the loops ask `bind` once when a run starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from holdfast.strategies.base import Strategy
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.nested import move_to_device

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.training.trainer import Trainer

T = TypeVar("T")


# Hooks of a module that do something although nobody overrides them.
_NOT_EMPTY = ("_model_eval", "_model_zero_grad")


class ModuleHooks:
    """Hooks of a LightningModule; each is called where its name says. Most do nothing by default."""

    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Return -1 to skip the rest of this training epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...

    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...

    def on_validation_model_zero_grad(self) -> None:
        """Frees the gradients' memory before validation between two steps; not in manual optimization."""
        if self.automatic_optimization:  # type: ignore[attr-defined]
            self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        """Puts the model into evaluation mode for validation."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """Called when validation is over and the modules' modes are put back as they were."""

    def on_test_model_eval(self) -> None:
        """Puts the model into evaluation mode for testing."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """Called when testing is over and the modules' modes are put back as they were."""

    def on_predict_model_eval(self) -> None:
        """Puts the model into evaluation mode for prediction."""
        self.eval()  # type: ignore[attr-defined]

    def configure_sharded_model(self) -> None:
        """The old name of `configure_model`."""

    def configure_model(self) -> None:
        """Build what ``__init__`` should not; called before the optimizers are made, and more than once."""


class DataHooks:
    """Hooks about data that a module and a datamodule share."""

    prepare_data_per_node = True
    """Whether one process of each machine prepares the data, or one of the whole job."""

    def prepare_data(self) -> None:
        """Download and the like; called by one process, while the others wait. Set no state here."""

    def setup(self, stage: str) -> None:
        """Called by every process before a stage: "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Called by every process after a stage."""

    def train_dataloader(self) -> Any:
        """Return the training loader."""

    def val_dataloader(self) -> Any:
        """Return the validation loader, or several."""

    def test_dataloader(self) -> Any:
        """Return the test loader, or several."""

    def predict_dataloader(self) -> Any:
        """Return the prediction loader, or several."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it goes to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device; override it for batches of your own types."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device."""
        return batch


class CheckpointHooks:
    """Hooks of a module, datamodule or callback into the checkpoint dict itself."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint, or change it, before it is written."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read from the checkpoint before the state is restored from it."""


def bind(trainer: Trainer, name: str, *, only: str = "") -> tuple[Callable[..., Any], ...]:
    """The overridden implementations of a hook in the order they run: callbacks', module's, strategy's.

    Each callback's is bound to ``(trainer, module)`` already, so that all take the same arguments.

    Args:
        trainer: Whose callbacks and module.
        name: The hook.
        only: "callbacks" or "module" for these alone.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    bound: list[Callable[..., Any]] = []
    if only != "module":
        for callback in trainer.callbacks:
            if callback.uses_hook(name):
                hook = partial(getattr(callback, name), trainer, module)
                bound.append(profiled(trainer, f"[Callback]{callback.state_key}.{name}", hook))
    if (
        only != "callbacks"
        and hasattr(module, name)
        and (is_overridden(name, module) or name.endswith(_NOT_EMPTY))
    ):
        action = f"[LightningModule]{type(module).__name__}.{name}"
        bound.append(profiled(trainer, action, getattr(module, name)))
    if not only and hasattr(strategy, name) and _strategy_has_its_own(name, strategy):
        action = f"[Strategy]{type(strategy).__name__}.{name}"
        bound.append(profiled(trainer, action, getattr(strategy, name)))
    return tuple(bound)


def may_log(trainer: Trainer, name: str) -> bool:
    """Whether code that is not holdfast's own runs in a hook: only that may call ``self.log`` there."""
    hooks = [getattr(callback, name) for callback in trainer.callbacks if callback.uses_hook(name)]
    if is_overridden(name, trainer.lightning_module):
        hooks.append(getattr(trainer.lightning_module, name))
    return any(not getattr(hook, "__module__", "").startswith("holdfast.") for hook in hooks)


def call(trainer: Trainer, name: str, *args: Any, only: str = "") -> None:
    """Call a hook on all that override it, with ``self.log`` knowing which hook it is called from."""
    results = trainer.results
    before, results.fx = results.fx, name
    try:
        for hook in bind(trainer, name, only=only):
            hook(*args)
    finally:
        results.fx = before


def _strategy_has_its_own(name: str, strategy: Strategy) -> bool:
    """Whether it does more for a hook or a step than the one that all strategies have."""
    return is_overridden(name, strategy) or is_overridden(name, strategy, Strategy)


def bind_step(trainer: Trainer, name: str) -> tuple[Callable[..., Any], AbstractContextManager[Any] | None]:
    """A step of the module and the context to enter around it: the strategy's step where it overrides it.

    Args:
        trainer: Whose module and strategy.
        name: "training_step", "validation_step", "test_step" or "predict_step".
    """
    strategy = trainer.strategy
    context = trainer.precision_plugin.context
    step: Callable[..., Any] = getattr(trainer.lightning_module, name)
    if _strategy_has_its_own(name, strategy):
        # It enters the context, or `Strategy`'s own behind it does. It gets what the module's takes.
        step, context = wraps(step)(partial(getattr(strategy, name))), None
    return profiled(trainer, f"[Strategy]{type(strategy).__name__}.{name}", step), context


# -- what takes how long -------------------------------------------------------------------------------------


def profiled(trainer: Trainer, action: str, function: Callable[..., T]) -> Callable[..., T]:
    """The function itself, or where the trainer has an active profiler one that tells it of each call."""
    profiler = trainer.profiler
    if not profiler.active:
        return function

    @wraps(function)  # the loops look at its arguments
    def watched(*args: Any, **kwargs: Any) -> T:
        with profiler.profile(action):
            return function(*args, **kwargs)

    return watched


def profiled_items(trainer: Trainer, action: str, items: Iterator[T]) -> Iterator[T]:
    """The iterator itself, or where the trainer has an active profiler one that tells it of each item."""
    following = profiled(trainer, action, step := lambda: next(items, _END))
    if following is step:
        return items

    def watched() -> Iterator[T]:
        while (item := following()) is not _END:
            yield item

    return watched()


def profile(trainer: Trainer, action: str) -> AbstractContextManager[Any]:
    """A block that is an action for the trainer's profiler."""
    profiler = trainer.profiler
    return profiler.profile(action) if profiler.active else nullcontext()


_END: Any = object()
