"""Log learning rates, and on request momentum and weight decay, when an epoch or a step begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from holdfast.callbacks.base import Callback
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.training.configured import LRSchedulerConfig
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


@dataclass(frozen=True)
class Watched:
    """One optimizer under one name.

    Args:
        name: The scheduler's name, or one made from the optimizer's class.
        optimizer: Whose param groups are read.
        interval: When its scheduler steps, "step" or "epoch"; None without a scheduler, which is logged at
            both.
    """

    name: str
    optimizer: Optimizer
    interval: str | None


def find_watched(configs: list[LRSchedulerConfig], optimizers: list[Optimizer]) -> list[Watched]:
    """Name every scheduler's optimizer, then those without a scheduler.

    A scheduler's own name comes first; else it is ``lr-SGD`` after the class, then ``lr-SGD-1`` and so on.
    """
    seen: Counter[type] = Counter()

    def name_of(optimizer: Optimizer) -> str:
        number = seen[type(optimizer)]
        seen[type(optimizer)] += 1
        return f"lr-{type(optimizer).__name__}" + (f"-{number}" if number else "")

    found = [
        Watched(one.name or name_of(one.scheduler.optimizer), one.scheduler.optimizer, one.interval)
        for one in configs
    ]
    scheduled = [one.optimizer for one in found]
    rest = [one for one in optimizers if not any(one is other for other in scheduled)]
    return found + [Watched(name_of(optimizer), optimizer, None) for optimizer in rest]


def group_names(name: str, groups: list[dict[str, Any]]) -> list[str]:
    """Name each param group: by its "name" if it has one, by its number if there are several.

    Raises:
        ConfigError: Two groups have the same name.
    """
    given = Counter(group["name"] for group in groups if "name" in group)
    twice = sorted(repr(one) for one, count in given.items() if count > 1)
    if twice:
        raise ConfigError(
            f"LearningRateMonitor: {name} has several param groups named {', '.join(twice)}, so their values "
            'would be logged over each other. Give each group a "name" of its own.'
        )
    return [
        f"{name}/{group['name']}" if "name" in group else f"{name}/pg{i}" if len(groups) > 1 else name
        for i, group in enumerate(groups, start=1)
    ]


class LearningRateMonitor(Callback):
    """Log the learning rates to every logger and into ``trainer.callback_metrics``.

    A scheduler that steps in each epoch is logged when an epoch begins; one that steps in each step, when a
    step begins whose metrics are logged (``log_every_n_steps``); an optimizer without one, at both. A step
    that logs nothing costs one comparison, and not even that where no rate is logged in steps.

    Args:
        logging_interval: "step" or "epoch" logs all of them only then.
        log_momentum: Log ``<name>-momentum`` too: momentum, or the first of the betas, else 0.
        log_weight_decay: Log ``<name>-weight_decay`` too; 0 for an optimizer that has none.

    Raises:
        ConfigError: Another ``logging_interval``; when training starts: the trainer has no logger, or two
            param groups of an optimizer have the same name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}) must be 'step', 'epoch' or None."
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        """Every logged rate of this fit, by name."""
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self._watched: list[Watched] | None = None

    def uses_hook(self, name: str) -> bool:
        """Leave the batch hook out when nothing is logged in steps: then a step costs nothing."""
        own = LearningRateMonitor.on_train_batch_start
        if name == "on_train_batch_start" and type(self).on_train_batch_start is own:
            return bool(self._due("step"))
        return super().uses_hook(name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what there is to log, under which names."""
        if not trainer.loggers:
            raise ConfigError(
                "LearningRateMonitor has nowhere to log to: the trainer has no logger. Give it one, such as "
                "Trainer(logger=CSVLogger(...)), or leave the callback out."
            )
        self._watched = find_watched(trainer.lr_scheduler_configs, trainer.optimizers)
        names = [name for one in self._watched for name in group_names(one.name, one.optimizer.param_groups)]
        self.lrs = {name: [] for name in names}
        self.last_momentum_values = {f"{name}-momentum": None for name in names}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name in names}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is logged in epochs."""
        self._log(trainer, "epoch")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log what is logged in steps, if this step is."""
        step = trainer.progress.batches_that_stepped
        # A run that stops for its time goes on with more of it, and then these are not its last steps.
        last = trainer.should_stop and not trainer.preemption.time_over
        if (step + 1) % trainer.log_every_n_steps == 0 or last:
            self._log(trainer, "step")

    def _due(self, moment: str) -> list[Watched]:
        if self.logging_interval is not None:
            return (self._watched or []) if moment == self.logging_interval else []
        return [one for one in self._watched or [] if one.interval in (moment, None)]

    def _log(self, trainer: Trainer, moment: str) -> None:
        values: dict[str, float] = {}
        for watched in self._due(moment):
            values.update(self._read(watched))
        if not values:
            return
        # Not through the trainer's own way to the loggers, which rounds to float32 and adds the epoch.
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(values, step=trainer.progress.batches_that_stepped)
        device = trainer.strategy.root_device
        trainer.metrics.take({name: torch.tensor(value, device=device) for name, value in values.items()})

    def _read(self, watched: Watched) -> dict[str, float]:
        groups, optimizer = watched.optimizer.param_groups, watched.optimizer
        names = group_names(watched.name, groups)
        if watched.name in self.lrs and watched.name not in names:
            # A second group was added: what had the optimizer's name until now is its first group.
            self.lrs[names[0]] = self.lrs.pop(watched.name)
        values: dict[str, float] = {}
        for name, group in zip(names, groups, strict=True):
            values[name] = _number(group["lr"])
            self.lrs.setdefault(name, []).append(values[name])
            if self.log_momentum:
                betas = "betas" in optimizer.defaults
                momentum = _number(group["betas"][0] if betas else group.get("momentum", 0))
                values[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
            if self.log_weight_decay:
                decay = _number(group.get("weight_decay", 0))
                values[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        return values


def _number(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else value
