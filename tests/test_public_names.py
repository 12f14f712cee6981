"""The public surface, frozen: adding a name is a decision, losing one breaks somebody's program."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "holdfast.testing": ["ExactResume", "assert_exact_resume"],
    "holdfast": [
        "ArgumentError",
        "Callback",
        "CheckpointCorrupt",
        "CheckpointError",
        "CheckpointIncompatible",
        "CheckpointIncomplete",
        "CheckpointNotFound",
        "CheckpointUnsafe",
        "Checkpointer",
        "ConfigError",
        "HoldfastError",
        "KeepAll",
        "KeepBest",
        "KeepEvery",
        "KeepLast",
        "KeepNewer",
        "LightningDataModule",
        "LightningModule",
        "RankFailed",
        "SaveReport",
        "StorageError",
        "Trainer",
        "VerifyReport",
        "__version__",
        "accelerators",
        "callbacks",
        "core",
        "load",
        "load_tensor",
        "loggers",
        "plugins",
        "profilers",
        "save",
        "seed_everything",
        "strategies",
        "testing",
        "trainer",
        "utilities",
        "verify",
    ],
    "holdfast.accelerators": [
        "Accelerator",
        "CPUAccelerator",
        "CUDAAccelerator",
        "MPSAccelerator",
        "find_usable_cuda_devices",
    ],
    "holdfast.callbacks": [
        "BackboneFinetuning",
        "BaseFinetuning",
        "BasePredictionWriter",
        "Callback",
        "Checkpoint",
        "EMAWeightAveraging",
        "EarlyStopping",
        "EarlyStoppingReason",
        "GradientAccumulationScheduler",
        "LambdaCallback",
        "LearningRateMonitor",
        "ModelCheckpoint",
        "ModelSummary",
        "OnExceptionCheckpoint",
        "PlainProgressBar",
        "ProgressBar",
        "RichModelSummary",
        "RichProgressBar",
        "RichProgressBarTheme",
        "SavePlan",
        "StochasticWeightAveraging",
        "TQDMProgressBar",
        "Timer",
        "WeightAveraging",
    ],
    "holdfast.loggers": [
        "CSVLogger",
        "Logger",
        "TensorBoardLogger",
    ],
    "holdfast.plugins": [
        "AsyncCheckpointIO",
        "CheckpointIO",
        "DoublePrecision",
        "HalfPrecision",
        "MixedPrecision",
        "Precision",
        "TorchCheckpointIO",
    ],
    "holdfast.profilers": [
        "AdvancedProfiler",
        "PassThroughProfiler",
        "Profiler",
        "PyTorchProfiler",
        "SimpleProfiler",
    ],
    "holdfast.strategies": [
        "DDPStrategy",
        "FSDPStrategy",
        "ParallelStrategy",
        "SingleDeviceStrategy",
        "Strategy",
    ],
    "holdfast.utilities": [
        "AttributeDict",
        "CombinedLoader",
        "GradClipAlgorithmType",
        "MisconfigurationException",
        "PossibleUserWarning",
        "disable_possible_user_warnings",
        "grad_norm",
        "is_picklable",
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


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (
            "holdfast.callbacks",
            "LearningRateFinder",
            "holdfast.callbacks has no LearningRateFinder. There is no tuner: try learning rates by runs with "
            "Trainer(max_steps=...).",
        ),
        (
            "holdfast.callbacks",
            "ModelPruning",
            "holdfast.callbacks has no ModelPruning. Call torch.nn.utils.prune in on_train_epoch_end.",
        ),
        (
            "holdfast.strategies",
            "DeepSpeedStrategy",
            "holdfast.strategies has no DeepSpeedStrategy. Use FSDPStrategy, which keeps weights, gradients and "
            "optimizer state in parts.",
        ),
        (
            "holdfast.accelerators",
            "XLAAccelerator",
            "holdfast.accelerators has no XLAAccelerator. TPUs are not supported: use CPUAccelerator or "
            "CUDAAccelerator.",
        ),
    ],
)
def test_a_name_that_is_left_out_says_what_to_use(module: str, name: str, message: str) -> None:
    with pytest.raises(ImportError) as refused:
        exec(f"from {module} import {name}")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("address", "name", "home"),
    [
        ("holdfast.trainer", "Trainer", "holdfast"),
        ("holdfast.trainer.states", "TrainerFn", "holdfast.training.progress"),
        ("holdfast.core", "LightningModule", "holdfast"),
        ("holdfast.core.module", "LightningModule", "holdfast"),
        ("holdfast.core.datamodule", "LightningDataModule", "holdfast"),
        ("holdfast.core.optimizer", "LightningOptimizer", "holdfast.training.optimizer"),
        ("holdfast.core.mixins", "HyperparametersMixin", "holdfast.training.hparams"),
        ("holdfast.plugins.io", "CheckpointIO", "holdfast.plugins"),
        ("holdfast.plugins.precision", "MixedPrecision", "holdfast.plugins"),
        ("holdfast.plugins.environments", "SLURMEnvironment", "holdfast.strategies.environments"),
        ("holdfast.utilities.exceptions", "MisconfigurationException", "holdfast.utilities"),
        ("holdfast.utilities.types", "STEP_OUTPUT", "holdfast.callbacks.base"),
        ("holdfast.callbacks.progress.rich_progress", "RichProgressBarTheme", "holdfast.callbacks"),
    ],
)
def test_lightnings_addresses(address: str, name: str, home: str) -> None:
    assert getattr(importlib.import_module(address), name) is getattr(importlib.import_module(home), name)
