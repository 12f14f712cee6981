"""Every hook a module or datamodule can define, and how the loops find those that are.

Only hooks that somebody overrides are called: the loops ask `bind` once when a run starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.training.data import move_to_device

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.training.trainer import Trainer


class ModuleHooks:
    """Hooks of a LightningModule; each is called where its name says. All do nothing unless overridden."""

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
        """Frees the gradients' memory before validation, unless an accumulation is under way."""
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

    def configure_model(self) -> None:
        """Build what ``__init__`` should not; called before the optimizers are made, and more than once."""


class DataHooks:
    """Hooks about data that a module and a datamodule share."""

    def prepare_data(self) -> None:
        """Download and the like; called by one process. Set no state here."""

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


def is_overridden(name: str, owner: Any) -> bool:
    """True if ``owner`` or its class defines the hook, rather than inheriting holdfast's no-op."""
    if owner is None:
        return False
    if name in vars(owner):
        return True
    for cls in type(owner).__mro__:
        if name in vars(cls):
            return not cls.__module__.startswith("holdfast.training.")
    return False


def bind(trainer: Trainer, name: str, *, only: str = "") -> tuple[Callable[..., Any], ...]:
    """The overridden implementations of a hook in the order they run: callbacks', then the module's.

    Each callback's is bound to ``(trainer, module)`` already, so that all take the same arguments.

    Args:
        trainer: Whose callbacks and module.
        name: The hook.
        only: "callbacks" or "module" for these alone.
    """
    module = trainer.lightning_module
    bound: list[Callable[..., Any]] = []
    if only != "module":
        bound += [
            partial(getattr(callback, name), trainer, module)
            for callback in trainer.callbacks
            if callback.uses_hook(name)
        ]
    if (
        only != "callbacks"
        and hasattr(module, name)
        and (is_overridden(name, module) or name.endswith("_model_eval"))
    ):
        bound.append(getattr(module, name))
    return tuple(bound)


def call(trainer: Trainer, name: str, *args: Any, only: str = "") -> None:
    """Call a hook on all that override it, with ``self.log`` knowing which hook it is called from."""
    results = trainer.results
    before, results.fx = results.fx, name
    try:
        for hook in bind(trainer, name, only=only):
            hook(*args)
    finally:
        results.fx = before
