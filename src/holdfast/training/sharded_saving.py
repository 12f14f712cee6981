"""Saving a run whose ranks each hold a part of the model: every rank adds its own to one directory.

At the safe point each rank copies what it alone holds to the host's memory; a thread writes the copies while
training goes on, and talks to the other ranks' threads through a group of its own.

What else differs from rank to rank lies under "apart" in the checkpoint's "holdfast": a dict for each rank.
Its keys are the path of a tensor that is another one there, as JSON, or "waiting/" and the name of a
parameter, for a gradient that this rank has added up and not shared yet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from holdfast.checkpoint import background as threads
from holdfast.checkpoint import sharded
from holdfast.checkpoint.pending import PendingSave
from holdfast.checkpoint.point_in_time import PointInTime
from holdfast.checkpoint.report import SaveReport
from holdfast.errors import StorageError
from holdfast.strategies.parts import digest, local
from holdfast.training.in_flight import InFlight
from holdfast.utilities.wrapped_names import plain_names

if TYPE_CHECKING:
    from holdfast.strategies.fsdp import FSDPStrategy
    from holdfast.training.trainer import Trainer

APART, WAITING = "apart", "waiting/"


def begin(
    trainer: Trainer,
    save: InFlight | None,
    contents: tuple[dict[str, Any], dict[str, Any]],
    names: list[str],
    *,
    background: bool,
    attempts: int = 1,
) -> PendingSave | SaveReport:
    """Save what every rank holds under all of ``names``.

    Ranks: all, at the same safe point.
    Blocks: until this rank's part is copied to the host's memory; in the foreground until all is durable.
    On return: the run may go on and change everything.

    Args:
        trainer: Whose run.
        save: Whom it is for; None for a save that somebody waits for.
        contents: The payload as `state.capture` gave it on this rank, and the summary.
        names: The directory, and further names for it.
        background: Return when the copy is made.
        attempts: How often to write it, each time anew, before the save has failed.

    Raises:
        StorageError: in the foreground: the disk refused, on whichever rank.
    """
    began = time.monotonic()
    payload, summary = contents
    strategy: FSDPStrategy = trainer.strategy  # type: ignore[assignment]
    rest, tensors = sharded.split(payload)
    held = strategy.host_copies.of(tensors)
    group = strategy.saving_group
    if trainer.world_size > 1:
        rest, held = _with_what_is_apart(trainer, rest, held)
    rest = PointInTime().of(rest) if trainer.is_global_zero else {}
    paths = [os.path.abspath(name) for name in names]
    blocked_s = time.monotonic() - began

    def work() -> SaveReport:
        return _written(strategy, paths, rest, held, group, summary, attempts, began, blocked_s, background)

    if not background:
        return work()
    pending = PendingSave(paths[0], tuple(paths[1:]), [], None if save is None else lambda _: save.ended())
    threads.start(pending, work)
    pending.blocked_s = time.monotonic() - began
    return pending


def _written(
    strategy: FSDPStrategy,
    paths: list[str],
    rest: dict[str, Any],
    held: dict[str, Tensor],
    group: Any,
    summary: dict[str, Any],
    attempts: int,
    began: float,
    blocked_s: float,
    in_background: bool,
) -> SaveReport:
    """Write the directory; on every rank the report is rank 0's, and an error is everybody's. Ranks: all."""
    attempt = 0
    while True:
        attempt += 1
        try:
            report = sharded.save(
                paths[0],
                rest,
                held,
                rank=strategy.global_rank,
                world_size=strategy.world_size,
                group=group,
                summary=summary,
                names=paths[1:],
            )
            break
        except StorageError:  # on all ranks
            if attempt >= attempts:
                raise
    told: list[Any] = [report]
    if strategy.world_size > 1:
        dist.broadcast_object_list(told, src=0, group=group)
    found: SaveReport = told[0]
    spent = time.monotonic() - began
    return SaveReport(
        found.path,
        found.names,
        found.size_bytes,
        blocked_s if in_background else spent,
        spent,
        found.omissions,
        found.links,
        background=in_background,
        write_s=found.write_s,
        attempts=attempt,
    )


# -- what differs from rank to rank --------------------------------------------------------------------------


def _with_what_is_apart(
    trainer: Trainer, rest: dict[str, Any], held: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Add what this rank alone has, and let rank 0 know where all of it belongs. Ranks: all.

    The buffers of a module are in "ranks" already.
    """
    strategy: FSDPStrategy = trainer.strategy  # type: ignore[assignment]
    rank, module = trainer.global_rank, trainer.lightning_module
    plain = plain_names(module)
    buffers = {_key("state_dict", plain(name)) for name, _ in module.named_buffers()}
    whole = {key: one for key, one in held.items() if local(one) is one and key not in buffers}
    own: dict[str, Tensor] = {key: whole[key] for key in _differing(strategy, whole)}
    if rest["holdfast"].get("kind") == "full":
        gradients = strategy.waiting_gradients()
        own |= {WAITING + name: one.detach().to("cpu", copy=True) for name, one in gradients.items()}
    keys = strategy.gather(list(own))
    if keys is not None and any(keys):
        rest = {**rest, "holdfast": {**rest["holdfast"], APART: [dict.fromkeys(one) for one in keys]}}
    held = {**held, **{_key("holdfast", APART, rank, key): one for key, one in own.items()}}
    return rest, held


def _key(*path: str | int) -> str:
    return json.dumps(list(path), separators=(",", ":"))


def _differing(strategy: FSDPStrategy, whole: Mapping[str, Tensor]) -> list[str]:
    """Keys of whole tensors of this rank that are not rank 0's. Ranks: all."""
    of_all = [b""] * strategy.world_size
    dist.all_gather_object(of_all, digest(whole.values()), group=strategy.coordination)
    if len(set(of_all)) == 1:
        return []
    mine = {key: digest([one]) for key, one in whole.items()}
    theirs = strategy.broadcast(mine)
    return [key for key, one in mine.items() if theirs.get(key) != one]
