"""Lightning's address of what a logger is; it lives in `base`."""

from holdfast.loggers.base import DummyExperiment, DummyLogger, Logger, rank_zero_experiment

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]
