"""Lightning's address of the CSV logger; it lives in `csv`."""

from holdfast.loggers.csv import CSVLogger, ExperimentWriter

__all__ = ["CSVLogger", "ExperimentWriter"]
