"""What of a run differs from process to process: gathered into the checkpoint, and given back by rank.

The checkpoint's own keys hold rank 0's, so that one process can open and go on from it. Beside them is
"ranks": for every rank a dict with what is another there, ``{}`` for rank 0. No weights and no optimizer
state are sent: these are equal everywhere.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.training import rng
from holdfast.training.sharding import of_another_rank
from holdfast.utilities.nested import mapped
from holdfast.utilities.rank_zero import rank_zero_info, warn_once
from holdfast.utilities.wrapped_names import buffers_of

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_WHOLE = ("generators", "own_generators", "data", "validation_data", "metrics")
"""Keys that are another rank's as a whole or not at all."""

_BY_NAME = ("gradients", "buffers")
"""Keys under which single tensors may differ."""


# -- capture -------------------------------------------------------------------------------------------------


def gather(trainer: Trainer, run: dict[str, Any], *, inside_window: bool) -> None:
    """Put what differs on other ranks into rank 0's part of the checkpoint.

    Only digests are sent of what is the same, and gradients only inside an accumulation window.

    Ranks: all. Blocks: until all have sent. On return: rank 0's ``run`` has "ranks"; nobody else's has.

    Args:
        trainer: Whose run.
        run: The "holdfast" part of the checkpoint, as this rank sees it.
        inside_window: Gradients of earlier batches wait for those of the next ones.
    """
    strategy = trainer.strategy
    run["world_size"] = strategy.world_size
    if strategy.world_size == 1:
        return
    run["reduction_order"] = strategy.reduction_order()
    parts: dict[tuple[str, str], Any] = {(key, ""): run.get(key) for key in _WHOLE}
    if inside_window and not strategy.shards_model:  # which saves them by itself
        parts |= {("gradients", name): one for name, one in (run["gradients"] or {}).items()}
    if not strategy.keeps_buffers_equal(inside_window=inside_window):
        buffers = buffers_of(trainer.lightning_module)
        parts |= {("buffers", name): part._buffers[key] for name, part, key in buffers}
    packed = {key: _packed(key, value) for key, value in parts.items()}
    digests = {key: hashlib.blake2b(value, digest_size=16).digest() for key, value in packed.items()}
    all_digests = strategy.gather(digests)
    wanted = None if all_digests is None else [_other_than(all_digests[0], one) for one in all_digests]
    wanted = strategy.broadcast(wanted)
    assert wanted is not None
    sent = strategy.gather({key: packed.get(key) for key in wanted[strategy.global_rank]})
    if sent is not None:
        run["ranks"] = [_unpacked(one) for one in sent]


def _other_than(first: Mapping[Any, bytes], other: Mapping[Any, bytes]) -> list[Any]:
    return [key for key in {**first, **other} if first.get(key) != other.get(key)]


def _packed(key: tuple[str, str], value: Any) -> bytes:
    """A value as bytes, with its tensors on the CPU: another rank's device is none of rank 0's business."""
    on_cpu = mapped(value, lambda one: one.detach().cpu() if isinstance(one, Tensor) else one)
    try:
        return pickle.dumps(mapped(on_cpu, _own_memory))
    except Exception as error:  # a loader's state may hold anything
        warn_once(
            ("cannot be sent", key),
            f"{key[0]!r} of this rank cannot be sent to rank 0, so it is in no checkpoint: {error}",
        )
        return pickle.dumps(None)


def _own_memory(value: Any) -> Any:
    """A tensor without the rest of a larger storage that it is a part of."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone()
    return value


def _unpacked(sent: Mapping[tuple[str, str], bytes | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (key, name), value in sent.items():
        one = None if value is None else pickle.loads(value)
        if key in _BY_NAME:
            found.setdefault(key, {})[name] = one
        else:
            found[key] = one
    return found


# -- restore -------------------------------------------------------------------------------------------------


def take_part(run: dict[str, Any], *, rank: int, world_size: int) -> None:
    """Make a checkpoint's run that of this rank; what belongs to others is let go of.

    With as many processes as it was saved with, each goes on from its own state. With another number:
    generators of ranks that there were not are seeded from the run's seed, the rank and the step; gradients
    of a window are averaged; accumulators wait in "metrics_of_ranks" for `merged_metrics.merge`. Of the rest,
    each has its own, and a rank that there was not has rank 0's, but for states of loaders.

    Args:
        run: The "holdfast" part of a checkpoint; changed in place.
        rank: This process's.
        world_size: Of the job that goes on.
    """
    saved = int(run.get("world_size", 1))
    ranks: list[dict[str, Any]] = [*run.pop("ranks", ()), *({} for _ in range(saved))][:saved]
    if saved == world_size:
        own = ranks[rank]
        run.update({key: own[key] for key in _WHOLE if key in own})
        for key in _BY_NAME:
            if key in own:
                run[key] = {**(run.get(key) or {}), **own[key]}
        return
    rank_zero_info(f"saved by {_processes(saved)}, goes on with {_processes(world_size)}")
    if "metrics" in run:
        run["metrics_of_ranks"] = [one.get("metrics", run["metrics"]) for one in ranks]
    if any("gradients" in one for one in ranks):
        run["gradients"] = _averaged(
            [{**(run["gradients"] or {}), **one.get("gradients", {})} for one in ranks]
        )
    if rank < saved:
        own = {key: value for key, value in ranks[rank].items() if key in _WHOLE and key != "metrics"}
        run.update(own)
        return
    if run.get("data"):
        run["data"] = of_another_rank(run["data"])
    if run.get("validation_data"):
        run["validation_data"] = [of_another_rank(one) for one in run["validation_data"]]
    if "generators" in run:
        step = int((run.get("progress") or {}).get("global_step", 0))
        run["generators"] = [{"seed": rng.derive(int(run.get("seed") or 0), "rank", rank, step)}]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _averaged(gradients: Sequence[Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    """The mean over ranks; one that has no gradient adds nothing."""
    totals: dict[str, Tensor] = {}
    for one in gradients:
        for name, gradient in one.items():
            if gradient is not None:
                totals[name] = totals[name] + gradient if name in totals else gradient
    return {name: total / len(gradients) for name, total in totals.items()}


def restore_generators(state: dict[str, Any]) -> list[str]:
    """Put the global generators back, or seed those of a rank that there was not.

    Returns:
        One sentence for each that could not be restored.
    """
    if "seed" not in state:
        return rng.restore(state)
    rng.seed_generators(state["seed"])
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(state["seed"])
    return []
