"""The engine's face: `holdfast.save`, what a report says, an engine that is copied or used again."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from moments import holds

from holdfast.checkpoint.catalog import read_summary
from holdfast.checkpoint.engine import CheckpointEngine, save
from holdfast.errors import ConfigError


def test_save_writes_anything_and_says_once_what_it_left_out(tmp_path: Path) -> None:
    state = {"model": torch.nn.Linear(2, 2).state_dict(), "epoch": 3, "schedule": lambda step: step}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save(state, tmp_path / "runs" / "a.ckpt")
        report = save(state, tmp_path / "runs" / "a.ckpt", step=7, metrics={"loss": 0.5})
    assert [str(one.message) for one in said] == [
        f"schedule is not in the checkpoint: {report.omissions[0][1]}"
    ]
    assert said[0].filename == __file__
    assert report.path == str(tmp_path / "runs" / "a.ckpt") and not report.background
    assert report.durable_s == report.blocked_s > report.write_s > 0 == report.waited_s
    assert report.gb_per_s > 0 and report.size_bytes == Path(report.path).stat().st_size
    assert holds(tmp_path / "runs" / "a.ckpt", {"model": dict(state["model"]), "epoch": 3})  # type: ignore[call-overload]
    summary = read_summary(report.path)
    assert (summary.step, summary.metrics) == (7, {"loss": 0.5})


@pytest.mark.parametrize("background", [False, True])
def test_a_summary_that_is_not_plain_is_refused_before_anything_happens(
    background: bool, tmp_path: Path
) -> None:
    engine = CheckpointEngine()
    call = engine.save_in_background if background else engine.save
    with pytest.raises(ConfigError) as refused:
        call({}, tmp_path / "a.ckpt", summary={"metrics": {"loss": torch.ones(1)}})  # type: ignore[operator]
    assert str(refused.value) == (
        "summary: metrics.loss is a Tensor; a summary holds plain values only (text, numbers, True, False, None, "
        "and lists and dicts of them)."
    )
    assert not list(tmp_path.iterdir())


def test_what_the_step_waited_for_the_copy_is_in_the_report(tmp_path: Path) -> None:
    engine = CheckpointEngine()
    weight = torch.nn.Parameter(torch.randn(1 << 16))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    pending = engine.save_in_background({"weight": weight}, tmp_path / "a.ckpt", late=[weight])
    assert engine.copying and pending.waited_s == 0
    optimizer.step()
    assert not engine.copying and pending.waited_s > 0
    assert pending.wait().waited_s == pending.waited_s
    before = pending.waited_s
    optimizer.step()
    engine.wait_for_copy()
    assert pending.waited_s == before
    engine.close()


def test_a_closed_engine_and_a_copy_of_one_in_use_save_as_a_new_one(tmp_path: Path) -> None:
    engine = CheckpointEngine()
    weight = torch.randn(1 << 16)
    engine.save_in_background({"weight": weight}, tmp_path / "a.ckpt", late=[weight])
    others = [copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))]
    engine.close()
    assert not engine.copying
    for number, one in enumerate([engine, *others]):
        assert not one.copying
        one.save_in_background({"weight": weight}, tmp_path / f"{number}.ckpt").wait()
        one.close()
        assert holds(tmp_path / f"{number}.ckpt", {"weight": weight})
