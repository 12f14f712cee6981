"""The averaging callbacks beside Lightning's: the same weights, and files that open both ways."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from tests.resume.harness import first_difference

from .averaged import loader, make_trainer, model_class

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

OURS = (WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging)
HALFWAY = "epoch=1.ckpt"


def train(pl: Any, callback: Any, root: Path, ckpt_path: Path | None = None, **model: Any) -> Any:
    """The weights after 4 epochs of ``pl``, which leaves a file of each in ``root``."""
    torch.manual_seed(0)
    every = pl.callbacks.ModelCheckpoint(dirpath=root, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(pl, [callback, every], max_epochs=4)
    module = model_class(pl)(**model)
    trainer.fit(module, loader(), loader(8), ckpt_path=ckpt_path)
    trainer.save_checkpoint(root / "end.ckpt")
    return module


def both(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Our callback of this name and Lightning's."""
    return tuple(getattr(pl.callbacks, name)(*arguments, **options) for pl in (holdfast, lightning))


def assert_same(mine: Any, theirs: Any) -> None:
    found = first_difference(dict(mine.state_dict()), dict(theirs.state_dict()))
    assert found is None, found


def assert_close(mine: Any, theirs: Any) -> None:
    """Theirs multiplies twice where ours has one kernel, so that the last bits differ."""
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(mine.state_dict()[name], value)


@pytest.mark.parametrize("ours", OURS)
def test_arguments(ours: Any) -> None:
    theirs = getattr(lightning.callbacks, ours.__name__)
    mine, known = (inspect.signature(one.__init__).parameters for one in (ours, theirs))
    assert list(mine) == list(known)
    assert [one.default for one in mine.values()] == [one.default for one in known.values()]
    assert inspect.signature(WeightAveraging.should_update).parameters.keys() == {
        "self",
        "step_idx",
        "epoch_idx",
    }


class TestWeightAveraging:
    def test_the_mean_is_the_same_to_the_bit(self, tmp_path: Path) -> None:
        mine, theirs = both("WeightAveraging")
        a = train(holdfast, mine, tmp_path / "a", norm=False)
        b = train(lightning, theirs, tmp_path / "b", norm=False)
        assert_same(a, b)
        assert first_difference(a.validated, b.validated) is None

    @pytest.mark.parametrize(
        "options",
        [
            {"decay": 0.8},
            {"decay": 0.8, "update_every_n_steps": 2, "update_starting_at_step": 1},
            {"decay": 0.8, "use_buffers": False, "update_starting_at_step": 0, "update_starting_at_epoch": 1},
        ],
    )
    def test_exponential(self, tmp_path: Path, options: dict[str, Any]) -> None:
        mine, theirs = both("EMAWeightAveraging", **options)
        assert_close(train(holdfast, mine, tmp_path / "a"), train(lightning, theirs, tmp_path / "b"))

    def test_files_hold_the_same(self, tmp_path: Path) -> None:
        mine, theirs = both("WeightAveraging")
        train(holdfast, mine, tmp_path / "a", norm=False)
        train(lightning, theirs, tmp_path / "b", norm=False)
        ours = torch.load(tmp_path / "a" / HALFWAY, weights_only=True)
        other = torch.load(tmp_path / "b" / HALFWAY, weights_only=False)
        for part in ("state_dict", "current_model_state", "averaging_state"):
            assert first_difference(dict(ours[part]), dict(other[part])) is None, part
        assert ours["callbacks"]["WeightAveraging"] == other["callbacks"]["WeightAveraging"]
        assert other.keys() - ours.keys() == set()

    def test_we_go_on_from_theirs(self, tmp_path: Path) -> None:
        mine, theirs = both("WeightAveraging")
        whole = train(lightning, theirs, tmp_path / "b", norm=False)
        assert_same(train(holdfast, mine, tmp_path / "a", tmp_path / "b" / HALFWAY, norm=False), whole)

    def test_they_go_on_from_ours(self, tmp_path: Path) -> None:
        mine, theirs = both("WeightAveraging")
        whole = train(holdfast, mine, tmp_path / "a", norm=False)
        assert_same(whole, train(lightning, theirs, tmp_path / "b", tmp_path / "a" / HALFWAY, norm=False))

    def test_theirs_load_the_average_from_ours(self, tmp_path: Path) -> None:
        whole = train(holdfast, both("EMAWeightAveraging", decay=0.5)[0], tmp_path)
        assert_same(whole, model_class(lightning).load_from_checkpoint(tmp_path / "end.ckpt"))


SWA = {"swa_epoch_start": 2, "annealing_epochs": 2}


class TestStochasticWeightAveraging:
    @pytest.mark.parametrize(
        "options",
        [
            SWA,
            {},
            {"swa_epoch_start": 1, "annealing_epochs": 0, "annealing_strategy": "linear"},
            {"swa_epoch_start": 0.5, "annealing_epochs": 3, "annealing_strategy": "linear", "device": None},
        ],
    )
    @pytest.mark.parametrize("scheduler", ["", "step", "epoch"])
    def test_the_same_weights_and_rates_to_the_bit(
        self, tmp_path: Path, options: dict[str, Any], scheduler: str
    ) -> None:
        mine, theirs = both("StochasticWeightAveraging", 0.01, **options)
        a = train(holdfast, mine, tmp_path / "a", norm=False, scheduler=scheduler)
        b = train(lightning, theirs, tmp_path / "b", norm=False, scheduler=scheduler)
        assert_same(a, b)
        assert a.rates == b.rates

    @pytest.mark.parametrize("scheduler", ["", "step", "epoch"])
    @pytest.mark.parametrize("name", ["epoch=0.ckpt", HALFWAY])
    def test_we_go_on_from_theirs(self, tmp_path: Path, scheduler: str, name: str) -> None:
        mine, theirs = both("StochasticWeightAveraging", 0.01, **SWA)
        whole = train(lightning, theirs, tmp_path / "b", norm=False, scheduler=scheduler)
        path = tmp_path / "b" / name
        assert_same(train(holdfast, mine, tmp_path / "a", path, norm=False, scheduler=scheduler), whole)

    @pytest.mark.parametrize("scheduler", ["", "step", "epoch"])
    @pytest.mark.parametrize("name", ["epoch=0.ckpt", HALFWAY])
    def test_they_go_on_from_ours(self, tmp_path: Path, scheduler: str, name: str) -> None:
        mine, theirs = both("StochasticWeightAveraging", 0.01, **SWA)
        whole = train(holdfast, mine, tmp_path / "a", norm=False, scheduler=scheduler)
        path = tmp_path / "a" / name
        assert_same(whole, train(lightning, theirs, tmp_path / "b", path, norm=False, scheduler=scheduler))
