"""From a request to durable files: what the loop carries out at a safe point."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.checkpoint import payload as payloads
from holdfast.checkpoint import reserved
from holdfast.checkpoint.checkpoint_io import AsyncCheckpointIO, TorchCheckpointIO, writes_own_format
from holdfast.checkpoint.engine import plain_summary
from holdfast.checkpoint.report import SaveReport, tell_omissions
from holdfast.errors import StorageError
from holdfast.training import agreed, late, state
from holdfast.training.hooks import profile
from holdfast.training.in_flight import (
    ON_ERROR,
    RETRIES,
    SETTLE,
    InFlight,
    failed,
    roll_back,
    settle,
    tell_committed,
)
from holdfast.training.progress import END
from holdfast.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def carry_out_requests(trainer: Trainer, *, exact: bool) -> None:
    """Save what callbacks have asked for, and tell them of saves that have ended in the background.

    All plans are made before anything is written, so that each file holds the state of every callback as it
    is after all of these saves; plans with the same content share one file under several names. Callbacks are
    told of a save that goes on in the background when `settle` finds it done, here or at a later safe point.

    Ranks: all. Rank 0's plans count, and only rank 0 writes; all hear how that went, at the same safe point.
    Blocks: nobody, at a safe point that another rank only looks in at.

    Raises:
        StorageError: the disk refused. What was not committed is rolled back; older files are untouched.
        RankFailed: something is to be saved here and not on another rank.
    """
    try:
        _carry_out_all(trainer, exact)
    finally:
        # Last: what is agreed meanwhile has put its mark among the requests, which may have been taken out.
        agreed.look_again(trainer)


def _carry_out_all(trainer: Trainer, exact: bool) -> None:
    requests = _taken(trainer)
    wait = bool(requests)
    if agreed.together(trainer):
        settles = agreed.carry_out(trainer)
        requests += _taken(trainer)
        if requests:
            requests = agreed.same_requests(trainer, requests)
        elif not settles:
            return
        wait = True
    elif trainer.strategy.alone and (not trainer.is_global_zero or trainer.strategy.shards_model):
        # One process alone cannot put together what all of them hold; else rank 0 does.
        settle(trainer)
        return
    try:
        # Plans are made from what is on disk, so nothing may be under way then.
        settle(trainer, wait=wait)
    except StorageError:
        if not writes_itself(trainer):
            # What is due now is saved all the same: it may be all that there is of the time since.
            with suppress(StorageError):  # the first one is raised, and likely of the same disk
                _carry_out(trainer, [*requests, *_taken(trainer)], exact=exact, background=False)
        raise
    # At the very end nothing follows that a save could go on beside.
    ends = trainer.progress.stage == END and trainer.fit_loop is not None and trainer.fit_loop.finished
    _carry_out(trainer, [*requests, *_taken(trainer)], exact=exact, background=not ends)


def _taken(trainer: Trainer) -> list[Checkpoint]:
    """Take the requests out of the list, to which signals' handlers and other threads may add meanwhile."""
    found = []
    while trainer.save_requests:
        found.append(trainer.save_requests.pop(0))
    return [one for one in found if one not in (SETTLE, agreed.AGREED)]


def _carry_out(trainer: Trainer, requests: list[Checkpoint], *, exact: bool, background: bool) -> None:
    # Last, so that its name is given behind those of the others: a kill between the two costs none of theirs.
    requests = sorted(dict.fromkeys(requests), key=lambda callback: callback is trainer.preemption)
    open_plans: list[tuple[Checkpoint, SavePlan]] = []
    try:
        for callback in requests:
            plan = callback.plan_save(trainer)
            if plan is not None:
                open_plans.append((callback, plan))
        # Full checkpoints last: what they say of the others is true then, whenever a kill comes.
        for weights_only in (True, False):
            group = [one for one in open_plans if one[1].weights_only is weights_only]
            others = [one for one in open_plans if one[1].weights_only is not weights_only]
            if not group:
                continue
            settle(trainer)
            batches = trainer.progress.total_batches if exact and not weights_only else None
            save = InFlight(group, batches, max((plan.on_error for _, plan in group), key=ON_ERROR.index))
            save.tick = agreed.tick(trainer.progress)
            # One save at a time: what another one waits for is no faster in the background.
            _save_group(trainer, save, exact=exact, background=background and not others)
            open_plans = others
            if save.pending is not None:
                tell_omissions(save.pending.omissions)
            elif save.report is not None and save not in trainer.saves_in_flight:
                tell_committed(trainer, save)
    finally:
        roll_back(trainer, open_plans)


def _save_group(trainer: Trainer, save: InFlight, *, exact: bool, background: bool) -> None:
    """Save for callbacks whose files have the same content: in the background if all of them would have it.

    If it is durable on return, its report is there; else it is in flight, or has failed and that was said.
    """
    plans = [plan for _, plan in save.group]
    weights_only = plans[0].weights_only
    names = list(dict.fromkeys(name for plan in plans for name in plan.names))
    extra: dict[str, Any] = {}
    for plan in plans:
        extra.update(plan.summary_extra)
    attempts = RETRIES if save.on_error == "retry" else 1
    # What one callback deletes must not be what another one's symlink points to.
    symlinks = len(plans) == 1
    aside = trainer.checkpoint_stats.aside(trainer.progress, trainer.saves_in_flight)
    with aside, profile(trainer, "save_checkpoint"):
        contents = _contents(trainer, weights_only=weights_only, exact=exact, extra=extra)
        background = background and all(plan.background for plan in plans)
        try:
            if trainer.strategy.sharded and not writes_itself(trainer):
                report = _begin_sharded(trainer, save, contents, names, background, attempts)
            elif background and not writes_itself(trainer):
                _begin(trainer, save, contents, names, symlinks, attempts)
                report = None
            else:
                report = _write(trainer, contents, names, symlinks=symlinks, attempts=attempts)
        except StorageError as error:
            failed(trainer, save, error)
            roll_back(trainer, save.group)
            return
    if report is None:
        trainer.saves_in_flight.append(save)
        return
    save.report = report
    if isinstance(trainer.strategy.own_checkpoint_io, AsyncCheckpointIO):
        trainer.saves_in_flight.append(save)


def _begin(
    trainer: Trainer,
    save: InFlight,
    contents: tuple[dict[str, Any], dict[str, Any]],
    names: list[str],
    symlinks: bool,
    attempts: int,
) -> None:
    """Have rank 0 save in the background. Ranks: all. Blocks: until rank 0 has taken its snapshot."""
    payload, summary = contents
    save.ended = _when_ended(trainer, save, names)
    problem: Exception | None = None
    if trainer.is_global_zero:
        try:
            save.pending = trainer.engine.save_in_background(
                payload,
                names[0],
                names=names[1:],
                symlinks=symlinks,
                summary=summary,
                late=late.tensors(trainer),
                attempts=attempts,
                on_end=lambda _: save.ended(),
            )
        except Exception as error:
            problem = error
    if agreed.together(trainer):
        _, problem = agreed.outcome(trainer, None, problem)
    if problem is not None:
        raise problem


def _begin_sharded(
    trainer: Trainer,
    save: InFlight,
    contents: tuple[dict[str, Any], dict[str, Any]],
    names: list[str],
    background: bool,
    attempts: int,
) -> SaveReport | None:
    """Have every rank save its part; None: that goes on in the background. Ranks: all."""
    from holdfast.training import sharded_saving

    save.ended = _when_ended(trainer, save, names)
    begun = sharded_saving.begin(
        trainer, save, contents, names, background=background, attempts=attempts
    )  # fmt: skip
    if not isinstance(begun, SaveReport):
        save.pending = begun
        return None
    tell_omissions(begun.omissions)
    trainer.checkpoint_stats.add(begun)
    return begun


def _when_ended(trainer: Trainer, save: InFlight, names: list[str]) -> Callable[[], None]:
    """What a thread calls when a save in the background is durable or has failed."""
    together = agreed.together(trainer)

    def ended() -> None:
        reserved.give_up(names)
        if together:
            agreed.post(trainer, agreed.SETTLED, agreed.key_of(save))
        else:
            # The loop looks at the requests anyway, so that a step pays nothing for it.
            trainer.save_requests.append(SETTLE)

    return ended


def end_of_fit(trainer: Trainer) -> None:
    """Have nothing in flight where training ends, and save what a snapshot that was thrown away held.

    Ranks: all. What was posted to be done at a safe point and was not yet is done here.

    Raises:
        Exception: the one that ended the last save.
    """
    if agreed.together(trainer):
        agreed.finish(trainer)
    settle(trainer)
    if trainer.save_requests:
        trainer.safe_point()
    agreed.share_stats(trainer)


def save_now(
    trainer: Trainer,
    filepath: str | os.PathLike[str],
    *,
    weights_only: bool,
    exact: bool,
    storage_options: Any,
) -> None:
    """Save the run as it is now, for `Trainer.save_checkpoint`; durable on return.

    Raises:
        StorageError: the disk refused this save, or the one before it, which was in the background.
        RankFailed: a rank has gone on without calling it.
    """
    strategy, given = trainer.strategy, os.path.abspath(os.fspath(filepath))
    before = strategy.alone
    try:
        with strategy.call_others((given, weights_only, exact, storage_options)) as called:
            path = given if called else agreed.meet_for_save(trainer, given)
            if path is not None:
                _save_now(trainer, path, weights_only, exact and not strategy.alone, storage_options)
    finally:
        strategy.alone = before


def take_part(trainer: Trainer, request: tuple[str, bool, bool, Any]) -> None:
    """Save with rank 0, which has called this process for it from behind a request; what fails it raises."""
    with suppress(StorageError):
        _save_now(trainer, *request)


def _save_now(
    trainer: Trainer, path: str, weights_only: bool, exact: bool, storage_options: Any
) -> None:  # fmt: skip
    def write() -> None:
        with trainer.checkpoint_stats.aside(trainer.progress, trainer.saves_in_flight):
            with profile(trainer, "save_checkpoint"):
                agreed.refuse_alone(trainer, path)
                contents = _contents(trainer, weights_only=weights_only, exact=exact, extra={})
                if trainer.strategy.sharded and not writes_itself(trainer):
                    save = InFlight([], None, "raise")
                    _begin_sharded(trainer, save, contents, [path], background=False, attempts=1)
                else:
                    _write(trainer, contents, [path], storage_options=storage_options)

    try:
        settle(trainer)
    except Exception:
        write()
        raise
    write()
    settle(trainer)


def _contents(
    trainer: Trainer, *, weights_only: bool, exact: bool, extra: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run as it is, and the file's summary.

    Args:
        trainer: Whose run.
        weights_only: Leave out what only resuming needs.
        exact: The run stands at a safe point.
        extra: Plain values for the summary.
    """
    payload = state.capture(trainer, weights_only=weights_only, exact=exact)
    summary = {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "exact": exact and not weights_only,
        "kind": "weights" if weights_only else "full",
        "saved_at": trainer.engine.date(),
        **extra,
    }
    return payload, summary


def _write(
    trainer: Trainer,
    contents: tuple[dict[str, Any], dict[str, Any]],
    names: list[str],
    *,
    symlinks: bool = True,
    storage_options: Any = None,
    attempts: int = 1,
) -> SaveReport:
    """Write a file under all of ``names``; warn once of each thing that cannot be stored.

    Args:
        trainer: Whose run.
        contents: The payload and the summary.
        names: The file, and further names of the same content.
        symlinks: Whether a further name may be a symlink.
        storage_options: For a checkpoint plugin.
        attempts: How often to write it, each time anew, before the save has failed.

    Raises:
        ConfigError: storage options, and no plugin that takes them.
        StorageError: the disk refused.
    """
    if not agreed.together(trainer):
        return _write_here(trainer, contents, names, symlinks, storage_options, attempts)
    report: SaveReport | None = None
    problem: Exception | None = None
    # A strategy of the user's may write with all ranks.
    of_all = is_overridden("save_checkpoint", trainer.strategy)
    if trainer.is_global_zero or of_all:
        try:
            report = _write_here(trainer, contents, names, symlinks, storage_options, attempts)
        except Exception as error:
            problem = error
    wrote = report is not None
    report, problem = agreed.outcome(trainer, report, problem, of_all=of_all)
    if problem is not None:
        raise problem
    assert report is not None
    if not wrote:
        trainer.checkpoint_stats.add(report)
    return report


def _write_here(
    trainer: Trainer,
    contents: tuple[dict[str, Any], dict[str, Any]],
    names: list[str],
    symlinks: bool,
    storage_options: Any,
    attempts: int,
) -> SaveReport:
    payload, summary = contents
    if writes_itself(trainer):
        report = _save_by_plugin(trainer, payload, names, summary, storage_options)
        tell_omissions(report.omissions)
        trainer.checkpoint_stats.add(report)
        return report
    if storage_options is not None:
        # Says that the engine takes none, and what does.
        TorchCheckpointIO().save_checkpoint(payload, names[0], storage_options=storage_options)
    report = trainer.engine.save(
        payload, names[0], names=names[1:], symlinks=symlinks, summary=summary, attempts=attempts
    )
    tell_omissions(report.omissions)
    trainer.checkpoint_stats.add(report)
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
    payload["holdfast"]["summary"] = plain_summary(summary)
    for name in names:
        trainer.strategy.save_checkpoint(payload, name, storage_options=storage_options)
    spent = time.monotonic() - began
    size = os.path.getsize(names[0]) if os.path.isfile(names[0]) else 0
    links = ("copy",) * (len(names) - 1)
    return SaveReport(names[0], tuple(names[1:]), size, spent, spent, omissions, links)
