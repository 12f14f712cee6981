"""Where the model lives and how the processes of a job agree; loaded name by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.strategies.base import Strategy as Strategy
    from holdfast.strategies.ddp import DDPStrategy as DDPStrategy
    from holdfast.strategies.single import SingleDeviceStrategy as SingleDeviceStrategy

_HOMES = {"DDPStrategy": ".ddp", "SingleDeviceStrategy": ".single", "Strategy": ".base"}

_ONE = "One process is what there is so far: use SingleDeviceStrategy, or Trainer(strategy='auto')."

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = dict.fromkeys(
    ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "ParallelStrategy", "XLAStrategy"), _ONE
)

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
