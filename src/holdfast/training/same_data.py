"""Data that has to be the same on every rank of a job, and data that should not be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from holdfast.errors import ConfigError
from holdfast.training import rng
from holdfast.training.loader_parts import generators_of_samplers
from holdfast.training.replay import described
from holdfast.utilities.rank_zero import rank_zero_warn
from holdfast.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from holdfast.training.data import BatchStream

_END = object()
_HASHED_BYTES = 1 << 20


def check(stream: BatchStream) -> None:
    """Make sure that an epoch of a loader is the same on every rank, before anybody waits for a batch.

    Ranks: all. Blocks: until rank 0 has said what its loader is.
    On return: what the loader's samplers are seeded with is rank 0's.

    Raises:
        ConfigError: this rank's loader has another number of rows or batches than rank 0's.
    """
    job, shares = stream.job, stream.shares
    if job is None or job.ranks == 1:
        return
    length = stream.length()
    batches = None if length is None else int(min(stream.limit, length))
    mine = (shares.splits, shares.units() if shares.splits else None, shares.batch_size, batches)
    theirs, seeds = job.broadcast((mine, shares.seeds))
    if shares.splits and theirs[:3] != mine[:3]:
        raise ConfigError(
            f"{_name(stream)}: rank {job.rank} has {mine[1]} rows in batches of {mine[2]}, and rank 0 has "
            f"{theirs[1]} in batches of {theirs[2]}, counted over all ranks. They share one order of rows, "
            "so every rank needs the whole dataset and the same batch size. For a dataset that is split "
            "already, set Trainer(use_distributed_sampler=False)."
        )
    if stream.stage == "train" and None not in (batches, theirs[3]) and batches != theirs[3]:
        raise ConfigError(
            f"{_name(stream)}: rank {job.rank} has {batches} batches, and rank 0 has {theirs[3]}. Each step "
            "needs a batch on every rank: give every rank as many, or set Trainer(limit_train_batches=...) "
            "to the smallest number."
        )
    if shares.splits and shares.seeds is not None:
        shares.seeds = seeds
    if shares.splits and not shares.said:
        shares.said = True
        _say_what_is_repeated(stream)


def _say_what_is_repeated(stream: BatchStream) -> None:
    shares, units = stream.shares, stream.shares.units()
    grid = shares.grid
    if units is None or grid is None or shares.drop_last or stream.limit < (stream.length() or 0):
        return
    left = units % grid.size
    if 0 < left < shares.ranks:
        what = "row" if shares.batches is not None or shares.loader.batch_sampler is None else "batch"
        rank_zero_warn(
            f"{_name(stream)}: of its {units} {_plural(what, units)}, {left} {_plural(what, left)} "
            f"{'is' if left == 1 else 'are'} left for the last step of {shares.ranks} ranks, and each rank "
            "needs one. So some ranks have the same. Leave them out with drop_last=True, or by limiting the "
            "batches."
        )


def _plural(what: str, count: int) -> str:
    return what if count == 1 else "batches" if what == "batch" else f"{what}s"


def _name(stream: BatchStream) -> str:
    kind = {"validation": "val"}.get(stream.stage, stream.stage)
    return f"{kind}_dataloader" + (f", loader {stream.index}" if stream.index else "")


def draw_together(stream: BatchStream) -> dict[str, Any]:
    """Draw an epoch's order on every rank as rank 0 draws it, from its generators as they are.

    Ranks: all. Blocks: until rank 0 has told their states.

    Returns:
        What rank 0 has drawn it from; the generators of the other ranks are as before.
    """
    job, order = stream.job, stream.order
    assert job is not None and order is not None
    own = {**stream.begin_state(), "loader_drew": True} if job.rank == 0 else None
    begin: dict[str, Any] = job.broadcast(own)
    with nullcontext() if job.rank == 0 else isolate_rng():
        if job.rank:
            rng.restore(begin["generators"])
            stream.restore_order(begin, generators_of_samplers(stream.loader))
        order.seek(0, ended=False)
    return begin


def compared(stream: BatchStream, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of a loader that is not split; if the first is the same on every rank, that is said.

    Ranks: all. Blocks: until all have their first batch; once for each loader.
    """
    job = stream.job
    if job is None or not job.distributes or stream.seekable or stream.shares.said:
        return batches
    stream.shares.said = True
    return _compared(stream, batches)


def _compared(stream: BatchStream, batches: Iterator[Any]) -> Iterator[Any]:
    job = stream.job
    assert job is not None
    first = next(batches, _END)
    found = job.gather(None if first is _END else _digest(first))
    if found is not None and None not in found and len(set(found)) == 1:
        rank_zero_warn(
            f"{_name(stream)}: the first batch of {described(stream.loader)} is the same on all {job.ranks} "
            "ranks. Only map-style datasets are split among them. Let this one give each rank other rows, by "
            "torch.distributed.get_rank() and get_world_size()."
        )
    if first is not _END:
        yield first
        yield from batches


def _digest(batch: Any) -> str:
    """A short text that is the same for equal batches."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().contiguous().view(-1)
            rows = flat[: _HASHED_BYTES // flat.element_size()]
            digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            digest.update(bytes(rows.view(torch.uint8).numpy()) if len(rows) else b"")
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
