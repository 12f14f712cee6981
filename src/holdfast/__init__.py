"""holdfast: PyTorch training that cannot lose its work.

Names are loaded when they are first used (PEP 562), so that ``import holdfast`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast import callbacks as callbacks
    from holdfast import loggers as loggers
    from holdfast import utilities as utilities
    from holdfast.callbacks.base import Callback as Callback
    from holdfast.errors import CheckpointCorrupt as CheckpointCorrupt
    from holdfast.errors import CheckpointError as CheckpointError
    from holdfast.errors import CheckpointIncompatible as CheckpointIncompatible
    from holdfast.errors import CheckpointIncomplete as CheckpointIncomplete
    from holdfast.errors import CheckpointNotFound as CheckpointNotFound
    from holdfast.errors import CheckpointUnsafe as CheckpointUnsafe
    from holdfast.errors import ConfigError as ConfigError
    from holdfast.errors import HoldfastError as HoldfastError
    from holdfast.errors import StorageError as StorageError
    from holdfast.training.datamodule import LightningDataModule as LightningDataModule
    from holdfast.training.module import LightningModule as LightningModule
    from holdfast.training.rng import seed_everything as seed_everything
    from holdfast.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "holdfast.callbacks.base",
    "CheckpointCorrupt": "holdfast.errors",
    "CheckpointError": "holdfast.errors",
    "CheckpointIncompatible": "holdfast.errors",
    "CheckpointIncomplete": "holdfast.errors",
    "CheckpointNotFound": "holdfast.errors",
    "CheckpointUnsafe": "holdfast.errors",
    "ConfigError": "holdfast.errors",
    "HoldfastError": "holdfast.errors",
    "LightningDataModule": "holdfast.training.datamodule",
    "LightningModule": "holdfast.training.module",
    "StorageError": "holdfast.errors",
    "Trainer": "holdfast.training.trainer",
    "seed_everything": "holdfast.training.rng",
}
_MODULES = ("callbacks", "loggers", "utilities")

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"holdfast.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
