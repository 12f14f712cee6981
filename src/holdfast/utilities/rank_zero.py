"""Say and do things once per job, not once per process."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("holdfast")

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment, so that a live progress bar can redirect it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


if not logger.handlers:
    logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _rank_from_environment() -> int:
    """The rank that a launcher gave this process; without one, any but 0 unless it is the first."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    names = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "LOCAL_RANK", "NODE_RANK")
    return next((rank for name in names if (rank := int(os.environ.get(name) or 0))), 0)


def rank_zero_only(fn: Callable[P, T]) -> Callable[P, T | None]:
    """Make ``fn`` run on rank 0 alone and return None on every other rank.

    The rank is ``rank_zero_only.rank``, set when a strategy starts and read from the launcher's
    environment until then.
    """

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return fn(*args, **kwargs) if _current_rank() == 0 else None

    return wrapped


rank_zero_only.rank = _rank_from_environment()  # type: ignore[attr-defined]


def _current_rank() -> int:
    return int(rank_zero_only.rank)  # type: ignore[attr-defined]


@rank_zero_only
def rank_zero_debug(message: object, *args: Any, **kwargs: Any) -> None:
    """Log to the ``holdfast`` logger, once per job, what only its level DEBUG lets through."""
    logger.debug(message, *args, **kwargs)


@rank_zero_only
def rank_zero_info(message: str) -> None:
    """Log one line at INFO on rank 0."""
    logger.info(message)


@rank_zero_only
def rank_zero_warn(
    message: str, category: type[Warning] = UserWarning, stacklevel: int | None = None
) -> None:
    """Warn on rank 0.

    Args:
        message: What is to be said.
        category: The kind of warning.
        stacklevel: As `warnings.warn` takes it, from here; None points at the line outside of holdfast that
            led here.
    """
    warnings.warn(message, category, stacklevel=_outside() if stacklevel is None else stacklevel)


def rank_zero_deprecation(message: str, stacklevel: int | None = None) -> None:
    """Warn on rank 0 that a spelling is old; the message names today's form."""
    rank_zero_warn(message, category=DeprecationWarning, stacklevel=stacklevel)


def _outside() -> int:
    """The stack level, seen from the caller, of the first frame that is not holdfast's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


_said: set[Any] = set()


def warn_once(key: Any, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn on rank 0 the first time that ``key`` is seen in this process."""
    if key not in _said:
        _said.add(key)
        rank_zero_warn(message, category)
