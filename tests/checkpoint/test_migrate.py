"""Files of other makers, brought to today's shape."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.checkpoint.migrate import upgrade
from holdfast.errors import CheckpointIncompatible


def lightnings(ready: int, processed: int, completed: int, epochs_processed: int) -> dict[str, Any]:
    """The position in a file of Lightning 2, in epoch 1."""
    batches = {"ready": ready, "started": ready, "processed": processed, "completed": completed}
    epochs = {"ready": 2, "started": 2, "processed": epochs_processed, "completed": 1}
    return {
        "state_dict": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "epoch": 1,
        "global_step": 9,
        "loops": {
            "fit_loop": {
                "epoch_progress": {"current": epochs, "total": epochs},
                "epoch_loop.batch_progress": {"current": batches, "total": batches, "is_last_batch": False},
                "epoch_loop.state_dict": {"_batches_that_stepped": 9},
            }
        },
    }


@pytest.mark.parametrize(
    ("payload", "stage", "batch"),
    [
        (lightnings(3, 3, 2, 1), "batch", 3),
        (lightnings(5, 5, 5, 1), "validated", 5),
        (lightnings(5, 5, 5, 2), "end", 5),
        (lightnings(0, 0, 0, 1), "start", 0),
    ],
)
def test_the_position_of_lightning_2(payload: dict[str, Any], stage: str, batch: int) -> None:
    run = upgrade(payload, source="a.ckpt")["holdfast"]
    assert not run["exact"]
    assert run["kind"] == "full"
    progress = run["progress"]
    assert (progress["epoch"], progress["stage"], progress["batch"], progress["global_step"]) == (
        1,
        stage,
        batch,
        9,
    )


def test_files_without_loops() -> None:
    run = upgrade({"state_dict": {}, "epoch": 3, "global_step": 12}, source="a.ckpt")["holdfast"]
    assert run["kind"] == "weights"
    assert run["progress"] == {"epoch": 3, "stage": "end", "global_step": 12, "batches_that_stepped": 12}
    assert upgrade({"state_dict": {}}, source="a.ckpt")["holdfast"]["progress"]["stage"] == "start"


def test_the_scaler_of_lightning_1() -> None:
    payload = {"state_dict": {}, "optimizer_states": [], "native_amp_scaling_state": {"scale": 2.0}}
    upgraded = upgrade(payload, source="a.ckpt")
    assert upgraded["MixedPrecision"] == {"scale": 2.0}
    assert upgraded["lr_schedulers"] == []
    assert "native_amp_scaling_state" in payload


@pytest.mark.parametrize(
    "odd",
    [
        {"epoch": None},
        {"epoch": "best"},
        {"loops": {"fit_loop": []}},
        {"loops": {"fit_loop": {"epoch_progress": 3}}},
        {"loops": None},
    ],
)
def test_odd_counters_count_as_none(odd: dict[str, Any]) -> None:
    progress = upgrade({"state_dict": {}, **odd}, source="a.ckpt")["holdfast"]["progress"]
    assert (progress["epoch"], progress["global_step"]) == (0, 0)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([1], "a.ckpt holds a list, expected a dict with 'state_dict'."),
        ({"model": {}}, "a.ckpt has no 'state_dict'; its keys are ['model']. Is it a checkpoint of a model?"),
        (
            {"state_dict": {}, "holdfast": {"format_version": 2}},
            "a.ckpt has format version 2; this holdfast reads up to 1. Upgrade holdfast.",
        ),
        (
            {"state_dict": {}, "holdfast": {"format_version": "2"}},
            "a.ckpt has format version '2'; this holdfast reads up to 1. Upgrade holdfast.",
        ),
    ],
)
def test_what_is_refused(payload: Any, message: str) -> None:
    with pytest.raises(CheckpointIncompatible) as refused:
        upgrade(payload, source="a.ckpt")
    assert str(refused.value) == message
