"""Where a run logs: in a version that rank 0 settles, and whether that is the one of a checkpoint's run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint import origin
from holdfast.errors import ConfigError
from holdfast.training.hparams import HyperparametersMixin
from holdfast.training.resume import Resolved
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from holdfast.loggers.base import Logger
    from holdfast.training.trainer import Trainer


def settle_versions(trainer: Trainer, resolved: Resolved | None, *, automatic: bool) -> list[Logger]:
    """Have rank 0 settle which version each logger writes, and every rank know it. Nothing is written yet.

    Ranks: all. Blocks: with several processes until rank 0 has. On return: `Trainer.log_dir` is the same
    everywhere.

    Args:
        trainer: Whose loggers.
        resolved: The checkpoint that the run goes on from, if it is a fit that does.
        automatic: Whether it was found rather than named.

    Returns:
        The loggers whose logs go on.
    """
    found: list[Logger] = []
    if resolved is not None and trainer.is_global_zero:
        found = continued(trainer, resolved, automatic=automatic)
    if trainer.world_size > 1:
        goes_on = tell_versions(trainer, [logger in found for logger in trainer.loggers])
        found = [logger for logger, yes in zip(trainer.loggers, goes_on, strict=False) if yes]
    return found


def tell_versions(trainer: Trainer, facts: list[bool] | None = None) -> list[bool]:
    """Tell every rank where rank 0 writes; returns rank 0's ``facts``. Ranks: all."""
    told: tuple[list[int | str | None], str | None, list[bool]] | None = None
    if trainer.is_global_zero:
        versions = [logger.version for logger in trainer.loggers]
        told = versions, trainer.log_dir, facts or []
    told = trainer.strategy.broadcast(told)
    assert told is not None
    if not trainer.is_global_zero:
        for logger, version in zip(trainer.loggers, told[0], strict=False):
            logger.take_version(version)
        trainer.log_dir_of_rank_zero = told[1]
    return told[2]


def continued(trainer: Trainer, resolved: Resolved, *, automatic: bool) -> list[Logger]:
    """Point loggers at the version that the checkpoint came from, before anything is written.

    With ``automatic`` the run goes on in that version. Otherwise a logger goes on only where the user has
    named it by hand, and both of these say that the checkpoint's run logged there: the logs lie where they
    lay when seen from the checkpoint, and they begin with what was logged before it.

    Returns:
        The loggers whose logs go on; the others begin new ones.
    """
    saved = resolved.payload["holdfast"].get("loggers", [])
    if automatic:
        return _in_the_version_found(trainer, resolved, [one["state"] for one in saved])
    found: list[Logger] = []
    for logger, one in zip(trainer.loggers, saved, strict=False):
        same = one["type"] == type(logger).__qualname__
        if same and logger.continues(one["state"]) and _lies_where_it_lay(resolved, one["state"], logger):
            version = logger.version
            assert version is not None
            logger.resume_in(version)
            rank_zero_info(
                f"the logs in {os.path.relpath(logger.log_dir or '')} go on where they were when the "
                "checkpoint was written; what was logged after it makes way for what is logged now"
            )
            found.append(logger)
    return found


def _in_the_version_found(trainer: Trainer, resolved: Resolved, states: list[dict[str, Any]]) -> list[Logger]:
    goes_on = False
    for logger, state in zip(trainer.loggers, states, strict=False):
        version = state.get("version")
        # The checkpoint lies in the first logger's version, wherever that was moved to; others may have
        # versions of their own.
        if resolved.version is not None and version in (None, states[0].get("version")):
            version = resolved.version
        if version is not None:
            logger.resume_in(version)
            goes_on = True
    return list(trainer.loggers) if goes_on else []


def _lies_where_it_lay(resolved: Resolved, state: Mapping[str, Any], logger: Logger) -> bool:
    """Whether the logs are, seen from the checkpoint, where they were: both may have been moved together."""
    before, log_dir = state.get("log_dir"), logger.log_dir
    if not isinstance(before, str) or log_dir is None or origin.is_url(resolved.path):
        return False
    now, here = os.path.realpath(log_dir), os.path.realpath(os.path.dirname(os.path.abspath(resolved.path)))
    if before == now and os.path.commonpath([now, here]) == now:
        return True
    callbacks = resolved.payload.get("callbacks") or {}
    places = [one.get("dirpath") for one in callbacks.values() if isinstance(one, Mapping)]
    return any(
        isinstance(place, str)
        and os.path.relpath(before, os.path.realpath(place)) == os.path.relpath(now, here)
        for place in places
    )


# -- when a run starts ---------------------------------------------------------------------------------------


def open_loggers(trainer: Trainer) -> None:
    """Have each logger settle its version, in turn, and send them what is known before the first step.

    Ranks: all; rank 0 alone opens and writes them.
    """
    for logger in trainer.loggers_here:
        _ = logger.experiment
    if trainer.world_size > 1 and trainer.loggers:
        tell_versions(trainer)
    if not trainer.enable_autolog_hparams:
        return
    values = _merged_hyperparameters(trainer)
    for logger in trainer.loggers_here:
        if values:
            logger.log_hyperparams(values)
        if not trainer.strategy.shards_model:
            logger.log_graph(trainer.lightning_module)
        elif getattr(logger, "_log_graph", False):
            rank_zero_warn("The model's graph is not logged: no process has all of its weights to trace it.")
        logger.save()


def _merged_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for owner in (trainer.model, trainer.datamodule):
        if isinstance(owner, HyperparametersMixin) and owner._log_hyperparams:
            own = owner.hparams_initial
            differ = [name for name in own if name in values and not _same(own[name], values[name])]
            if differ:
                raise ConfigError(
                    f"{type(trainer.model).__name__} and {type(owner).__name__} both have hyperparameters "
                    f"called {differ}, with different values, and a logger has one place for each. Rename "
                    "them, or call save_hyperparameters(logger=False) in one of the two."
                )
            values.update(own)
    return values


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # arrays are compared element by element, and others not at all
        return repr(one) == repr(other)
