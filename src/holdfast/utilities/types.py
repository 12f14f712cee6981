"""Types that users annotate their steps and hooks with, under Lightning's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from typing_extensions import NotRequired, Required, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

STEP_OUTPUT = Union["Tensor", Mapping[str, Any], None]
"""What ``training_step`` may return."""
TRAIN_DATALOADERS = Any
"""What ``train_dataloader`` may return: one loader, or several in a list, dict or `CombinedLoader`."""
EVAL_DATALOADERS = Any
"""What the other loader hooks may return: one loader, or several."""
OptimizerLRScheduler = Any
"""What ``configure_optimizers`` may return."""
LRSchedulerTypeUnion = Any
"""What ``lr_scheduler_step`` is given."""


@dataclass
class LRSchedulerConfig:
    """A scheduler and when it steps."""

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


class LRSchedulerConfigType(TypedDict, total=False):
    """The same as a dict that ``configure_optimizers`` may return under "lr_scheduler"."""

    scheduler: Required[Any]
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """What ``configure_optimizers`` may return: an optimizer in a dict."""

    optimizer: Any


class OptimizerLRSchedulerConfig(TypedDict):
    """Likewise, with a scheduler or its `LRSchedulerConfigType`."""

    optimizer: Any
    lr_scheduler: Any
    monitor: NotRequired[str]


__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerTypeUnion",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
]
