"""Where the model lives and how the processes of a job agree; loaded name by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.strategies.base import Strategy as Strategy
    from holdfast.strategies.ddp import DDPStrategy as DDPStrategy
    from holdfast.strategies.fsdp import FSDPStrategy as FSDPStrategy
    from holdfast.strategies.parallel import ParallelStrategy as ParallelStrategy
    from holdfast.strategies.single import SingleDeviceStrategy as SingleDeviceStrategy

_HOMES = {
    "DDPStrategy": ".ddp",
    "FSDPStrategy": ".fsdp",
    "ParallelStrategy": ".parallel",
    "SingleDeviceStrategy": ".single",
    "Strategy": ".base",
}

_SHARDED = "Use FSDPStrategy, which keeps weights, gradients and optimizer state in parts."

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = {
    **dict.fromkeys(("DeepSpeedStrategy", "ModelParallelStrategy"), _SHARDED),
    "XLAStrategy": "TPUs are not supported: use SingleDeviceStrategy, DDPStrategy or FSDPStrategy.",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
