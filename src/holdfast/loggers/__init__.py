"""Where metrics and hyperparameters go; loaded name by name, so that importing this costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.loggers.base import Logger as Logger
    from holdfast.loggers.csv import CSVLogger as CSVLogger
    from holdfast.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger

_HOMES = {
    "CSVLogger": ".csv",
    "Logger": ".base",
    "TensorBoardLogger": ".tensorboard",
}

_DERIVE = (
    "Use CSVLogger or TensorBoardLogger; or derive a class from holdfast.loggers.Logger whose log_metrics "
    "and log_hyperparams call {}."
)

# Lightning's loggers for other people's services, and what to use instead.
_LEFT_OUT = {
    "CometLogger": _DERIVE.format("comet_ml"),
    "LitLogger": _DERIVE.format("litlogger"),
    "MLFlowLogger": _DERIVE.format("mlflow"),
    "NeptuneLogger": _DERIVE.format("neptune"),
    "WandbLogger": _DERIVE.format("wandb"),
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
