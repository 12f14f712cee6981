"""A job of several ranks that goes on from a checkpoint: bit-identical with as many ranks, exact in its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import EMAWeightAveraging

from . import ddp_jobs
from .ddp_features import Finetuned, Unfreezes
from .ddp_jobs import Net, PlainNet, train_with, whole_and_resumed
from .ranks import run_ranks

SMALL = {"bucket_cap_mb": 0.002}
"""Buckets of 2 KiB, so that there are several."""


SOME = (2, 5, 9, 12)
"""Files that are saved: after the 2nd batch, the 5th, between the epochs, and after the 3rd batch of the second."""

INSIDE = (1, 3, 4, 12)
"""Before the first step where windows have two batches, after one's first batch and its second; in the next epoch."""


def exact(place: Path, numbers: Any, options: dict[str, Any], learn: bool = False) -> Any:
    if learn:  # as torch does it
        from holdfast.strategies import ddp

        ddp.fix_order = lambda wrapped, order: None
    return whole_and_resumed(place, numbers, options)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_with_as_many_ranks_it_is_bit_identical_from_any_batch(tmp_path: Path, ranks: int) -> None:
    options = {"ddp": SMALL, "data": {"noisy": True}}
    for differs in run_ranks(exact, tmp_path, SOME, options, ranks=ranks):
        assert differs == [[], [], [], []]


def test_without_the_fixed_order_of_its_buckets_it_is_not(tmp_path: Path) -> None:
    options = {"ddp": SMALL, "max_epochs": 1}
    for differs in run_ranks(exact, tmp_path, (3,), options, True, ranks=3):
        assert differs == [["weights", "optimizer", "losses", "logged"]]


def test_inside_an_accumulation_window_with_buckets_that_are_gradients(tmp_path: Path) -> None:
    options = {"ddp": {**SMALL, "gradient_as_bucket_view": True}, "accumulate_grad_batches": 2,
               "gradient_clip_val": 0.05, "precision": "16-mixed"}  # fmt: skip
    for differs in run_ranks(exact, tmp_path, INSIDE, options, ranks=3):
        assert differs == [[], [], [], []]


def test_with_buffers_of_each_ranks_own_and_unused_parameters(tmp_path: Path) -> None:
    options = {"ddp": {**SMALL, "broadcast_buffers": False, "find_unused_parameters": True}}
    for differs in run_ranks(exact, tmp_path, INSIDE, options, ranks=3):
        assert differs == [[], [], [], []]


def test_where_parameters_are_unfrozen_on_the_way(tmp_path: Path) -> None:
    options = {"ddp": SMALL, "make": Finetuned, "callbacks": (Unfreezes,)}
    for differs in run_ranks(exact, tmp_path, SOME, options, ranks=3):
        assert differs == [[], [], [], []]


def averaging() -> Any:
    return EMAWeightAveraging(decay=0.8)


def test_with_worker_processes_and_an_average_of_the_weights(tmp_path: Path) -> None:
    options = {"data": {"noisy": True, "workers": 2}, "callbacks": (averaging,), "precision": "bf16-mixed"}
    for differs in run_ranks(exact, tmp_path, INSIDE, options, ranks=2):
        assert differs == [[], [], [], []]


class Stops(pl.Callback):
    """Ends the run with an error on every rank, at the end of the tenth batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.total_batches == 9:
            raise RuntimeError("enough")


def stopped(place: Path) -> list[str]:
    with pytest.raises(RuntimeError, match="^enough$"):
        ddp_jobs.train(place, callbacks=(Stops,), ddp=SMALL, save=(10,))
    return sorted(str(file) for file in (place / "saved").iterdir())


def test_in_processes_of_their_own_after_an_error_and_after_max_steps(tmp_path: Path) -> None:
    options = {"ddp": SMALL}
    whole = run_ranks(train_with, tmp_path / "whole", None, options, ranks=3)
    last = run_ranks(stopped, tmp_path / "stopped", ranks=3)[0][-1]
    cut = run_ranks(train_with, tmp_path / "cut", None, {**options, "max_steps": 5, "save": (5,)}, ranks=3)
    for file in (last, cut[0]["files"][5]):
        again = run_ranks(train_with, tmp_path / "again", file, options, ranks=3)
        for one, other in zip(again, whole, strict=True):
            assert (one["weights"], one["optimizer"], one["draws"]) == (
                other["weights"],
                other["optimizer"],
                other["draws"],
            )
            assert one["losses"] == other["losses"][-len(one["losses"]) :]


def test_another_number_of_ranks_goes_on_with_the_same_global_batches(tmp_path: Path) -> None:
    options = {"make": PlainNet, "accumulate_grad_batches": 2}

    def go(name: str, ranks: int, file: str | None = None, save: Any = ()) -> list[dict[str, Any]]:
        return run_ranks(train_with, tmp_path / name, file, {**options, "save": save}, ranks=ranks)

    four = go("four", 4, save=(3, 6))
    files = four[0]["files"]
    two = go("two", 2, files[3], save=(8,))  # inside a window
    back = go("back", 4, two[0]["files"][8])
    one = go("one", 1, files[6], save=(11,))
    up = go("up", 2, one[0]["files"][11])
    for job in (two, back, one, up):
        for rank in job:
            assert rank["steps"] == four[0]["steps"]
            torch.testing.assert_close(rank["values"], four[0]["values"], rtol=1e-4, atol=1e-5)
            assert rank["weights"] == job[0]["weights"] and rank["optimizer"] == job[0]["optimizer"]


def test_one_process_torch_and_lightning_open_the_file_of_a_job(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "save": (3,)}
    file = run_ranks(train_with, tmp_path, None, options, ranks=2)[0]["files"][3]
    plain = torch.load(file, weights_only=True)
    assert list(plain["state_dict"]) == list(Net().state_dict())
    own = plain["holdfast"]
    assert own["world_size"] == 2
    assert own["ranks"][0] == {}
    assert {"generators", "metrics"} <= set(own["ranks"][1]) <= {"generators", "metrics", "data"}
    found = Net.load_from_checkpoint(file).state_dict()
    torch.testing.assert_close(dict(found), dict(plain["state_dict"]), rtol=0, atol=0)

    lightning = pytest.importorskip("lightning.pytorch")

    class Theirs(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            for name, child in Net().named_children():
                self.add_module(name, child)

    theirs = Theirs.load_from_checkpoint(file, weights_only=True).state_dict()
    torch.testing.assert_close(dict(theirs), dict(plain["state_dict"]), rtol=0, atol=0)
