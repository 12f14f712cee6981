"""Whether a resumed run logs on where the checkpoint's run logged, or beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint import origin
from holdfast.training.resume import Resolved
from holdfast.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from holdfast.loggers.base import Logger
    from holdfast.training.trainer import Trainer


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
