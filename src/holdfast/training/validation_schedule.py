"""When a fit validates: after so many batches, so much of an epoch, or so much time."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

from holdfast.errors import ConfigError
from holdfast.utilities.durations import parse_duration


def check_interval(value: Any, check_val_every_n_epoch: int | None) -> int | float | timedelta:
    """``Trainer(val_check_interval=...)`` as a number of batches, a fraction of an epoch, or a time.

    Args:
        value: An int, a float up to 1.0, None for 1.0, or a time: a timedelta, the dict of its arguments, or
            "DD:HH:MM:SS".
        check_val_every_n_epoch: The trainer's other argument; None lets only batches and times count.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None:
        return 1.0
    if isinstance(value, (str, dict, timedelta)):
        return parse_duration(value, f"Trainer(val_check_interval={value!r})")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(
            f"Trainer(val_check_interval={value!r}): expected a number of batches, a fraction between 0.0 "
            "and 1.0, or a time such as '00:00:30:00'."
        )
    if isinstance(value, float) and value > 1.0:
        raise ConfigError(
            f"Trainer(val_check_interval={value!r}): a fraction is at most 1.0; for a number of batches give "
            "an int."
        )
    if isinstance(value, int) and value == 0:
        raise ConfigError(
            "Trainer(val_check_interval=0): the least is 1. Trainer(limit_val_batches=0) never validates."
        )
    if check_val_every_n_epoch is None and isinstance(value, float):
        raise ConfigError(
            "Trainer(check_val_every_n_epoch=None) counts batches across epochs: give val_check_interval as "
            "an int."
        )
    return value


def batches_between(
    interval: int | float | timedelta, batches: int | float, across_epochs: bool
) -> int | float:
    """Batches between two validation runs; infinite where only the end of the data, or a clock, can tell.

    Args:
        interval: What `check_interval` gave.
        batches: Batches in an epoch; infinite where the data cannot tell.
        across_epochs: Whether batches are counted across epochs.

    Raises:
        ConfigError: there is no such batch in an epoch, or no length to take a fraction of.
    """
    if isinstance(interval, timedelta):
        return math.inf
    if isinstance(interval, int):
        if interval > batches and not across_epochs:
            raise ConfigError(
                f"Trainer(val_check_interval={interval}) is more than the {batches} batches of an "
                f"epoch. With check_val_every_n_epoch=None it counts batches across epochs."
            )
        return interval
    if math.isinf(batches):
        if interval == 1.0:
            return math.inf
        raise ConfigError(
            f"Trainer(val_check_interval={interval}): the training data has no length to take a "
            f"fraction of. Give a number of batches."
        )
    return max(1, int(batches * interval))


class Stopwatch:
    """Seconds since the last validation, over all lives of a run."""

    def __init__(self, interval: timedelta, elapsed_s: float) -> None:
        self._interval_s = interval.total_seconds()
        self._since = time.monotonic() - elapsed_s

    def elapsed_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._since

    def due(self) -> bool:
        """Whether the interval is over."""
        return self.elapsed_s() >= self._interval_s

    def restart(self) -> None:
        """Begin the next interval."""
        self._since = time.monotonic()
