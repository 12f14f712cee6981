"""Which kind of device ``Trainer(accelerator=...)`` means."""

from __future__ import annotations

from holdfast.accelerators.base import Accelerator
from holdfast.accelerators.cpu import CPUAccelerator
from holdfast.accelerators.cuda import CUDAAccelerator
from holdfast.accelerators.mps import MPSAccelerator
from holdfast.errors import ConfigError
from holdfast.utilities.unknown_names import did_you_mean

BY_DEVICE: dict[str, type[Accelerator]] = {
    "cpu": CPUAccelerator,
    "cuda": CUDAAccelerator,
    "mps": MPSAccelerator,
}
"""The accelerator of each of torch's device types."""
_NAMES = ("auto", "cpu", "gpu", "cuda", "mps")
_NOT_THERE = {"tpu": "TPUs", "xla": "XLA devices", "hpu": "Gaudi HPUs", "ipu": "Graphcore IPUs"}


def choose_accelerator(accelerator: str | Accelerator) -> Accelerator:
    """The accelerator for a name in any case, or for an object; "auto" takes a GPU if torch sees one.

    Raises:
        ConfigError: there is none of that name, or this machine has none of that kind.
    """
    if isinstance(accelerator, Accelerator):
        chosen, name = accelerator, accelerator.name()
    else:
        name = accelerator.lower() if isinstance(accelerator, str) else ""
        if name in _NOT_THERE:
            raise ConfigError(
                f"Trainer(accelerator={accelerator!r}): {_NOT_THERE[name]} are not supported. Use 'gpu' or "
                "'cpu'."
            )
        if name not in _NAMES:
            raise ConfigError(
                f"Trainer(accelerator={accelerator!r}): expected one of {', '.join(map(repr, _NAMES))}, or "
                f"an Accelerator.{did_you_mean(name, _NAMES)}"
            )
        chosen = _by_name(name)
    if not chosen.is_available():
        found = "torch sees no GPU here" if name in ("gpu", "cuda") else "there is none here"
        raise ConfigError(f"Trainer(accelerator={name!r}): {found}. Use accelerator='auto'.")
    return chosen


def _by_name(name: str) -> Accelerator:
    if name in BY_DEVICE:
        return BY_DEVICE[name]()
    if CUDAAccelerator.is_available():
        return CUDAAccelerator()
    if MPSAccelerator.is_available():
        return MPSAccelerator()
    return CUDAAccelerator() if name == "gpu" else CPUAccelerator()
