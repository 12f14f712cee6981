"""What a callback is, and what a callback that saves must promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.utilities.rank_zero import warn_once
from holdfast.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class Callback:
    """Code that runs at named moments of a run; override the moments you need.

    Only overridden hooks are called, so a callback costs nothing at the moments that it leaves alone.
    """

    _module: LightningModule | None = None
    """The module of the run that is going on."""

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value as the module's own ``log`` does in the hook of the same name."""
        self.log_dict({name: value}, *args, **kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log every item of a dict; see `log`."""
        if self._module is None:
            warn_once(
                "log without run",
                f"{type(self).__name__}.log({', '.join(map(repr, dictionary))}) was called outside of a run; "
                "the value is not kept.",
            )
        else:
            self._module.log_dict(dictionary, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle does not drag the run along.
        return {name: value for name, value in self.__dict__.items() if name != "_module"}

    @property
    def state_key(self) -> str:
        """The name that this callback's state has in a checkpoint; unique among a trainer's callbacks."""
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """A state key of the class and what tells its objects apart, for a ``state_key`` of your own."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def uses_hook(self, name: str) -> bool:
        """Tell whether ``name`` has to be called on this callback; asked once, when a run starts."""
        return name in self.__dict__ or getattr(type(self), name) is not getattr(Callback, name)

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be in a checkpoint for this callback to go on as if never stopped."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called while a checkpoint is put together; may change ``checkpoint``."""

    def on_save_weights(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called in place of ``on_save_checkpoint`` where weights alone are saved; may change them."""

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called with the whole checkpoint before a run goes on from it."""

    def on_restore_optimizers(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a run goes on from ``checkpoint``: the optimizers are made, their state is not loaded.

        What was added to them while training, such as param groups, is added again here.
        """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when any exception, a keyboard interrupt included, ends the run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins; ``stage`` is which."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict ends; ``stage`` is which."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, before the sanity check."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before the sanity check's validation batches."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the sanity check's validation batches."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins, after the sanity check."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a training epoch begins."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a training epoch ends, validation inside it included."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch begins."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before ``optimizer.zero_grad()``."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called before ``loss.backward()``."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after ``loss.backward()``, before the optimizer steps."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Called before ``optimizer.step()``, with gradients unscaled and not yet clipped."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a validation run begins."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a validation run ends."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a validation epoch begins."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a validation epoch ends."""

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called when a validation batch begins."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called when a validation batch ends."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when testing begins."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when testing ends."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a test epoch begins."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a test epoch ends."""

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called when a test batch begins."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called when a test batch ends."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when prediction begins."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when prediction ends."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a prediction epoch begins."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a prediction epoch ends."""

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called when a prediction batch begins."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called when a prediction batch ends."""


@dataclass
class SavePlan:
    """What one save shall be, decided at the safe point and unchanged from then on.

    Args:
        names: Absolute paths; the first is the file, the others are further names of the same content.
        weights_only: Leave everything out that only resuming needs.
        metrics: The values that belong to this moment, for the file's summary.
        summary_extra: Plain values (as JSON has them) to put beside them in the summary.
        background: The file may be written while training goes on; `Checkpoint.committed` is then called at
            the first safe point after it is durable. Not where it shares the file with a plan that may not.
        on_error: "raise", "retry" or "warn": what a failure to save leads to; among plans that share a file
            the first of these that one of them has.
    """

    names: tuple[str, ...]
    weights_only: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    summary_extra: dict[str, Any] = field(default_factory=dict)
    background: bool = False
    on_error: str = "raise"


class Checkpoint(Callback):
    """A callback that saves by itself: its hooks *request*, the loop saves at its one safe point.

    A hook calls ``trainer.request_save(self)`` and returns. When every hook of that batch or epoch has
    run, the loop goes through these calls, in this order:

    1. ``plan_save(trainer)`` decides from the values of that moment. None: nothing to do. From here on
       ``state_dict()`` gives the state as of *after* the plan's commit, so that the file holds it, while
       the public attributes still show what is on disk.
    2. The payload is captured and the save starts.
    3. ``committed(trainer, plan, report)`` once the file is durable: publish, then delete what retention
       evicts, then tell. Or ``rolled_back(trainer, plan)`` if the save failed: forget the plan. Always before
       the next plan is made, and on the thread that trains. After ``rolled_back`` comes
       ``discarded(trainer, plan)`` where the snapshot was not of one moment, to ask for another one.

    Ranks: all of them make all of these calls; deciding values are the same everywhere, and only rank 0
    touches files in ``committed``.
    """

    def plan_save(self, trainer: Trainer) -> SavePlan | None:
        """Decide what to save now; None when there is nothing to do."""
        return None

    def committed(self, trainer: Trainer, plan: SavePlan, report: Any) -> None:
        """Take note that the planned save is durable."""

    def rolled_back(self, trainer: Trainer, plan: SavePlan) -> None:
        """Forget the planned save: it failed, and what was on disk before is still what is on disk."""

    def discarded(self, trainer: Trainer, plan: SavePlan) -> None:
        """Ask again for a save that came to nothing because tensors changed while they were copied."""
        trainer.request_save(self)
