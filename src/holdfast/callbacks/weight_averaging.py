"""`WeightAveraging` and `EMAWeightAveraging`: an average of the weights beside those that train.

Validation, the checkpoint's ``state_dict`` and the model after training get the average; training gets the
current weights, on resume too. Lightning's names in the file: ``current_model_state``, ``averaging_state``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from holdfast.callbacks.averaging import (
    average_state,
    averaged_copy,
    combining,
    exchange,
    is_built,
    load_average,
    say_averaged,
    wait_for_copy,
)
from holdfast.callbacks.base import Callback
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_warn
from holdfast.utilities.types import STEP_OUTPUT
from holdfast.utilities.wrapped_names import buffers_of, put_buffers

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class WeightAveraging(Callback):
    """Keep an average of the weights: by default the mean over all steps; `should_update` chooses the steps.

    Validation runs on the average, checkpoints hold it under ``state_dict`` (and the weights that train under
    ``current_model_state``), and it is what the model holds when training ends.
    ``load_from_checkpoint(path, which_weights="raw")`` takes those that train. Until the first update the
    average is the current weights. Integer and boolean buffers, such as counters, are never averaged, and
    what does not change, such as a mask of infinities, stays as it is to the bit.

    Args:
        device: Where the average lives; None for where the model is.
        use_buffers: Average buffers too; otherwise they are copied at each update.
        kwargs: ``avg_fn`` or ``multi_avg_fn``, as `torch.optim.swa_utils.AveragedModel` takes them.

    Raises:
        ConfigError: another argument, both functions, a trainer with two of these callbacks, or a model that
            cannot be copied.
    """

    def __init__(
        self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        unknown = sorted(set(kwargs) - {"avg_fn", "multi_avg_fn"})
        if unknown:
            raise ConfigError(
                f"{name}({unknown[0]}=...): there is no such argument. Besides its own, {name} takes avg_fn= "
                "or multi_avg_fn=, for torch's AveragedModel."
            )
        if kwargs.get("avg_fn") is not None and kwargs.get("multi_avg_fn") is not None:
            raise ConfigError(f"{name}(avg_fn=, multi_avg_fn=) exclude each other. Give one of them.")
        self._device = device
        self._use_buffers = use_buffers
        self._combine = combining(kwargs.get("avg_fn"), kwargs.get("multi_avg_fn"))
        self._forget()

    def _forget(self) -> None:
        self._average_model: AveragedModel | None = None
        self._loaded: tuple[dict[str, Any], Tensor, dict[str, Any]] | None = None
        self._latest_update_step = 0
        self._swapped = self._ended = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Tell whether the average takes the weights in now; override it to choose.

        Args:
            step_idx: The optimizer step that was just done, from 0; None at the end of an epoch.
            epoch_idx: The epoch that ends, from 0; None after a step.
        """
        return step_idx is not None

    # -- a fit -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit before."""
        if stage != "fit":
            return
        others = [one for one in trainer.callbacks if isinstance(one, WeightAveraging)]
        if len(others) > 1:
            raise ConfigError(
                f"The trainer has {len(others)} callbacks that average weights: "
                f"{', '.join(type(one).__name__ for one in others)}. A model is validated and saved with one "
                "average. Leave one of them."
            )
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average, or take it out of the checkpoint."""
        # Before training, since a module may keep what cannot be copied from its first step on.
        if is_built(pl_module):
            self._make(pl_module)
        if self._loaded is not None:
            average = self._average_model or self._make(pl_module)
            weights, count, buffers = self._loaded
            load_average(average, weights, strict=pl_module.strict_loading)
            put_buffers(average.module, buffers)
            average.n_averaged.copy_(count)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after a step, if it is one to take in."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(trainer, pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the average at the end of an epoch, if it is one to take in."""
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._update(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model the average to be validated."""
        if trainer.state.fn == "fit" and not self._swapped:
            self._swap(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its own weights back."""
        if trainer.state.fn == "fit" and self._swapped:
            self._swap(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model with the average; the weights that trained are kept for a checkpoint."""
        if not self._ended:
            self._ended = True
            self._swap(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a run that was already done when it was resumed: no training ends in it."""
        self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its own weights back if validation was interrupted."""
        if self._swapped and not self._ended:
            self._swap(trainer, pl_module)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last update; the weights are at the checkpoint's top level."""
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._latest_update_step = int(state_dict["latest_update_step"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average into the place of the weights, and these beside it."""
        current = checkpoint["state_dict"]
        average = self._average_model
        if average is not None and self._swapped:
            current = average_state(average)
        self.on_save_weights(trainer, pl_module, checkpoint)
        checkpoint["current_model_state"] = current
        checkpoint["averaging_state"] = {
            "n_averaged": torch.tensor(0) if average is None else average.n_averaged
        }
        if average is not None:
            self._save_buffers(average, checkpoint)

    def _save_buffers(self, average: AveragedModel, checkpoint: dict[str, Any]) -> None:
        """Write down the average's buffers of those that training changes and no state_dict holds."""
        own: dict[str, Any] = checkpoint.get("holdfast", {})
        of_model = own.get("model", {}).get("buffers", {})
        if not of_model:
            return
        copies = {name: part._buffers[key] for name, part, key in buffers_of(average.module)}
        of_copy = {name: copies[name] for name in of_model if name in copies}
        if self._swapped:
            of_model, of_copy = of_copy, of_model
        own["model"]["buffers"], own["averaged_buffers"] = of_model, of_copy

    def on_save_weights(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average under ``state_dict``: all that a file of weights only needs."""
        average = self._average_model
        if average is None or average.n_averaged == 0:
            return
        say_averaged(checkpoint)
        if not self._swapped:
            checkpoint["state_dict"] = average_state(average)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a fit go on from the weights that trained; everything else gets the average."""
        if trainer.state.fn != "fit":
            return
        if "current_model_state" not in checkpoint:
            rank_zero_warn(
                f"The checkpoint has no averaged weights: {type(self).__name__} starts to "
                "average anew, from its weights."
            )
            return
        count = torch.as_tensor(checkpoint["averaging_state"]["n_averaged"])
        if count > 0:
            buffers = checkpoint.get("holdfast", {}).get("averaged_buffers", {})
            self._loaded = checkpoint["state_dict"], count, buffers
        checkpoint["state_dict"] = checkpoint["current_model_state"]

    # -- the average -----------------------------------------------------------------------------------------

    def _make(self, model: LightningModule) -> AveragedModel:
        self._average_model = averaged_copy(
            model,
            self._device,
            type(self).__name__,
            multi_avg_fn=self._combine,
            use_buffers=self._use_buffers,
        )
        return self._average_model

    def _update(self, trainer: Trainer, model: LightningModule) -> None:
        wait_for_copy(trainer)
        average = self._average_model or self._make(model)
        changing: list[tuple[Tensor, Tensor, Tensor]] = []
        if self._use_buffers and average.n_averaged > 0:
            for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
                if mine.is_floating_point():
                    changing.append((mine, mine.clone(), theirs))
        average.update_parameters(model)
        for mine, before, theirs in changing:
            # The mean of two equal infinities is not a number.
            mine.copy_(torch.where(before == theirs.to(mine.device), before, mine))

    def _swap(self, trainer: Trainer, model: LightningModule) -> None:
        average = self._average_model
        if average is None or average.n_averaged == 0:
            return
        wait_for_copy(trainer)
        exchange(list(average.module.parameters()), list(model.parameters()))
        for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
            # What training never changes, such as a mask, is not to look as if it did.
            if mine.device != theirs.device or not torch.equal(mine, theirs):
                exchange([mine], [theirs])
        self._swapped = not self._swapped


class EMAWeightAveraging(WeightAveraging):
    """Keep an exponential moving average of the weights: ``decay * average + (1 - decay) * weights``.

    Args:
        device: Where the average lives; None for where the model is.
        use_buffers: Average buffers too; otherwise they are copied at each update.
        decay: The average's share at each update, from 0 to 1.
        update_every_n_steps: Update after the optimizer steps that this divides, counted from 0.
        update_starting_at_step: Leave out the steps before this one, counted from 0.
        update_starting_at_epoch: From this epoch on, counted from 0, update when an epoch ends too.
        kwargs: Nothing more is taken.

    Raises:
        ConfigError: ``decay`` is not from 0 to 1, ``update_every_n_steps`` is not an int above 0, or an
            averaging function is given.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = sorted(set(kwargs) & {"avg_fn", "multi_avg_fn"})
        if given:
            raise ConfigError(
                f"EMAWeightAveraging({given[0]}=...): it has its averaging function already. Use "
                f"WeightAveraging({given[0]}=...)."
            )
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"EMAWeightAveraging(decay={decay!r}) must be a number from 0 to 1.")
        if not isinstance(update_every_n_steps, int) or update_every_n_steps < 1:
            raise ConfigError(
                f"EMAWeightAveraging(update_every_n_steps={update_every_n_steps!r}) must be an int of at "
                "least 1."
            )
        super().__init__(device, use_buffers, multi_avg_fn=get_ema_multi_avg_fn(decay), **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Tell whether the average takes the weights in now, as the arguments say."""
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            return begun and step_idx % self.update_every_n_steps == 0
        if epoch_idx is not None:
            return self.update_starting_at_epoch is not None and epoch_idx >= self.update_starting_at_epoch
        return False
