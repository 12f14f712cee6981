"""holdfast: PyTorch training that cannot lose its work.

Names are loaded when they are first used (PEP 562), so that ``import holdfast`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast import accelerators as accelerators
    from holdfast import callbacks as callbacks
    from holdfast import core as core
    from holdfast import loggers as loggers
    from holdfast import plugins as plugins
    from holdfast import profilers as profilers
    from holdfast import strategies as strategies
    from holdfast import testing as testing
    from holdfast import trainer as trainer
    from holdfast import utilities as utilities
    from holdfast.callbacks.base import Callback as Callback
    from holdfast.checkpoint.engine import save as save
    from holdfast.checkpoint.load import load as load
    from holdfast.checkpoint.report import SaveReport as SaveReport
    from holdfast.checkpoint.retention import KeepAll as KeepAll
    from holdfast.checkpoint.retention import KeepBest as KeepBest
    from holdfast.checkpoint.retention import KeepEvery as KeepEvery
    from holdfast.checkpoint.retention import KeepLast as KeepLast
    from holdfast.checkpoint.retention import KeepNewer as KeepNewer
    from holdfast.checkpoint.single import load_tensor as load_tensor
    from holdfast.checkpoint.verify import VerifyReport as VerifyReport
    from holdfast.checkpoint.verify import verify as verify
    from holdfast.checkpointer import Checkpointer as Checkpointer
    from holdfast.errors import ArgumentError as ArgumentError
    from holdfast.errors import CheckpointCorrupt as CheckpointCorrupt
    from holdfast.errors import CheckpointError as CheckpointError
    from holdfast.errors import CheckpointIncompatible as CheckpointIncompatible
    from holdfast.errors import CheckpointIncomplete as CheckpointIncomplete
    from holdfast.errors import CheckpointNotFound as CheckpointNotFound
    from holdfast.errors import CheckpointUnsafe as CheckpointUnsafe
    from holdfast.errors import ConfigError as ConfigError
    from holdfast.errors import HoldfastError as HoldfastError
    from holdfast.errors import RankFailed as RankFailed
    from holdfast.errors import StorageError as StorageError
    from holdfast.training.datamodule import LightningDataModule as LightningDataModule
    from holdfast.training.module import LightningModule as LightningModule
    from holdfast.training.trainer import Trainer as Trainer
    from holdfast.utilities.seed import seed_everything as seed_everything

__version__ = "0.1.0"

_HOMES = {
    "ArgumentError": "holdfast.errors",
    "Callback": "holdfast.callbacks.base",
    "CheckpointCorrupt": "holdfast.errors",
    "CheckpointError": "holdfast.errors",
    "CheckpointIncompatible": "holdfast.errors",
    "CheckpointIncomplete": "holdfast.errors",
    "CheckpointNotFound": "holdfast.errors",
    "CheckpointUnsafe": "holdfast.errors",
    "Checkpointer": "holdfast.checkpointer",
    "ConfigError": "holdfast.errors",
    "HoldfastError": "holdfast.errors",
    "KeepAll": "holdfast.checkpoint.retention",
    "KeepBest": "holdfast.checkpoint.retention",
    "KeepEvery": "holdfast.checkpoint.retention",
    "KeepLast": "holdfast.checkpoint.retention",
    "KeepNewer": "holdfast.checkpoint.retention",
    "LightningDataModule": "holdfast.training.datamodule",
    "LightningModule": "holdfast.training.module",
    "RankFailed": "holdfast.errors",
    "SaveReport": "holdfast.checkpoint.report",
    "StorageError": "holdfast.errors",
    "Trainer": "holdfast.training.trainer",
    "VerifyReport": "holdfast.checkpoint.verify",
    "accelerators": ".accelerators",
    "callbacks": ".callbacks",
    "core": ".core",
    "load": "holdfast.checkpoint.load",
    "load_tensor": "holdfast.checkpoint.single",
    "loggers": ".loggers",
    "plugins": ".plugins",
    "profilers": ".profilers",
    "save": "holdfast.checkpoint.engine",
    "seed_everything": "holdfast.utilities.seed",
    "strategies": ".strategies",
    "testing": ".testing",
    "trainer": ".trainer",
    "utilities": ".utilities",
    "verify": "holdfast.checkpoint.verify",
}

__all__ = sorted([*_HOMES, "__version__"])

__getattr__, __dir__ = lazily(__name__, _HOMES)
