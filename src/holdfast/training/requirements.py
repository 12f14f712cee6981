"""What a module must have for a request to the trainer, and what it must not have."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from holdfast.errors import ArgumentError, ConfigError
from holdfast.training.configuration import what_it_is
from holdfast.training.module import LightningModule
from holdfast.training.sources import has_loader
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

# Hooks of 1.x -> where their work is done today: those that got what the steps returned, and the rest.
_REMOVED = {
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
}
_FORGOTTEN = {
    "training_step_end": "on_train_batch_end",
    "validation_step_end": "on_validation_batch_end",
    "test_step_end": "on_test_batch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
}


def as_module(method: str, model: Any) -> LightningModule:
    """The module that is meant: the one inside, where it was given compiled; its calls stay compiled.

    Raises:
        ArgumentError: it is something else.
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, LightningModule) and isinstance(model, torch._dynamo.OptimizedModule):
        inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)
        return inner
    if not isinstance(model, LightningModule):
        raise ArgumentError(
            f"trainer.{method}(model): expected a holdfast.LightningModule, found {what_it_is(model)}."
        )
    return model


def refuse_removed_hooks(model: LightningModule) -> None:
    """Refuse hooks of 1.x that would be passed over in silence; warn of those that lose less.

    Raises:
        ConfigError: it has one that expects what the steps returned.
    """
    for old, today in _REMOVED.items():
        if callable(getattr(model, old, None)):
            raise ConfigError(
                f"{type(model).__name__}.{old} is a hook of 1.x, which the trainer does not call: use "
                f"{today}. What the steps return is not collected: keep what you need of it in a list on "
                "self."
            )
    for old, today in _FORGOTTEN.items():
        if callable(getattr(model, old, None)):
            rank_zero_warn(
                f"{type(model).__name__}.{old} is a hook of 1.x, which the trainer does not call: use "
                f"{today}."
            )


def check_step_arguments(model: LightningModule, step: str) -> None:
    """Refuse arguments of a step that are not there, by name.

    Raises:
        ConfigError: it takes one.
    """
    takes = inspect.signature(getattr(model, step)).parameters
    name = f"{type(model).__name__}.{step}"
    if "optimizer_idx" in takes:
        raise ConfigError(
            f"{name} takes optimizer_idx, which was gone with Lightning 2.0: set "
            "self.automatic_optimization = False in __init__, and step each of self.optimizers() in "
            "training_step."
        )
    if "dataloader_iter" in takes:
        raise ConfigError(
            f"{name} takes dataloader_iter, which is not there: a run that fetches batches by itself could "
            "not be resumed exactly. Take batch and batch_idx."
        )


def check_fit(trainer: Trainer, model: LightningModule, train: Any) -> None:
    """Refuse a module that cannot be trained, or not with this trainer.

    Raises:
        ConfigError: a hook or the data is missing, or an argument of `Trainer` has no effect.
    """
    name = type(model).__name__
    for hook, what in (
        ("training_step", "computes the loss"),
        ("configure_optimizers", "returns the optimizer"),
    ):
        if not is_overridden(hook, model):
            raise ConfigError(f"{name} has no {hook}. trainer.fit needs it: define {hook}, which {what}.")
    check_step_arguments(model, "training_step")
    if not has_loader(trainer, "train", train):
        raise ConfigError(
            "There is no training data: give trainer.fit(model, train_dataloaders=...), a datamodule, "
            f"or define {name}.train_dataloader."
        )
    if not model.automatic_optimization and (
        trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1
    ):
        raise ConfigError(
            "Trainer(gradient_clip_val=, accumulate_grad_batches=) have no effect with manual optimization. "
            "Leave them out; clip with self.clip_gradients and accumulate in training_step."
        )


def say_half_a_validation(trainer: Trainer, model: LightningModule, val: Any) -> None:
    """Say it where there is a validation step without data, or data without a step."""
    name = type(model).__name__
    steps, data = is_overridden("validation_step", model), has_loader(trainer, "val", val)
    if steps and not data:
        rank_zero_info(f"{name} has a validation_step, but there is no validation data: nothing is validated")
    elif data and not steps:
        rank_zero_warn(f"There is validation data, but {name} has no validation_step: nothing is validated.")
