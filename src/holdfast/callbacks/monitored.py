"""The logged values that `ModelCheckpoint` goes by: which there are, and which it asks for in vain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.callbacks.checkpoint_view import as_scalar
from holdfast.callbacks.naming import nearest, template_keys
from holdfast.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def candidates(trainer: Trainer) -> dict[str, Tensor]:
    """Return every value that can be ranked by or named: what was logged, and ``epoch`` and ``step``."""
    metrics = {name: as_scalar(value) for name, value in trainer.callback_metrics.items()}
    for name, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
        logged = metrics.get(name)
        metrics[name] = torch.tensor(value if logged is None else int(logged.item()))
    return metrics


def unlogged(
    metrics: Mapping[str, Any], *, monitor: str | None, templates: Iterable[tuple[str, str]], why: str = ""
) -> str | None:
    """Say which name is asked for and not in ``metrics``, and which come near it; None if all are there.

    Args:
        metrics: What was logged.
        monitor: The name to rank by, if any.
        templates: Pairs of how a template was given, as code, and the template.
        why: What follows "no such value was logged".
    """
    asked = (
        [] if monitor is None else [(f"ModelCheckpoint(monitor={monitor!r}) has nothing to go by", monitor)]
    )
    asked += [(f"{given} asks for {key!r}", key) for given, text in templates for key in template_keys(text)]
    for complaint, name in asked:
        if name not in metrics:
            return f"{complaint}: no such value was logged{why}.{nearest(name, metrics)}"
    return None


def validation_is_off(trainer: Trainer) -> bool:
    """Tell whether the module could validate and this run does not: its values are missed on purpose."""
    return not trainer.enable_validation and is_overridden("validation_step", trainer.lightning_module)


def version(trainer: Trainer, name: str) -> int | None:
    """Return a number that changes whenever ``name`` is logged anew; None where every value is new."""
    return trainer.metric_versions.get(name, 0) if name in trainer.callback_metrics else None
