"""From a request to durable files: what the loop carries out at a safe point."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.checkpoint import payload as payloads
from holdfast.checkpoint.checkpoint_io import AsyncCheckpointIO, TorchCheckpointIO, writes_own_format
from holdfast.checkpoint.engine import plain_summary
from holdfast.checkpoint.report import SaveReport
from holdfast.training import state
from holdfast.training.hooks import profile
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class Saved(NamedTuple):
    """A save that is written, or about to be, and whom to tell once it is durable."""

    callback: Checkpoint
    plan: SavePlan
    report: SaveReport
    batches: int | None
    """How many batches are trained in it; None where a run cannot go on from it exactly."""


def carry_out_requests(trainer: Trainer, *, exact: bool) -> None:
    """Save what callbacks have asked for.

    All plans are made before anything is written, so that each file holds the state of every callback as it
    is after all of these saves; plans with the same content share one file under several names. Where a
    plugin writes in the background, callbacks are told of a save when `settle` finds it done.

    Raises:
        StorageError: the disk refused. What was not committed is rolled back; older files are untouched.
    """
    requests, trainer.save_requests = trainer.save_requests, []
    # Last, so that its name is given behind those of the others: a kill between the two costs none of theirs.
    requests.sort(key=lambda callback: callback is trainer.preemption)
    settle(trainer)
    open_plans: list[tuple[Checkpoint, SavePlan]] = []
    try:
        for callback in requests:
            plan = callback.plan_save(trainer)
            if plan is not None:
                open_plans.append((callback, plan))
        # Full checkpoints last: what they say of the others is true then, whenever a kill comes.
        for weights_only in (True, False):
            group = [(callback, plan) for callback, plan in open_plans if plan.weights_only is weights_only]
            if not group:
                continue
            names = list(dict.fromkeys(name for _, plan in group for name in plan.names))
            extra: dict[str, Any] = {}
            for _, plan in group:
                extra.update(plan.summary_extra)
            settle(trainer)
            # What one callback deletes must not be what another one's symlink points to.
            report = save(
                trainer, names, weights_only=weights_only, exact=exact, extra=extra, symlinks=len(group) == 1
            )
            open_plans = [one for one in open_plans if one[1].weights_only is not weights_only]
            batches = trainer.progress.total_batches if exact and not weights_only else None
            saved = [Saved(callback, plan, report, batches) for callback, plan in group]
            if isinstance(trainer.strategy.own_checkpoint_io, AsyncCheckpointIO):
                trainer.saves_in_flight += saved
            else:
                _tell_committed(trainer, saved)
    finally:
        for callback, plan in open_plans:
            callback.rolled_back(trainer, plan)


def settle(trainer: Trainer) -> None:
    """Wait for what a plugin still writes in the background, and tell the callbacks whose saves these are.

    Raises:
        Exception: the one that ended the save; its callbacks forget it, and what they had stays.
    """
    checkpoint_io = trainer.strategy.own_checkpoint_io
    if not isinstance(checkpoint_io, AsyncCheckpointIO):
        return
    in_flight, trainer.saves_in_flight = trainer.saves_in_flight, []
    try:
        checkpoint_io.wait()
    except BaseException:
        for one in in_flight:
            one.callback.rolled_back(trainer, one.plan)
        raise
    _tell_committed(trainer, in_flight)


def _tell_committed(trainer: Trainer, saved: list[Saved]) -> None:
    """Tell every callback of its durable save, then raise the first error: one's failure is not another's."""
    errors: list[BaseException] = []
    for one in saved:
        try:
            one.callback.committed(trainer, one.plan, one.report)
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
    for one in saved:
        if one.batches is not None:
            trainer.preemption.files.give_way(trainer, one.report, one.batches)


def save(
    trainer: Trainer,
    names: list[str],
    *,
    weights_only: bool,
    exact: bool,
    extra: dict[str, Any],
    symlinks: bool = True,
    storage_options: Any = None,
) -> SaveReport:
    """Write the run as it is under all of ``names``; warn once of each thing that cannot be stored.

    Args:
        trainer: Whose run.
        names: The file, and further names of the same content.
        weights_only: Leave out what only resuming needs.
        exact: The run stands at a safe point.
        extra: Plain values for the file's summary.
        symlinks: Whether a further name may be a symlink.
        storage_options: For a checkpoint plugin.

    Raises:
        ConfigError: storage options, and no plugin that takes them.
        StorageError: the disk refused.
    """
    with profile(trainer, "save_checkpoint"):
        payload = state.capture(trainer, weights_only=weights_only, exact=exact)
        summary = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
            "exact": exact and not weights_only,
            "kind": "weights" if weights_only else "full",
            **extra,
        }
        if writes_itself(trainer):
            return _save_by_plugin(trainer, payload, names, summary, storage_options)
        if storage_options is not None:
            # Says that the engine takes none, and what does.
            TorchCheckpointIO().save_checkpoint(payload, names[0], storage_options=storage_options)
        report = trainer.engine.save(payload, names[0], names=names[1:], symlinks=symlinks, summary=summary)
        _tell_omissions(report.omissions)
        return report


def writes_itself(trainer: Trainer) -> bool:
    """Whether the user's plugin or strategy writes checkpoints, rather than the engine."""
    checkpoint_io = trainer.strategy.own_checkpoint_io
    engine_like = checkpoint_io is None or type(checkpoint_io) is TorchCheckpointIO
    return not engine_like or is_overridden("save_checkpoint", trainer.strategy)


def _save_by_plugin(
    trainer: Trainer, payload: dict[str, Any], names: list[str], summary: dict[str, Any], storage_options: Any
) -> SaveReport:
    """Hand the plugin a checkpoint for each name; what it writes and how is its own affair."""
    began = time.monotonic()
    omissions: list[tuple[str, str]] = []
    if writes_own_format(trainer.strategy.own_checkpoint_io):
        # Plain values and tensors, so that torch.save can write it and torch.load read it.
        encoded = payloads.encode(payload)
        payload, omissions = encoded.tree, encoded.omissions
        payload["holdfast"]["types"] = encoded.types
        _tell_omissions(omissions)
    payload["holdfast"]["summary"] = plain_summary(summary)
    for name in names:
        trainer.strategy.save_checkpoint(payload, name, storage_options=storage_options)
    spent = time.monotonic() - began
    size = os.path.getsize(names[0]) if os.path.isfile(names[0]) else 0
    links = ("copy",) * (len(names) - 1)
    return SaveReport(names[0], tuple(names[1:]), size, spent, spent, omissions, links)


def _tell_omissions(omissions: list[tuple[str, str]]) -> None:
    for where, reason in omissions:
        warn_once(("omitted", where), f"{where} is not in the checkpoint: {reason}")
