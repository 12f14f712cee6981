"""What takes how long in a run; loaded name by name, so that importing this costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.profilers.advanced import AdvancedProfiler as AdvancedProfiler
    from holdfast.profilers.base import PassThroughProfiler as PassThroughProfiler
    from holdfast.profilers.base import Profiler as Profiler
    from holdfast.profilers.pytorch import PyTorchProfiler as PyTorchProfiler
    from holdfast.profilers.simple import SimpleProfiler as SimpleProfiler

_HOMES = {
    "AdvancedProfiler": ".advanced",
    "PassThroughProfiler": ".base",
    "Profiler": ".base",
    "PyTorchProfiler": ".pytorch",
    "SimpleProfiler": ".simple",
}

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = {
    "XLAProfiler": "TPUs are not supported: use SimpleProfiler, AdvancedProfiler or PyTorchProfiler.",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
