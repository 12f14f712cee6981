"""The arguments of `Trainer`: checked here, before anything runs, with messages that name the fix."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from holdfast.callbacks.base import Callback, Checkpoint
from holdfast.errors import ArgumentError, ConfigError
from holdfast.utilities.durations import parse_duration
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
        if value.is_integer():
            return int(value)
        raise ConfigError(
            f"Trainer({name}={value!r}): a fraction is at most 1.0; for a number of batches give an int."
        )
    return value


def check_count(name: str, value: Any, *, least: int) -> Any:
    """An int of at least ``least``, or None; 1e6 is an int too.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, (float, Integral)) and not isinstance(value, bool) and value % 1 == 0:
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"Trainer({name}={value!r}): expected an int of at least {least}.")
    return value


def set_deterministic(deterministic: bool | str | None) -> None:
    """Switch torch's deterministic algorithms on ("warn": where there are any) or off; None leaves them."""
    if deterministic is None:
        return
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        # Without it, cuBLAS has no deterministic way, and torch refuses.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def check_one_source(method: str, datamodule: Any, *loaders: Any) -> None:
    """Refuse a datamodule together with loaders: only one of them could be meant.

    Raises:
        ArgumentError: the datamodule is none.
        ConfigError: both were given.
    """
    from holdfast.training.datamodule import LightningDataModule

    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise ArgumentError(
            f"trainer.{method}(datamodule=...): expected a holdfast.LightningDataModule, found "
            f"{what_it_is(datamodule)}."
        )
    if datamodule is not None and any(loader is not None for loader in loaders):
        raise ConfigError(
            f"trainer.{method} was given a datamodule and loaders as well. Leave out one of the two."
        )


def what_it_is(thing: Any) -> str:
    """A wrong object in words; one of Lightning's is told from ours, which has the same name."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}: make an object of it, {thing.__name__}(...)"
    name = type(thing).__name__
    for cls in type(thing).__mro__:
        if cls.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return f"{name}, which is derived from {cls.__module__}.{cls.__name__}: import that from holdfast"
    return name


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


def check_registry(model_registry: str | None) -> None:
    """Refuse a service that there is not.

    Raises:
        ConfigError: it is asked for.
    """
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
            found = repr(one) if isinstance(one, (str, int)) else what_it_is(one)
            raise ConfigError(
                f"Trainer(logger=...): expected a logger, several, True or False, found {found}. Derive a "
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
                f"Trainer(callbacks=[...]): expected holdfast.Callback objects, found {what_it_is(callback)}."
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
    bars = [type(c).__name__ for c in callbacks if isinstance(c, ProgressBar)]
    if len(bars) > 1:
        raise ConfigError(
            f"Trainer(callbacks=[...]) holds {len(bars)} progress bars: {', '.join(bars)}. Leave one of them."
        )
    has_bar = bool(bars)
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
            callbacks.append(Timer(parse_duration(max_time, f"Trainer(max_time={max_time!r})")))
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


def check_exact(value: str) -> str:
    """Check ``Trainer(exact=...)``."""
    if value not in ("warn", "require"):
        raise ConfigError(f'Trainer(exact={value!r}) must be "warn" or "require".')
    return value
