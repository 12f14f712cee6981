"""Where metrics and hyperparameters go."""

from __future__ import annotations

from holdfast.loggers.base import Logger
from holdfast.loggers.csv import CSVLogger

__all__ = ["CSVLogger", "Logger"]
