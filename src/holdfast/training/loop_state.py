"""The state of a loop of one's own as a payload, and back: what `state` is for the Trainer's loop.

The user's keys are the payload's; under ``holdfast`` is what only a Checkpointer knows: the step, what each
thing is, the generators, and what TorchMetrics objects have gathered (which no ``state_dict`` holds).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from holdfast.checkpoint import stateful
from holdfast.checkpoint.report import tell_omissions
from holdfast.checkpoint.restoring import Restoration
from holdfast.checkpoint.stateful import Captured
from holdfast.errors import CheckpointIncompatible, ConfigError
from holdfast.training import metric_objects
from holdfast.utilities import seed

OWN = "holdfast"
_VERSION = 1


class Restored(NamedTuple):
    """What `restore` did: the step it stands at, and what it could not put back."""

    step: int
    missing: list[str]


def capture(
    state: dict[str, Any], step: int, places: dict[str, Any], *, rng: bool
) -> tuple[dict[str, Any], bool]:
    """The state as it is now; returns the payload, and whether it is all that a run needs to go on.

    Tensors are the live ones. What cannot be stored is left out, and named in one warning.

    Args:
        state: The live objects.
        step: The step that it stands at.
        places: Kept from call to call: where the states of generators were put the last time.
        rng: Whether the global generators are in it.

    Raises:
        ConfigError: the state is none that can be saved.
    """
    captured = stateful.capture(state, places)
    if OWN in captured.kinds:
        raise ConfigError(f"The state has the key {OWN!r}, which the Checkpointer needs: rename it.")
    tell_omissions(list(captured.omitted.items()))
    own: dict[str, Any] = {
        "checkpointer": _VERSION,
        "step": step,
        "kinds": captured.kinds,
        "omitted": captured.omitted,
        "torchmetrics": {
            path: metric_objects.capture(module, found)
            for path, module in _modules(state)
            if (found := metric_objects.found_in(module))
        },
    }
    if rng:
        own["rng"] = places[OWN] = seed.in_the_place_of(places.get(OWN), seed.capture())
    return {**captured.values, OWN: own}, rng and not captured.omitted


def restore(state: dict[str, Any], payload: Any, source: str, *, rng: bool) -> Restored:
    """Put a payload that `capture` made into the live objects: all of it, or nothing. Generators come last.

    Raises:
        CheckpointIncompatible: it is no such payload, or does not fit the state.
    """
    own = payload.get(OWN) if isinstance(payload, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("checkpointer"), int):
        raise CheckpointIncompatible(
            f"{source} was not saved by a Checkpointer. Read it with holdfast.load, and give its parts "
            "to your objects."
        )
    parts = [own.get(key) for key in ("kinds", "omitted", "torchmetrics")]
    if own["checkpointer"] > _VERSION or not all(isinstance(part, dict) for part in parts):
        raise CheckpointIncompatible(f"{source} was saved by a newer holdfast: update holdfast to read it.")
    values = {key: value for key, value in payload.items() if key != OWN}
    restoration = Restoration(state, Captured(values, own["kinds"], own["omitted"]), source)
    restoration.apply()
    for path, module in _modules(state):
        if path in own["torchmetrics"]:
            metric_objects.restore(module, own["torchmetrics"][path], _device_of(module))
    missing = [f"{path} (the file could not hold it)" for path in restoration.kept]
    if rng:
        missing += seed.restore(own["rng"]) if "rng" in own else ["the generators (saved with rng=False)"]
    return Restored(int(own["step"]), missing)


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics as numbers; tensors of one element are read.

    Raises:
        ConfigError: one of them is not a number.
    """
    found: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            found[name] = float(value.item() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"save(metrics=): {name} is not one number but a {type(value).__name__}: {value!r}"
            ) from None
    return found


def _modules(state: dict[str, Any]) -> list[tuple[str, nn.Module]]:
    return [
        (leaf.path, stateful.bare(leaf.value))
        for leaf in stateful.leaves(state)
        if leaf.kind == stateful.MODULE
    ]


def _device_of(module: nn.Module) -> torch.device:
    own = getattr(module, "device", None)  # what a TorchMetrics object says
    if isinstance(own, torch.device):
        return own
    first = next((one for one in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if first is None else first.device
