"""The kinds of devices that a run can be on; loaded name by name, so that importing this costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.accelerators.base import Accelerator as Accelerator
    from holdfast.accelerators.cpu import CPUAccelerator as CPUAccelerator
    from holdfast.accelerators.cuda import CUDAAccelerator as CUDAAccelerator
    from holdfast.accelerators.cuda import find_usable_cuda_devices as find_usable_cuda_devices
    from holdfast.accelerators.mps import MPSAccelerator as MPSAccelerator

_HOMES = {
    "Accelerator": ".base",
    "CPUAccelerator": ".cpu",
    "CUDAAccelerator": ".cuda",
    "MPSAccelerator": ".mps",
    "find_usable_cuda_devices": ".cuda",
}

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = {
    "XLAAccelerator": "TPUs are not supported: use CPUAccelerator or CUDAAccelerator.",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
