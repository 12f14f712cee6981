"""The public surface, frozen: adding a name is a decision, losing one breaks somebody's program."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "holdfast": [
        "Callback",
        "CheckpointCorrupt",
        "CheckpointError",
        "CheckpointIncompatible",
        "CheckpointIncomplete",
        "CheckpointNotFound",
        "CheckpointUnsafe",
        "ConfigError",
        "HoldfastError",
        "LightningDataModule",
        "LightningModule",
        "StorageError",
        "Trainer",
        "__version__",
        "callbacks",
        "loggers",
        "seed_everything",
        "utilities",
    ],
    "holdfast.callbacks": [
        "Callback",
        "Checkpoint",
        "EarlyStopping",
        "EarlyStoppingReason",
        "ModelCheckpoint",
        "ModelSummary",
        "PlainProgressBar",
        "ProgressBar",
        "RichProgressBar",
        "SavePlan",
    ],
    "holdfast.loggers": ["CSVLogger", "Logger"],
    "holdfast.utilities": [
        "MisconfigurationException",
        "rank_zero_deprecation",
        "rank_zero_info",
        "rank_zero_only",
        "rank_zero_warn",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_are_these(module: str) -> None:
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module])
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
        assert name in dir(loaded)


@pytest.mark.parametrize("module", PUBLIC)
def test_a_name_that_is_not_there_is_said(module: str) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        importlib.import_module(module).Trainr
