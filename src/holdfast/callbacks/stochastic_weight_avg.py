"""`StochasticWeightAveraging`: late in training, average the weights of one epoch after the other.

Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_avg_fn

from holdfast.callbacks.averaging import (
    AverageFn,
    average_state,
    averaged_copy,
    exchange,
    is_built,
    load_average,
    say_averaged,
    wait_for_copy,
)
from holdfast.callbacks.base import Callback
from holdfast.callbacks.batch_norm import keeps_statistics, renew_statistics
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn
from holdfast.utilities.wrapped_names import plain_state

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


_CPU = torch.device("cpu")


class AnnealedByCallback(SWALR):
    """Torch's SWALR; only `anneal` steps it, so that the loop may go on stepping what it replaced."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, but for the first step, which the constructor makes."""
        if self._step_count == 0:
            super().step()

    def anneal(self) -> None:
        """Step, at the end of an epoch."""
        # Resumed at an epoch's end, it steps before the optimizer did in this process: torch would warn.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        super().step()


class StochasticWeightAveraging(Callback):
    """Average the weights that each epoch begins with, and leave the model with the average after training.

    From the start epoch on, the learning rate goes to ``swa_lrs`` and stays there: torch's SWALR takes the
    scheduler's place. Training itself, validation and the checkpoint's ``state_dict`` have the weights that
    train; the average is in this callback's state, and ``load_from_checkpoint(path,
    which_weights="averaged")`` takes it from there. Statistics of BatchNorm layers in training mode are
    computed anew for the average at the end: one pass of ``training_step`` over the training data, with a
    copy of the model and generators set aside, so that nothing else changes.

    Args:
        swa_lrs: The learning rate to go to, or one for each of the optimizer's param groups.
        swa_epoch_start: The epoch to start with, counted from 1, or a fraction of the trainer's max_epochs.
        annealing_epochs: Epochs over which the learning rate gets there; 0 for at once.
        annealing_strategy: "cos" or "linear".
        avg_fn: ``(average, weights, number averaged so far) -> average``, for each parameter; None for the
            mean.
        device: Where the average lives; None for where the model is.

    Raises:
        ConfigError: an argument is none of these, or, when fit starts, it does not fit to the run: there is
            not exactly one optimizer, more than one scheduler, another number of param groups, no max_epochs
            to take a fraction of, or BatchNorm in a module that optimizes manually.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AverageFn | None = None,
        device: torch.device | str | None = _CPU,
    ) -> None:
        _check_arguments(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy, avg_fn, device)
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy = annealing_strategy
        self._avg_fn = avg_fn or get_swa_avg_fn()
        self._device = device
        self._max_epochs: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._average_model: AveragedModel | None = None
        self._scheduler: AnnealedByCallback | None = None
        self._latest_update_epoch = -1
        self._loaded: dict[str, Any] | None = None
        self._finished: LightningModule | None = None

    @property
    def swa_start(self) -> int:
        """The first epoch that is averaged, counted from 0; known when fit has started."""
        start = self._swa_epoch_start
        if isinstance(start, float):
            start = int((self._max_epochs or 0) * start)
        return max(start - 1, 0)

    @property
    def swa_end(self) -> int | float:
        """The last epoch that is averaged, counted from 0; infinite where training has no last epoch."""
        return math.inf if self._max_epochs is None else self._max_epochs - 1

    # -- a fit -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit before."""
        if stage == "fit":
            self._forget()
            self._max_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the run is like; make the average, or take it out of the checkpoint."""
        self._check_run(trainer, pl_module)
        # Before training, since a module may keep what cannot be copied from its first step on.
        if is_built(pl_module):
            self._make(pl_module)
        if self._loaded is not None:
            average = self._average_model or self._make(pl_module)
            load_average(average, self._loaded["average_model_state"], strict=pl_module.strict_loading)
            average.n_averaged.fill_(self._loaded["n_averaged"])
            self._loaded = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights into the average, if the epoch is one of those; the first also starts SWALR."""
        epoch = trainer.current_epoch
        if not self.swa_start <= epoch <= self.swa_end or epoch <= self._latest_update_epoch:
            return
        if self._scheduler is None:
            replaced = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            self._replace_scheduler(trainer)
            rank_zero_info(
                "averaging weights from here on: the learning rate goes to "
                f"{self._swa_lrs}{f', SWALR takes the place of {replaced}' if replaced else ''}"
            )
        wait_for_copy(trainer)
        (self._average_model or self._make(pl_module)).update_parameters(pl_module)
        self._latest_update_epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step SWALR, unless a limit has cut the epoch short."""
        batches = trainer.num_training_batches
        if self._scheduler is not None and (trainer.batch_idx + 1 >= batches or math.isinf(batches)):
            self._scheduler.anneal()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model with the average; the weights that trained are kept for a checkpoint."""
        average = self._average_model
        if self._finished is not None or average is None or average.n_averaged == 0:
            return
        wait_for_copy(trainer)
        copied = average.module
        statistics = {id(buffer) for layer in renew_statistics(trainer, copied) for buffer in layer.buffers()}
        exchange(list(copied.parameters()), list(pl_module.parameters()))
        for mine, theirs in zip(copied.buffers(), pl_module.buffers(), strict=True):
            if id(mine) in statistics:
                exchange([mine], [theirs])
            else:
                mine.copy_(theirs)
        self._finished = pl_module

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a run that was already done when it was resumed: no training ends in it."""
        self.on_train_end(trainer, pl_module)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the average and where the averaging stands; after training the weights that trained too."""
        average, finished = self._average_model, self._finished
        copied = None if average is None else average_state(average)
        state: dict[str, Any] = {
            "n_averaged": 0 if average is None else int(average.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._scheduler is None else self._scheduler.state_dict(),
            "average_model_state": copied
            if finished is None
            else plain_state(finished.state_dict(), finished),
        }
        if finished is not None:
            state["current_model_state"] = copied
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; the average follows when fit starts."""
        self._latest_update_epoch = int(state_dict["latest_update_epoch"])
        # Before the first update too: what the average holds then is in every later file.
        if state_dict["average_model_state"] is not None:
            self._loaded = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so where the model has the average by now."""
        self.on_save_weights(trainer, pl_module, checkpoint)

    def on_save_weights(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so where the model has the average by now."""
        if self._finished is not None:
            say_averaged(checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a fit go on from the weights that trained, where it had ended with their average."""
        state = self._state_in(checkpoint)
        if trainer.state.fn == "fit" and state.get("current_model_state") is not None:
            checkpoint["state_dict"] = state["current_model_state"]

    def on_restore_optimizers(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replace the scheduler again, if the checkpoint is from after that."""
        saved = self._state_in(checkpoint).get("scheduler_state")
        if saved is not None:
            scheduler = self._replace_scheduler(trainer)
            scheduler.load_state_dict(saved)
            configs = trainer.lr_scheduler_configs
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in configs]

    def _state_in(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = (checkpoint.get("callbacks") or {}).get(self.state_key) or {}
        return state

    # -- its parts -------------------------------------------------------------------------------------------

    def _make(self, model: LightningModule) -> AveragedModel:
        self._average_model = averaged_copy(model, self._device, type(self).__name__, avg_fn=self._avg_fn)
        return self._average_model

    def _replace_scheduler(self, trainer: Trainer) -> AnnealedByCallback:
        self._scheduler = AnnealedByCallback(
            trainer.optimizers[0],
            swa_lr=self._swa_lrs,  # type: ignore[arg-type]
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
        )
        for config in trainer.lr_scheduler_configs:
            config.scheduler = self._scheduler
        return self._scheduler

    def _check_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
        if len(optimizers) != 1:
            raise ConfigError(
                f"StochasticWeightAveraging works with one optimizer; configure_optimizers returned "
                f"{len(optimizers)}."
            )
        if len(schedulers) > 1:
            raise ConfigError(
                "StochasticWeightAveraging works with one LR scheduler at most; configure_optimizers "
                f"returned {len(schedulers)}."
            )
        groups = len(optimizers[0].param_groups)
        if isinstance(self._swa_lrs, list) and len(self._swa_lrs) != groups:
            raise ConfigError(
                f"StochasticWeightAveraging(swa_lrs={self._swa_lrs}) has {len(self._swa_lrs)} learning rates "
                f"for {groups} param groups. Give one for each, or a float for all."
            )
        if isinstance(self._swa_epoch_start, float) and self._max_epochs is None:
            raise ConfigError(
                f"StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start}) is a fraction of the "
                "trainer's max_epochs, which it does not have. Give the epoch as an int."
            )
        if not pl_module.automatic_optimization and any(map(keeps_statistics, pl_module.modules())):
            raise ConfigError(
                f"StochasticWeightAveraging computes the statistics of BatchNorm with training_step, which "
                f"would train {type(pl_module).__name__}: it optimizes manually. Average its weights with "
                "WeightAveraging."
            )
        if self.swa_start > self.swa_end and not trainer.fast_dev_run:
            rank_zero_warn(
                f"StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start}) averages nothing: "
                f"training ends after {self._max_epochs} epochs."
            )


def _check_arguments(
    swa_lrs: Any, swa_epoch_start: Any, annealing_epochs: Any, strategy: Any, avg_fn: Any, device: Any
) -> None:
    rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
    if not rates or not all(isinstance(rate, float) and rate > 0 for rate in rates):
        found, expected = f"swa_lrs={swa_lrs!r}", "a float above 0, or a list of them"
    elif not (
        (isinstance(swa_epoch_start, int) and swa_epoch_start >= 1)
        or (isinstance(swa_epoch_start, float) and 0 <= swa_epoch_start <= 1)
    ):
        found = f"swa_epoch_start={swa_epoch_start!r}"
        expected = "an epoch, counted from 1, or a float from 0.0 to 1.0"
    elif not isinstance(annealing_epochs, int) or annealing_epochs < 0:
        found, expected = f"annealing_epochs={annealing_epochs!r}", "an int of at least 0"
    elif strategy not in ("cos", "linear"):
        found, expected = f"annealing_strategy={strategy!r}", "'cos' or 'linear'"
    elif avg_fn is not None and not callable(avg_fn):
        found, expected = f"avg_fn={avg_fn!r}", "a function"
    elif device is not None and not isinstance(device, (torch.device, str)):
        found, expected = f"device={device!r}", "a torch.device, its name, or None"
    else:
        return
    raise ConfigError(f"StochasticWeightAveraging({found}): expected {expected}.")
