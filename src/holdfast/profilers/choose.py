"""Which profiler ``Trainer(profiler=...)`` means."""

from __future__ import annotations

from holdfast.errors import ConfigError
from holdfast.profilers.base import PassThroughProfiler, Profiler

_NAMES = ("simple", "advanced", "pytorch")


def choose_profiler(profiler: str | Profiler | None) -> Profiler:
    """The profiler for a name or an object; None profiles nothing.

    Raises:
        ConfigError: it is neither.
    """
    if profiler is None:
        return PassThroughProfiler()
    if isinstance(profiler, Profiler):
        return profiler
    name = profiler.lower() if isinstance(profiler, str) else ""
    if name == "simple":
        from holdfast.profilers.simple import SimpleProfiler

        return SimpleProfiler()
    if name == "advanced":
        from holdfast.profilers.advanced import AdvancedProfiler

        return AdvancedProfiler()
    if name == "pytorch":
        from holdfast.profilers.pytorch import PyTorchProfiler

        return PyTorchProfiler()
    raise ConfigError(
        f"Trainer(profiler={profiler!r}): expected one of {', '.join(map(repr, _NAMES))}, or a Profiler."
    )
