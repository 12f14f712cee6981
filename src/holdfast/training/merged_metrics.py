"""Accumulators of one number of processes, shared out among another, in the middle of an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.utilities.rank_zero import rank_zero_warn


def merge(states: Sequence[dict[str, Any]], objects: Mapping[str, Any], rank: int, world_size: int) -> Any:
    """This rank's share of what all ranks had gathered: together the shares are what there was.

    Sums and the sums behind means are split evenly, extremes are everybody's; a TorchMetrics state is merged
    by its own reduction. What has none stays rank 0's, and that is said.

    Args:
        states: What `MetricStore.state_dict` gave on each rank that there was.
        objects: The TorchMetrics objects of the module, by path.
        rank: This process's.
        world_size: Of the job that goes on.
    """
    merged = dict(states[0])
    merged["train"] = _merged_entries([state["train"] for state in states], rank, world_size)
    lost: list[str] = []
    merged["objects"] = {
        path: _merged_object(path, [state["objects"][path] for state in states if path in state["objects"]],
                             objects.get(path), rank, lost)
        for path in merged["objects"]
    }  # fmt: skip
    if lost:
        rank_zero_warn(
            f"The processes were {len(states)} and are {world_size} now, and nothing tells how to merge what "
            f"each had gathered in {', '.join(lost)}. What rank 0 had is kept; what others had is left out "
            "of this epoch. Give add_state a dist_reduce_fx."
        )
    return merged


# -- self.log ------------------------------------------------------------------------------------------------


def _merged_entries(
    ranks: Sequence[list[dict[str, Any]]], rank: int, world_size: int
) -> list[dict[str, Any]]:
    by_key: dict[Any, list[dict[str, Any]]] = {}
    for entries in ranks:
        for entry in entries:
            by_key.setdefault((entry["fx"], entry["name"], entry["loader"]), []).append(entry)
    return [_merged_entry(found, rank, world_size) for found in by_key.values()]


def _merged_entry(found: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    merged = dict(found[min(rank, len(found) - 1)])
    if merged["metric"] is not None or _is_rank_zeros(merged["asked"]):
        return merged
    totals = [entry["total"] for entry in found if entry["total"] is not None]
    if not totals:
        return merged
    if merged["reduce"] in ("min", "max"):
        merged["total"] = _extreme(totals, merged["reduce"])
        return merged
    merged["total"] = _share(functools.reduce(lambda one, other: one + other, totals), rank, world_size)
    if merged["reduce"] == "mean":
        merged["weight"] = sum(entry["weight"] for entry in found) / world_size
    return merged


def _is_rank_zeros(asked: Sequence[Any]) -> bool:
    """Whether it was logged with ``rank_zero_only=True``, which is the last of what can be asked for."""
    return len(asked) > 6 and asked[-1] is True


def _share(total: Any, rank: int, world_size: int) -> Any:
    whole = not total.is_floating_point() if isinstance(total, Tensor) else isinstance(total, int)
    if not whole:
        return total / world_size
    return total // world_size + (total % world_size if rank == 0 else 0)


def _extreme(totals: Sequence[Any], which: str) -> Any:
    if not any(isinstance(total, Tensor) for total in totals):
        return min(totals) if which == "min" else max(totals)
    pick: Callable[[Tensor, Tensor], Tensor] = torch.minimum if which == "min" else torch.maximum
    return functools.reduce(pick, map(torch.as_tensor, totals))


# -- TorchMetrics --------------------------------------------------------------------------------------------


def _merged_object(
    path: str, ranks: Sequence[dict[str, Any]], metric: Any, rank: int, lost: list[str]
) -> dict[str, Any]:
    merged = dict(ranks[0])
    if metric is None or (len(ranks) == 1 and rank == 0):
        return merged
    reductions = getattr(metric, "_reductions", {})
    merged["states"] = {}
    for name in ranks[0]["states"]:
        values = [one["states"].get(name) for one in ranks]
        reduction = getattr(reductions.get(name), "__name__", "")
        state, known = _merged_state(values, reduction, metric._defaults.get(name), rank)
        merged["states"][name] = state
        if not known and len(ranks) > 1:
            lost.append(f"{path}.{name}")
    return merged


def _merged_state(values: Sequence[Any], reduction: str, default: Any, rank: int) -> tuple[Any, bool]:
    """A state of all ranks, and whether its reduction is a known one. Sums and lists go to rank 0."""
    if isinstance(values[0], list):
        return ([item for value in values for item in value] if rank == 0 else []), True
    if reduction == "dim_zero_sum":
        return (torch.stack(list(values)).sum(0) if rank == 0 else default.clone()), True
    if reduction == "dim_zero_mean":
        return torch.stack(list(values)).mean(0), True
    if reduction in ("dim_zero_max", "dim_zero_min"):
        stacked = torch.stack(list(values))
        return (stacked.amax(0) if reduction == "dim_zero_max" else stacked.amin(0)), True
    if reduction == "dim_zero_cat":
        whole = torch.cat([torch.atleast_1d(value) for value in values])
        return (whole if rank == 0 else whole[:0]), True
    return values[0], False
