"""Checkpoints of other makers and other times, brought to today's shape.

First through the eras of Lightning (`eras`), then from Lightning's position in a run to holdfast's. A file of
ours passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from holdfast.checkpoint import eras
from holdfast.checkpoint.eras import count, inner
from holdfast.checkpoint.shape import check_shape
from holdfast.errors import CheckpointIncompatible

FORMAT_VERSION = 1
LIGHTNING_VERSION = "2.6.0"
"""Written into our files: a version at which Lightning's own migrations change nothing."""


def upgrade(payload: Any, *, source: str) -> dict[str, Any]:
    """Return the payload in today's shape, whoever wrote it.

    Args:
        payload: What `checkpoint.load.load` returned.
        source: The file's name, for messages.

    Raises:
        CheckpointIncompatible: it is not a dict with a ``state_dict``, or a newer holdfast wrote it.
    """
    if not isinstance(payload, Mapping):
        raise CheckpointIncompatible(
            f"{source} holds a {type(payload).__name__}, expected a dict with 'state_dict'."
        )
    upgraded = dict(payload)
    if "state_dict" not in upgraded:
        found = sorted(map(str, upgraded))[:8]
        raise CheckpointIncompatible(
            f"{source} has no 'state_dict'; its keys are {found}. Is it a checkpoint of a model?"
        )
    run = upgraded.get("holdfast")
    if isinstance(run, Mapping):
        version = run.get("format_version", 0)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointIncompatible(
                f"{source} has format version {version!r}; this holdfast reads up to "
                f"{FORMAT_VERSION}. Upgrade holdfast."
            )
        check_shape(upgraded, source)
        return upgraded
    for change in eras.CHANGES:
        if change.applies(upgraded):
            change.make(upgraded)
    for applies, make in _TO_HOLDFAST:
        if applies(upgraded):
            make(upgraded)
    check_shape(upgraded, source)
    return upgraded


def _has_loops(payload: dict[str, Any]) -> bool:
    return bool(inner(payload, "loops", "fit_loop"))


def _position_from_loops(payload: dict[str, Any]) -> None:
    """Lightning >= 1.6 keeps its position under "loops"; ours is one record of counters."""
    loop = payload["loops"]["fit_loop"]
    current = inner(loop, "epoch_loop.batch_progress", "current")
    done = count(current.get("processed"))
    epoch = count(payload.get("epoch"))
    epochs = inner(loop, "epoch_progress", "current")
    begun = count(epochs.get("ready"))
    if begun and begun == count(epochs.get("completed")):
        # Saved between two epochs, such as after fit: the batches that it counts are the last one's.
        epoch, done, stage = begun, 0, "start"
    elif count(epochs.get("processed")) > epoch:
        stage = "end"
    elif done == 0:
        stage = "start"
    elif count(current.get("completed")) < done:
        stage = "batch"  # saved in on_train_batch_end: validation, if due, is still to come
    else:
        stage = "validated"
    state = inner(loop, "epoch_loop.state_dict")
    steps = count(payload.get("global_step"))
    payload["holdfast"] = {
        "format_version": FORMAT_VERSION,
        "kind": "full" if "optimizer_states" in payload else "weights",
        "exact": False,
        "progress": {
            "epoch": epoch,
            "batch": done,
            "stage": stage,
            "global_step": steps,
            "batches_that_stepped": count(state.get("_batches_that_stepped", steps)),
            "total_batches": count(inner(loop, "epoch_loop.batch_progress", "total").get("processed", done)),
        },
    }


def _lacks_position(payload: dict[str, Any]) -> bool:
    return "holdfast" not in payload


def _position_from_counters(payload: dict[str, Any]) -> None:
    """Plain torch's and other makers' files know epoch and step at most; the epoch counts as ended."""
    payload["holdfast"] = {
        "format_version": FORMAT_VERSION,
        "kind": "full" if "optimizer_states" in payload else "weights",
        "exact": False,
        "progress": {
            "epoch": count(payload.get("epoch")),
            "stage": "end" if "epoch" in payload else "start",
            "global_step": count(payload.get("global_step")),
            "batches_that_stepped": count(payload.get("global_step")),
        },
    }


def _lacks_lists(payload: dict[str, Any]) -> bool:
    return "optimizer_states" in payload and "lr_schedulers" not in payload


def _add_lists(payload: dict[str, Any]) -> None:
    """A run without schedulers may leave their list out."""
    payload["lr_schedulers"] = []


def _ranks_one(state: Any) -> bool:
    known = isinstance(state, Mapping) and "best_k_models" not in state
    return known and bool(state.get("best_model_path")) and state.get("best_model_score") is not None


def _lacks_rankings(payload: dict[str, Any]) -> bool:
    return any(_ranks_one(state) for state in inner(payload, "callbacks").values())


def _add_rankings(payload: dict[str, Any]) -> None:
    """Early states of ModelCheckpoint name the best model alone: then it is all that is ranked."""
    payload["callbacks"] = {
        key: {**state, "best_k_models": {state["best_model_path"]: state["best_model_score"]}}
        if _ranks_one(state)
        else state
        for key, state in payload["callbacks"].items()
    }


_TO_HOLDFAST: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], None]], ...] = (
    (_lacks_lists, _add_lists),
    (_lacks_rankings, _add_rankings),
    (_has_loops, _position_from_loops),
    (_lacks_position, _position_from_counters),
)
