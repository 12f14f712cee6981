"""Code that runs at named moments of a run; loaded name by name, so that importing this costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.callbacks.base import Callback as Callback
    from holdfast.callbacks.base import Checkpoint as Checkpoint
    from holdfast.callbacks.base import SavePlan as SavePlan
    from holdfast.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from holdfast.callbacks.early_stopping import EarlyStoppingReason as EarlyStoppingReason
    from holdfast.callbacks.finetuning import BackboneFinetuning as BackboneFinetuning
    from holdfast.callbacks.finetuning import BaseFinetuning as BaseFinetuning
    from holdfast.callbacks.gradient_accumulation_scheduler import (
        GradientAccumulationScheduler as GradientAccumulationScheduler,
    )
    from holdfast.callbacks.lambda_function import LambdaCallback as LambdaCallback
    from holdfast.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
    from holdfast.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from holdfast.callbacks.model_summary import ModelSummary as ModelSummary
    from holdfast.callbacks.on_exception_checkpoint import OnExceptionCheckpoint as OnExceptionCheckpoint
    from holdfast.callbacks.plain_progress_bar import PlainProgressBar as PlainProgressBar
    from holdfast.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
    from holdfast.callbacks.progress_bar import ProgressBar as ProgressBar
    from holdfast.callbacks.rich_model_summary import RichModelSummary as RichModelSummary
    from holdfast.callbacks.rich_progress_bar import RichProgressBar as RichProgressBar
    from holdfast.callbacks.rich_progress_bar import RichProgressBarTheme as RichProgressBarTheme
    from holdfast.callbacks.stochastic_weight_avg import (
        StochasticWeightAveraging as StochasticWeightAveraging,
    )
    from holdfast.callbacks.timer import Timer as Timer
    from holdfast.callbacks.tqdm_progress_bar import TQDMProgressBar as TQDMProgressBar
    from holdfast.callbacks.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
    from holdfast.callbacks.weight_averaging import WeightAveraging as WeightAveraging

_HOMES = {
    "BackboneFinetuning": ".finetuning",
    "BaseFinetuning": ".finetuning",
    "BasePredictionWriter": ".prediction_writer",
    "Callback": ".base",
    "Checkpoint": ".base",
    "EMAWeightAveraging": ".weight_averaging",
    "EarlyStopping": ".early_stopping",
    "EarlyStoppingReason": ".early_stopping",
    "GradientAccumulationScheduler": ".gradient_accumulation_scheduler",
    "LambdaCallback": ".lambda_function",
    "LearningRateMonitor": ".lr_monitor",
    "ModelCheckpoint": ".model_checkpoint",
    "ModelSummary": ".model_summary",
    "OnExceptionCheckpoint": ".on_exception_checkpoint",
    "PlainProgressBar": ".plain_progress_bar",
    "ProgressBar": ".progress_bar",
    "RichModelSummary": ".rich_model_summary",
    "RichProgressBar": ".rich_progress_bar",
    "RichProgressBarTheme": ".rich_progress_bar",
    "SavePlan": ".base",
    "StochasticWeightAveraging": ".stochastic_weight_avg",
    "TQDMProgressBar": ".tqdm_progress_bar",
    "Timer": ".timer",
    "WeightAveraging": ".weight_averaging",
}

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = {
    "BatchSizeFinder": "There is no tuner: try batch sizes by runs with Trainer(fast_dev_run=True).",
    "DeviceStatsMonitor": "Log what you want to see, such as torch.cuda.memory_stats().",
    "LearningRateFinder": "There is no tuner: try learning rates by runs with Trainer(max_steps=...).",
    "ModelPruning": "Call torch.nn.utils.prune in on_train_epoch_end.",
    "SpikeDetection": "Use EarlyStopping(check_finite=True), or Trainer(detect_anomaly=True).",
    "ThroughputMonitor": "Log what you want to see in on_train_batch_end, or use Trainer(profiler='simple').",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
