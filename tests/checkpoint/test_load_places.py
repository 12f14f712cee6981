"""Where a load puts things: what is skipped and yet shared, and arrays, which are always in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load


def save(payload: Any, path: Path) -> Path:
    CheckpointEngine().save(payload, path)
    return path


def test_arrays_stay_arrays_wherever_tensors_go(tmp_path: Path) -> None:
    numbers, names = np.arange(5.0), np.array(["a", "bc"])
    payload = {
        "w": torch.ones(3),
        "arrays": {"numbers": numbers, "names": names, "when": np.array(["2024-01-02"], dtype="M8[D]")},
        "deep": [({"again": numbers, "other": np.float32(2.5)}, torch.zeros(2))],
        "generator": np.random.RandomState(0).get_state(),
    }
    path = save(payload, tmp_path / "a.ckpt")
    for where in ("meta", lambda storage, location: torch.UntypedStorage(storage.nbytes(), device="meta")):
        found = load(path, map_location=where)
        assert found["w"].is_meta and found["deep"][0][1].is_meta
        assert type(found["arrays"]["numbers"]) is np.ndarray
        assert found["arrays"]["numbers"].tolist() == numbers.tolist()
        assert found["arrays"]["names"].tolist() == ["a", "bc"]
        assert found["arrays"]["when"].dtype == np.dtype("M8[D]")
        assert found["deep"][0][0]["again"].tolist() == numbers.tolist()
        assert (found["generator"][1] == payload["generator"][1]).all()


def test_what_two_keys_share_is_read_for_the_one_that_is_kept(tmp_path: Path) -> None:
    shared = {"w": torch.arange(4.0), "sparse": torch.eye(2).to_sparse_coo()}
    base = torch.arange(100.0)
    payload = {
        "optimizer_states": [shared, base[:60]],
        "callbacks": {"average": shared, "array": np.arange(3)},
        "state_dict": {"w": base[40:]},
        "empty": torch.empty(0),
    }
    found = load(save(payload, tmp_path / "a.ckpt"), skip=["optimizer_states"])
    assert set(found) == {"callbacks", "state_dict", "empty"}
    average = found["callbacks"]["average"]
    assert torch.equal(average["w"], torch.arange(4.0))
    assert torch.equal(average["sparse"].to_dense(), torch.eye(2))
    assert torch.equal(found["state_dict"]["w"], base[40:])
    assert found["callbacks"]["array"].tolist() == [0, 1, 2]
    assert found["empty"].shape == (0,)


def test_keys_with_slashes_are_skipped_by_their_own_names(tmp_path: Path) -> None:
    payload = {"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}, "c~d": torch.ones(1)}
    path = save(payload, tmp_path / "a.ckpt")
    assert set(load(path, skip=["a/b", "c~d"])) == {"a"}
    assert load(path, skip=["a"])["a/b"].tolist() == [1, 1]


@pytest.mark.parametrize("skip", [(), ("optimizer_states",)])
def test_a_tensor_that_was_saved_on_the_meta_device(skip: tuple[str, ...], tmp_path: Path) -> None:
    payload = {"w": torch.empty(2, 3, device="meta"), "x": torch.ones(2), "optimizer_states": [torch.ones(3)]}
    found = load(save(payload, tmp_path / "a.ckpt"), skip=skip)
    assert found["w"].is_meta and found["w"].shape == (2, 3)
    assert found["x"].tolist() == [1, 1]
