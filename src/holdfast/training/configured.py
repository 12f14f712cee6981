"""Optimizers and schedulers as the user configured them, in any documented form; and stepping schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_warn, warn_once
from holdfast.utilities.types import LRSchedulerConfig as LRSchedulerConfig

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def read_configuration(
    configured: Any, *, automatic: bool
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Turn what ``configure_optimizers`` returned, in any documented form, into optimizers and schedulers.

    Raises:
        ConfigError: it has none of these forms, or automatic optimization got several optimizers.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[Any] = []
    plateau_monitor: Any = None
    if configured is None:
        rank_zero_warn("configure_optimizers returned None: this run will train nothing.")
    elif isinstance(configured, Optimizer):
        optimizers = [configured]
    elif isinstance(configured, dict):
        optimizers, schedulers = _read_dicts([configured])
        plateau_monitor = configured.get("monitor")
    elif (
        isinstance(configured, (list, tuple))
        and len(configured) == 2
        and isinstance(configured[0], (list, tuple))
    ):
        optimizers, last = list(configured[0]), configured[1]
        schedulers = list(last) if isinstance(last, (list, tuple)) else [last]
    elif (
        isinstance(configured, (list, tuple)) and configured and all(isinstance(c, dict) for c in configured)
    ):
        optimizers, schedulers = _read_dicts(configured)
    elif isinstance(configured, (list, tuple)):
        optimizers = list(configured)
    else:
        optimizers = [configured]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                "configure_optimizers must return an optimizer, a list of them, two lists (optimizers and "
                'schedulers), a dict {"optimizer": ..., "lr_scheduler": ...} or a list of such dicts, '
                f"found {type(optimizer).__name__} where an optimizer belongs."
            )
    if automatic and len(optimizers) > 1:
        raise ConfigError(
            f"configure_optimizers returned {len(optimizers)} optimizers. With more than one, set "
            "self.automatic_optimization = False in __init__ and step them in training_step."
        )
    configs = [_read_scheduler(scheduler, automatic, plateau_monitor) for scheduler in schedulers]
    for config in configs:
        driven = getattr(config.scheduler, "optimizer", None)
        if isinstance(driven, Optimizer) and not any(driven is optimizer for optimizer in optimizers):
            raise ConfigError(
                f"configure_optimizers returned a {type(config.scheduler).__name__} for an optimizer that it "
                "did not return, so it would change nothing. Make it with the optimizer that is returned."
            )
    return optimizers, configs


def _read_dicts(configured: Sequence[dict[str, Any]]) -> tuple[list[Optimizer], list[Any]]:
    unknown = {key for entry in configured for key in entry} - {
        "optimizer",
        "lr_scheduler",
        "monitor",
        "frequency",
    }
    if unknown:
        rank_zero_warn(f"configure_optimizers: the keys {sorted(unknown)} have no meaning and are ignored.")
    if any("optimizer" not in entry for entry in configured):
        raise ConfigError('configure_optimizers returned a dict without the key "optimizer".')
    return [e["optimizer"] for e in configured], [
        e["lr_scheduler"] for e in configured if e.get("lr_scheduler")
    ]


def _read_scheduler(given: Any, automatic: bool, monitor: str | None) -> LRSchedulerConfig:
    if isinstance(given, LRSchedulerConfig):
        return given
    if not isinstance(given, dict):
        given = {"scheduler": given, "monitor": monitor}
    fields = LRSchedulerConfig.__dataclass_fields__
    unknown = sorted(set(given) - set(fields))
    if unknown:
        rank_zero_warn(f"A scheduler's configuration has keys without a meaning, ignored: {unknown}.")
    if "scheduler" not in given:
        raise ConfigError('A scheduler\'s configuration has no key "scheduler".')
    config = LRSchedulerConfig(**{key: value for key, value in given.items() if key in fields})
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(config.scheduler, method, None)):
            raise ConfigError(
                f"configure_optimizers returned a {type(config.scheduler).__name__} as a scheduler, which "
                f"has no {method}(): no checkpoint could hold where it stands. Give it state_dict() and "
                "load_state_dict()."
            )
    config.reduce_on_plateau = config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)
    if config.interval not in ("step", "epoch"):
        raise ConfigError(f'A scheduler\'s "interval" must be "step" or "epoch", found {config.interval!r}.')
    if automatic and config.reduce_on_plateau and config.monitor is None:
        raise ConfigError(
            'ReduceLROnPlateau needs the name of the value that it watches: return {"optimizer": ..., '
            '"lr_scheduler": {"scheduler": ..., "monitor": "val_loss"}} from configure_optimizers.'
        )
    return config


def step_schedulers(trainer: Trainer, interval: str, *, plateau: bool) -> None:
    """Step the schedulers of this interval that are due; plateau ones are stepped apart, with their metric.

    Raises:
        ConfigError: a plateau scheduler's monitored value was not logged.
    """
    index = trainer.batch_idx if interval == "step" else trainer.current_epoch
    for config in trainer.lr_scheduler_configs:
        if (
            config.interval != interval
            or config.reduce_on_plateau is not plateau
            or (index + 1) % config.frequency
        ):
            continue
        metric = None
        if config.reduce_on_plateau:
            available = trainer.callback_metrics
            metric = available.get(config.monitor or "")
            if trainer.world_size > 1:
                # Every rank goes by rank 0's: other learning rates would make them other models.
                metric = trainer.strategy.broadcast(metric)
            if metric is None:
                message = (
                    f"ReduceLROnPlateau watches {config.monitor!r}, which was not logged. "
                    f"Logged so far: {sorted(available)}."
                )
                if config.strict:
                    raise ConfigError(
                        message + ' Log it, or set "strict": False in the scheduler\'s configuration.'
                    )
                warn_once(("plateau", config.monitor), message)
                continue
        trainer.lightning_module.lr_scheduler_step(config.scheduler, metric)
