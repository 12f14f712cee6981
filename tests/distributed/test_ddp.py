"""DDP: ranks train what one process would, say what is wrong, and average no more often than they have to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.errors import ArgumentError, ConfigError
from holdfast.strategies import DDPStrategy

from .ddp_features import (
    ALIKE,
    LeftOut,
    NoneForAll,
    TrainsOther,
    count,
    fail,
    fail_statically,
    fix_the_order_of,
    look_at,
    made,
    train_alike,
    trained,
)
from .ddp_jobs import Net
from .ranks import run_ranks

PlainNet = ALIKE["automatic optimization"][0]


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_alike, tmp_path_factory.mktemp("alike"), ranks=2)


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(look_at, tmp_path_factory.mktemp("looked"), ranks=2)


@pytest.mark.parametrize("what", list(ALIKE))
def test_ranks_train_what_one_process_does(tmp_path: Path, alike: list[dict[str, Any]], what: str) -> None:
    make, options = ALIKE[what]
    alone = trained(make, tmp_path, "auto", devices=1, **made(options))
    torch.testing.assert_close(alike[0][what], alone, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(alike[1][what], alike[0][what], rtol=0, atol=0)


def test_the_strategy_shows_the_wrapper_while_it_trains(looked: list[dict[str, Any]]) -> None:
    for rank in looked:
        assert (rank["shown"], rank["same"]) == ("DistributedDataParallel", [True, True])
        assert rank["after"]


def test_every_rank_validates_and_keeps_rank_zeros_buffers(looked: list[dict[str, Any]]) -> None:
    assert len(looked[0]["validated"]) == 2
    assert looked[0]["validated"] == looked[1]["validated"]
    assert looked[0]["buffers"] == looked[1]["buffers"]


def test_a_backward_that_averages_nothing_is_said(looked: list[dict[str, Any]]) -> None:
    expected = (
        "PlainBackward steps an optimizer before any self.manual_backward(loss). That is where processes "
        "average their gradients; loss.backward() leaves each with its own."
    )
    assert [rank["warned"] for rank in looked] == [[expected], []]


def test_a_module_without_parameters_runs(looked: list[dict[str, Any]]) -> None:
    assert [rank["nothing"] for rank in looked] == [3, 3]


def test_a_rank_without_a_loss_adds_nothing_and_keeps_nobody_waiting(looked: list[dict[str, Any]]) -> None:
    for what in ("without loss", "without loss, scaled"):
        torch.testing.assert_close(looked[0][what], looked[1][what], rtol=0, atol=0)


def test_a_batch_that_no_rank_has_a_loss_for_is_no_step(looked: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="^training_step returned None"):
        alone = trained(NoneForAll, tmp_path, "auto", devices=1)
    torch.testing.assert_close(looked[0]["none for all"], alone, rtol=1e-3, atol=1e-5)


def test_unused_parameters_are_left_alone_where_that_is_asked_for(looked: list[dict[str, Any]]) -> None:
    for rank in looked:
        assert rank["unused"]["also"].item() == 0
        torch.testing.assert_close(rank["unused"], looked[0]["unused"], rtol=0, atol=0)


@pytest.mark.parametrize(("window", "averaged"), [(1, 8), (3, 3)])
def test_gradients_are_averaged_once_in_a_window_and_from_the_second_step_on_in_the_same_buckets(
    tmp_path: Path, window: int, averaged: int
) -> None:
    # Before the first step, torch has one bucket.
    first, *buckets = run_ranks(count, tmp_path, {"accumulate_grad_batches": window})[0]
    each = buckets[: len(buckets) // (averaged - 1)]
    assert len(each) > 1
    assert buckets == each * (averaged - 1)
    assert sorted(first) == sorted(shape for bucket in each for shape in bucket)


def test_the_order_is_fixed_without_a_trace_and_never_changes_again(tmp_path: Path) -> None:
    for rank in run_ranks(fix_the_order_of, tmp_path, ranks=2):
        assert rank["called"] == [] and not rank["again"]
        assert rank["unchanged"] and rank["gradients"]
        assert rank["steps"][0] == rank["steps"][1] == rank["steps"][2]
        assert rank["order"]
        assert [shape for bucket in rank["steps"][0] for shape in bucket] == rank["shapes"]
        assert rank["called later"] == ["after", "hook"]


UNUSED = (
    "ConfigError: The loss of LeftOut.training_step did not depend on 3 parameters that require gradients: also, "
    "unused.weight, unused.bias. With several processes each must get a gradient at every step. Freeze what is "
    "not trained (requires_grad = False), or use Trainer(strategy='ddp_find_unused_parameters_true')."
)


@pytest.mark.parametrize("steps", [1, 5])
def test_parameters_that_the_loss_leaves_out_are_named(tmp_path: Path, steps: int) -> None:
    assert run_ranks(fail, LeftOut, tmp_path, "ddp", {"max_steps": steps}, ranks=2) == [UNUSED, UNUSED]


def test_ranks_that_train_different_parameters_are_told_so(tmp_path: Path) -> None:
    first = "ConfigError: The ranks of this job do not train the same parameters; "
    last = ". Build, freeze and unfreeze the model alike on all of them."
    assert run_ranks(fail, TrainsOther, tmp_path, "ddp", {}, ranks=2) == [
        f"{first}another rank differs from rank 0, and its error names what{last}",
        f"{first}rank 1 and rank 0 differ: head.bias on rank 0 only{last}",
    ]


def test_synchronised_batch_norm_on_the_cpu_is_refused(tmp_path: Path) -> None:
    expected = (
        "ConfigError: Trainer(sync_batchnorm=True): torch has no SyncBatchNorm for the CPU, and Net has BatchNorm "
        "layers: norm. Train on GPUs, or leave sync_batchnorm out: each process then uses the statistics of its "
        "own part of a batch."
    )
    assert run_ranks(fail, Net, tmp_path, "ddp", {"sync_batchnorm": True}, ranks=2) == [expected] * 2


def test_a_static_graph_needs_automatic_optimization(tmp_path: Path) -> None:
    expected = (
        "ConfigError: DDPStrategy(static_graph=True) needs automatic optimization: TwoOptimizers runs backward "
        "inside of training_step, where torch cannot learn the graph. Leave it out."
    )
    assert run_ranks(fail_statically, tmp_path, ranks=2) == [expected] * 2


def test_options_that_there_are_not_are_refused() -> None:
    with pytest.raises(ArgumentError) as unknown:
        DDPStrategy(find_unused_parameter=True)
    assert str(unknown.value) == (
        "DDPStrategy() got an unexpected keyword argument 'find_unused_parameter'. Did you mean "
        "'find_unused_parameters'?"
    )
    with pytest.raises(ConfigError) as averaging:
        DDPStrategy(model_averaging_period=4)
    assert str(averaging.value) == (
        "DDPStrategy(model_averaging_period=4) is not supported: gradients are averaged at every step. Leave it "
        "out."
    )
    with pytest.raises(ConfigError) as start:
        DDPStrategy(start_method="spawn")
    assert str(start.value) == (
        "DDPStrategy(start_method='spawn'): expected 'popen': the other processes run the same command as this "
        "one."
    )
