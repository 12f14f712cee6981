"""The arguments of `Trainer`: checked here, before anything runs, with messages that name the fix."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Callback, Checkpoint
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.loggers.base import Logger

# Arguments that Lightning's Trainer takes and this one does not, and what to do instead.
_NOT_TAKEN = {
    "profiler": "Use torch.profiler around fit.",
    "plugins": "Choose the precision by precision=.",
    "sync_batchnorm": "It has a meaning with several processes only, and there is one so far.",
    "use_distributed_sampler": "It has a meaning with several processes only, and there is one so far.",
    "overfit_batches": "Use limit_train_batches=.",
    "max_time": "Use max_steps= or max_epochs=.",
    "barebones": "Use logger=False, enable_checkpointing=False, enable_progress_bar=False, "
    "enable_model_summary=False.",
    "reload_dataloaders_every_n_epochs": "Use a dataset that changes with its sampler's set_epoch.",
    "model_registry": "",
}


def refuse_unknown(unknown: Iterable[str], known: Sequence[str]) -> None:
    """Raise for arguments that do not exist, naming the nearest that does.

    Raises:
        ConfigError: if there are any.
    """
    for name in unknown:
        if name in _NOT_TAKEN:
            raise ConfigError(f"Trainer({name}=...) is not there. {_NOT_TAKEN[name]}".rstrip())
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"It takes {', '.join(known)}."
        raise ConfigError(f"Trainer() has no argument {name!r}. {hint}")


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
    return list(logger) if isinstance(logger, Iterable) else [logger]


def make_callbacks(
    given: Any,
    *,
    checkpointing: bool | None,
    progress_bar: bool | None,
    summary: bool | None,
    fast_dev_run: int,
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
    from holdfast.callbacks.progress_bar import ProgressBar

    has_checkpoint = any(isinstance(c, Checkpoint) for c in callbacks)
    if checkpointing is False and has_checkpoint:
        raise ConfigError(
            "Trainer(enable_checkpointing=False) contradicts the checkpoint callback among callbacks=. "
            "Leave one out."
        )
    if checkpointing is not False and not has_checkpoint:
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
