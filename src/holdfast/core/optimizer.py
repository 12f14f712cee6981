"""The wrapped optimizer and the schedulers' configuration, where Lightning's users import them from."""

from __future__ import annotations

from holdfast.training.configured import LRSchedulerConfig
from holdfast.training.optimizer import LightningOptimizer

__all__ = ["LRSchedulerConfig", "LightningOptimizer"]
