"""What training changes of a model that its ``state_dict`` does not hold, kept for the run that goes on.

Buffers that are not persistent, the shape of those that are, and the settings of torch's own layers, such as
a BatchNorm's momentum or a Dropout's probability, are in a checkpoint where training changed them. What code
of the user's keeps in plain attributes is its own affair: ``on_save_checkpoint`` and ``get_extra_state``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from holdfast.utilities.wrapped_names import buffers_of, plain_names, put_buffers

_SMALL = 65_536
"""Elements up to which a buffer is compared by its values; a larger one counts as changed when written to."""

_PLAIN = (bool, int, float, str, type(None))


class ModelChanges:
    """Watches a module from before anything of a run is restored or trained.

    Args:
        module: The module, on the run's device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = {name: _Seen(owner._buffers[key]) for name, owner, key in buffers_of(module)}
        self._settings = {path: _settings_of(layer) for path, layer in _parts(module)}

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What is different by now; empty where nothing is."""
        buffers: dict[str, Any] = {}
        reshaped: list[str] = []
        for name, owner, key in buffers_of(module):
            now, before = owner._buffers[key], self._buffers.get(name)
            if key in owner._non_persistent_buffers_set:
                if before is None or before.differs(now):
                    buffers[name] = now
            elif before is not None and before.form != _form(now):
                reshaped.append(name)
        settings: dict[str, dict[str, Any]] = {}
        for path, layer in _parts(module):
            known = self._settings.get(path, {})
            changed = {
                name: value
                for name, value in _settings_of(layer).items()
                if name not in known or known[name] != value
            }
            if changed:
                settings[path] = changed
        found = {
            "buffers": buffers,
            "reshaped_buffers": reshaped,
            "settings": settings,
            "toggled": _toggled(module),
        }
        return {key: value for key, value in found.items() if value}


def make_room(module: nn.Module, saved: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Give the buffers that training had given another shape that shape, so that they can be loaded.

    Args:
        module: Whose buffers.
        saved: What `ModelChanges.state_dict` gave.
        state_dict: The weights that are going to be loaded.
    """
    names = set(saved.get("reshaped_buffers", ()))
    if not names:
        return
    plain = plain_names(module)
    values = {plain(key): value for key, value in state_dict.items()}
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    for name, owner, key in buffers_of(module):
        value = values.get(name)
        if name in names and isinstance(value, Tensor) and _form(owner._buffers[key]) != _form(value):
            owner._buffers[key] = torch.empty_like(value, device=device)


def restore(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Put back what `ModelChanges.state_dict` gave; what the module no longer has is passed over."""
    put_buffers(module, saved.get("buffers", {}))
    for path, layer in _parts(module):
        for name, value in saved.get("settings", {}).get(path, {}).items():
            if name in _settings_of(layer):
                setattr(layer, name, value)
    toggled = saved.get("toggled")
    if toggled:
        plain = plain_names(module)
        module._toggled = {  # type: ignore[assignment]
            parameter: toggled[plain(name)]
            for name, parameter in module.named_parameters()
            if plain(name) in toggled
        }


class _Seen:
    """A buffer as it was, without keeping it alive."""

    def __init__(self, buffer: Tensor | None) -> None:
        self.form = _form(buffer)
        self._tensor = None if buffer is None else weakref.ref(buffer)
        self._version = _version(buffer)
        small = buffer is not None and not is_lazy(buffer) and buffer.numel() <= _SMALL
        self._values = buffer.detach().clone() if small and buffer is not None else None

    def differs(self, now: Tensor | None) -> bool:
        if now is None or self._tensor is None:
            return now is not None or self._tensor is not None
        if self.form != _form(now):
            return True
        if self._values is not None:
            return not torch.equal(self._values, now)
        return self._tensor() is not now or self._version != _version(now)


def _form(buffer: Tensor | None) -> Any:
    return None if buffer is None or is_lazy(buffer) else (buffer.dtype, tuple(buffer.shape))


def _version(buffer: Tensor | None) -> int | None:
    if buffer is None or is_lazy(buffer) or buffer.is_inference():
        return None
    return buffer._version


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    plain = plain_names(module)
    return ((plain(path), part) for path, part in module.named_modules())


def _settings_of(layer: nn.Module) -> dict[str, Any]:
    """The settings of a layer that torch.nn defines; torch itself lists their names."""
    names = {
        name
        for cls in type(layer).__mro__
        if cls.__module__.startswith("torch.nn.")
        for name in vars(cls).get("__constants__", ())
    }
    held = vars(layer)
    return {name: held[name] for name in sorted(names) if name in held and isinstance(held[name], _PLAIN)}


def _toggled(module: nn.Module) -> dict[str, bool]:
    """What `LightningModule.untoggle_optimizer` will undo, if the run stands between the two."""
    held: Mapping[Any, bool] = getattr(module, "_toggled", {})
    if not held:
        return {}
    plain = plain_names(module)
    return {plain(name): held[one] for name, one in module.named_parameters() if one in held}
