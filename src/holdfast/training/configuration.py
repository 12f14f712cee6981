"""The arguments of `Trainer`: checked here, before anything runs, with messages that name the fix."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Callback, Checkpoint
from holdfast.errors import ArgumentError, ConfigError
from holdfast.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from holdfast.loggers.base import Logger


def check_limit(name: str, value: int | float | None) -> int | float:
    """A limit on batches: a count, or a fraction between 0 and 1; None means all.

    Raises:
        ConfigError: it is neither.
    """
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(
            f"Trainer({name}={value!r}): expected a number of batches, or a fraction between 0.0 and 1.0."
        )
    if isinstance(value, float) and value > 1.0:
        raise ConfigError(
            f"Trainer({name}={value!r}): a fraction is at most 1.0; for a number of batches give an int."
        )
    return value


def check_count(name: str, value: Any, *, least: int) -> Any:
    """An int of at least ``least``, or None, unchanged.

    Raises:
        ConfigError: it is something else.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"Trainer({name}={value!r}): expected an int of at least {least}.")
    return value


def check_one_source(method: str, datamodule: Any, *loaders: Any) -> None:
    """Refuse a datamodule together with loaders: only one of them could be meant.

    Raises:
        ConfigError: both were given.
    """
    if datamodule is not None and any(loader is not None for loader in loaders):
        raise ConfigError(
            f"trainer.{method} was given a datamodule and loaders as well. Leave out one of the two."
        )


def check_fast_dev_run(value: Any) -> int:
    """Batches of a trial run; 0 for a real one.

    Raises:
        ConfigError: it is not a count.
    """
    if not isinstance(value, (bool, int)) or value < 0:
        raise ConfigError(f"Trainer(fast_dev_run={value!r}): expected True, False or a number of batches.")
    return int(value)


def check_clipping(value: Any, algorithm: Any) -> None:
    """Refuse what gradients cannot be clipped by.

    Raises:
        ArgumentError: the value is no number.
        ConfigError: the algorithm is neither "norm" nor "value".
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ArgumentError(
            f"Trainer(gradient_clip_val={value!r}): expected a number, found {type(value).__name__}."
        )
    if algorithm not in (None, "norm", "value"):
        raise ConfigError(f"Trainer(gradient_clip_algorithm={algorithm!r}): expected 'norm' or 'value'.")


def check_single_process(sync_batchnorm: bool, model_registry: str | None) -> None:
    """Refuse what has a meaning with several processes only, or with services that there are not.

    Raises:
        ConfigError: something of that is asked for.
    """
    if sync_batchnorm:
        raise ConfigError(
            "Trainer(sync_batchnorm=True) has a meaning with several processes only, and there is one so far."
        )
    if model_registry is not None:
        raise ConfigError(
            f"Trainer(model_registry={model_registry!r}) is not there. Upload checkpoints in a logger's "
            "after_save_checkpoint."
        )


def check_barebones(**given: Any) -> None:
    """Refuse what ``barebones=True`` is there to leave out.

    Raises:
        ConfigError: something of it is asked for.
    """
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"Trainer(barebones=True, {name}={value!r}): barebones leaves that out, to show what a step "
                "costs without anything. Leave one of the two out."
            )


def make_loggers(logger: Any, default_root_dir: str, fast_dev_run: int) -> list[Logger]:
    """The loggers that ``Trainer(logger=...)`` means; with fast_dev_run one that keeps nothing."""
    if logger is False:
        return []
    if fast_dev_run:
        from holdfast.loggers.base import DummyLogger

        return [DummyLogger()]
    if logger is None or logger is True:
        from holdfast.loggers.csv import CSVLogger

        return [CSVLogger(default_root_dir)]
    from holdfast.loggers.base import Logger

    loggers = list(logger) if isinstance(logger, Iterable) and not isinstance(logger, str) else [logger]
    for one in loggers:
        if not isinstance(one, Logger):
            raise ConfigError(
                f"Trainer(logger=...): expected a logger, several, True or False, found {one!r}. Derive a "
                "logger of your own from holdfast.loggers.Logger."
            )
    return loggers


def make_callbacks(
    given: Any,
    *,
    checkpointing: bool | None,
    progress_bar: bool | None,
    summary: bool | None,
    fast_dev_run: int,
    max_time: Any = None,
) -> list[Callback]:
    """The user's callbacks and the defaults that they do not replace; those that save come last.

    Raises:
        ConfigError: something is not a callback, two have one state key, or one contradicts an ``enable_``
            argument.
    """
    callbacks: list[Callback] = [given] if isinstance(given, Callback) else list(given or [])
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"Trainer(callbacks=[...]): expected holdfast.Callback objects, found "
                f"{type(callback).__name__}."
            )
    from holdfast.callbacks.model_summary import ModelSummary
    from holdfast.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from holdfast.callbacks.progress_bar import ProgressBar

    has_checkpoint = any(isinstance(c, Checkpoint) for c in callbacks)
    if checkpointing is False and has_checkpoint:
        raise ConfigError(
            "Trainer(enable_checkpointing=False) contradicts the checkpoint callback among callbacks=. "
            "Leave one out."
        )
    # One that saves only when an exception ends the run does not stand in for the one that saves as it goes.
    saves = any(isinstance(c, Checkpoint) and not isinstance(c, OnExceptionCheckpoint) for c in callbacks)
    if checkpointing is not False and not saves:
        from holdfast.callbacks.model_checkpoint import ModelCheckpoint

        callbacks.append(ModelCheckpoint())
    has_bar = any(isinstance(c, ProgressBar) for c in callbacks)
    if progress_bar is False and has_bar:
        raise ConfigError(
            "Trainer(enable_progress_bar=False) contradicts the progress bar among callbacks=. Leave one out."
        )
    if progress_bar is not False and not has_bar:
        from holdfast.callbacks.progress_bar import default_progress_bar

        callbacks.append(default_progress_bar())
    if summary is not False and not fast_dev_run and not any(isinstance(c, ModelSummary) for c in callbacks):
        callbacks.append(ModelSummary())
    if max_time is not None:
        from holdfast.callbacks.timer import Timer

        if any(isinstance(c, Timer) for c in callbacks):
            rank_zero_warn("Trainer(max_time=...) is left out: the Timer among callbacks= says how long.")
        else:
            callbacks.append(Timer(duration=max_time))
    return ordered(callbacks)


def ordered(callbacks: list[Callback]) -> list[Callback]:
    """Those that save after all others, so that what they save is what the others made of it.

    Raises:
        ConfigError: two callbacks with state have the same key.
    """
    keys: dict[str, Callback] = {}
    for callback in callbacks:
        other = keys.setdefault(callback.state_key, callback)
        if other is not callback and type(callback).state_dict is not Callback.state_dict:
            raise ConfigError(
                f"Two callbacks have the state key {callback.state_key!r}, so a checkpoint could hold the "
                f"state of one only. Give them different arguments, or override the property state_key."
            )
    return sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))


def root_directory(path: str | os.PathLike[str] | None) -> str:
    """``default_root_dir`` as an absolute path; the working directory when None."""
    return os.path.abspath(os.path.expanduser(os.fspath(path))) if path is not None else os.getcwd()
