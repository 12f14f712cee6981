"""Code that runs at named moments of a run; loaded name by name, so that importing this costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.callbacks.base import Callback as Callback
    from holdfast.callbacks.base import Checkpoint as Checkpoint
    from holdfast.callbacks.base import SavePlan as SavePlan
    from holdfast.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from holdfast.callbacks.early_stopping import EarlyStoppingReason as EarlyStoppingReason
    from holdfast.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from holdfast.callbacks.model_summary import ModelSummary as ModelSummary
    from holdfast.callbacks.plain_progress_bar import PlainProgressBar as PlainProgressBar
    from holdfast.callbacks.progress_bar import ProgressBar as ProgressBar
    from holdfast.callbacks.rich_progress_bar import RichProgressBar as RichProgressBar

_HOMES = {
    "Callback": "base",
    "Checkpoint": "base",
    "EarlyStopping": "early_stopping",
    "EarlyStoppingReason": "early_stopping",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "PlainProgressBar": "plain_progress_bar",
    "ProgressBar": "progress_bar",
    "RichProgressBar": "rich_progress_bar",
    "SavePlan": "base",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
