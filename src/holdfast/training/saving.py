"""From a request to durable files: what the loop carries out at a safe point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.checkpoint.engine import SaveReport
from holdfast.training import state
from holdfast.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def carry_out_requests(trainer: Trainer, *, exact: bool) -> None:
    """Save what callbacks have asked for.

    All plans are made before anything is written, so that each file holds the state of every callback as it
    is after all of these saves; plans with the same content share one file under several names.

    Raises:
        StorageError: the disk refused. What was not committed is rolled back; older files are untouched.
    """
    requests, trainer.save_requests = trainer.save_requests, []
    open_plans: list[tuple[Checkpoint, SavePlan]] = []
    try:
        for callback in requests:
            plan = callback.plan_save(trainer)
            if plan is not None:
                open_plans.append((callback, plan))
        for weights_only in (False, True):
            group = [(callback, plan) for callback, plan in open_plans if plan.weights_only is weights_only]
            if not group:
                continue
            names = list(dict.fromkeys(name for _, plan in group for name in plan.names))
            extra: dict[str, Any] = {}
            for _, plan in group:
                extra.update(plan.summary_extra)
            # What one callback deletes must not be what another one's symlink points to.
            report = save(
                trainer, names, weights_only=weights_only, exact=exact, extra=extra, symlinks=len(group) == 1
            )
            for callback, plan in group:
                open_plans.remove((callback, plan))
                callback.committed(trainer, plan, report)
    finally:
        for callback, plan in open_plans:
            callback.rolled_back(trainer, plan)


def save(
    trainer: Trainer,
    names: list[str],
    *,
    weights_only: bool,
    exact: bool,
    extra: dict[str, Any],
    symlinks: bool = True,
) -> SaveReport:
    """Write the run as it is under all of ``names``; warn once of each thing that cannot be stored."""
    payload = state.capture(trainer, weights_only=weights_only, exact=exact)
    summary = {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "exact": exact and not weights_only,
        "kind": "weights" if weights_only else "full",
        **extra,
    }
    report = trainer.engine.save(payload, names[0], names=names[1:], symlinks=symlinks, summary=summary)
    for where, reason in report.omissions:
        warn_once(("omitted", where), f"{where} is not in the checkpoint: {reason}")
    return report
