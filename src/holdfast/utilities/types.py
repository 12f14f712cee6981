"""Types that users annotate their steps and hooks with, under Lightning's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

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

__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "LRSchedulerTypeUnion",
    "OptimizerLRScheduler",
]
