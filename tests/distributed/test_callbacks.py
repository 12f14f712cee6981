"""Callbacks, hooks and datamodules in several processes: what one rank does, what all do, and alike."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import holdfast as pl
from holdfast.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)

from .ranks import run_ranks


class Net(pl.LightningModule):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh())
        self.norm: Any = torch.nn.BatchNorm1d(4) if norm else torch.nn.Identity()
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.norm(self.backbone(batch[0]))).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)


def loader(rows: int = 12) -> DataLoader[Any]:
    data = torch.arange(2.0 * rows).reshape(rows, 2).sin()
    return DataLoader(TensorDataset(data), batch_size=2)


def make_trainer(**arguments: Any) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu", "strategy": "ddp", "logger": False, "enable_checkpointing": False,
        "max_epochs": 3, "enable_progress_bar": False, "enable_model_summary": False, **arguments,
    }  # fmt: skip
    return pl.Trainer(**arguments)


def weights(model: pl.LightningModule) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


class RatesAndWindows(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(trainer.global_step)


KINDS = ("finetuning", "ema", "swa", "accumulation")


def train_with_each() -> Any:
    return {kind: train_with(kind) for kind in KINDS}


def train_with(kind: str) -> Any:
    callbacks: dict[str, Any] = {
        "finetuning": BackboneFinetuning(unfreeze_backbone_at_epoch=1),
        "ema": EMAWeightAveraging(decay=0.5),
        "swa": StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1),
        "accumulation": GradientAccumulationScheduler({0: 1, 1: 2, 2: 3}),
    }
    pl.seed_everything(1, verbose=False)
    model, steps = Net(norm=kind == "swa"), RatesAndWindows()
    before = model.state_dict()["backbone.0.weight"].tolist()
    trainer = make_trainer(callbacks=[callbacks[kind], steps])
    trainer.fit(model, loader())
    return weights(model), before, steps.steps


@pytest.fixture(scope="module")
def trained() -> Any:
    return run_ranks(train_with_each)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_end_with_the_same_weights(trained: Any, kind: str) -> None:
    first, second = (one[kind] for one in trained)
    assert first == second
    found, before, steps = first
    assert found["backbone.0.weight"] != before
    assert steps == ([3, 5, 6] if kind == "accumulation" else [3, 6, 9])


def average_of_all() -> Any:
    """The statistics of the averaged weights, and what one batch after the other of all the data gives."""
    torch.manual_seed(1)
    model = Net(norm=True)
    trainer = make_trainer(
        max_epochs=2, callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)]
    )
    trainer.fit(model, loader(8))
    rows = loader(8).dataset[:][0]
    with torch.no_grad():
        parts = [model.backbone(part) for part in rows.split(2)]
    mean = torch.stack([part.mean(0) for part in parts]).mean(0)
    var = torch.stack([part.var(0) for part in parts]).mean(0)
    return model.norm.running_mean.tolist(), mean.tolist(), model.norm.running_var.tolist(), var.tolist()


def test_statistics_of_averaged_weights_are_of_all_the_data() -> None:
    for mean, expected_mean, var, expected_var in run_ranks(average_of_all):
        assert mean == pytest.approx(expected_mean, abs=1e-6)
        assert var == pytest.approx(expected_var, abs=1e-6)


class Data(pl.LightningDataModule):
    def __init__(self, place: str, per_node: bool) -> None:
        super().__init__()
        self.place, self.prepare_data_per_node = place, per_node
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")
        Path(self.place, "downloaded").touch()

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage} {Path(self.place, 'downloaded').exists()}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self) -> Any:
        return loader()

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append(f"load {state_dict}")


class OwnCallbacks(Net):
    def __init__(self) -> None:
        super().__init__()
        self.own = RatesAndWindows()
        self.prepared = 0

    def prepare_data(self) -> None:
        self.prepared += 1

    def configure_callbacks(self) -> Any:
        return [self.own]


def use_data(place: str, per_node: bool, second_machine: bool) -> Any:
    if second_machine and os.environ["RANK"] == "1":
        os.environ.update(LOCAL_RANK="0", GROUP_RANK="1")
    data, model = Data(place, per_node), OwnCallbacks()
    arguments: dict[str, Any] = {"devices": 1, "num_nodes": 2} if second_machine else {}
    trainer = make_trainer(max_epochs=1, **arguments)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(f"{place}/saved.ckpt")
    again = Data(place, per_node)
    make_trainer(max_epochs=2, **arguments).fit(Net(), datamodule=again, ckpt_path=f"{place}/saved.ckpt")
    return data.calls, model.prepared, len(model.own.steps), [one for one in again.calls if "load" in one]


@pytest.mark.parametrize(
    "per_node, machines, prepared", [(True, 1, [1, 0]), (True, 2, [1, 1]), (False, 2, [1, 0])]
)
def test_data_is_prepared_by_one_rank_or_by_one_of_each_machine_and_set_up_by_all(
    tmp_path: Path, per_node: bool, machines: int, prepared: list[int]
) -> None:
    ranks = run_ranks(use_data, str(tmp_path), per_node, machines == 2)
    for (calls, of_module, epochs, loaded), count in zip(ranks, prepared, strict=True):
        assert calls == ["prepare_data"] * count + ["setup fit True", "teardown fit"]
        # The module's own attribute is not set: one of each machine.
        assert of_module == [1, 1 if machines == 2 else 0][calls is not ranks[0][0]]
        assert epochs == 1
        assert len(loaded) == 1 and loaded == ranks[0][3]


class Drawing(Dataset[Any]):
    """What the generators of a worker give for a row."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


class Keeps(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rows += batch.tolist()
        return self.head(self.backbone(batch[:, :2])).mean()


def draw(num_workers: int) -> Any:
    pl.seed_everything(3, workers=True, verbose=False)
    own = torch.rand(()).item(), random.random()
    model, trainer = Keeps(), make_trainer(max_epochs=1)
    trainer.fit(model, DataLoader(Drawing(), batch_size=2, num_workers=num_workers))
    return own, model.rows


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_start_alike_and_their_data_draws_differently(num_workers: int) -> None:
    first, second = run_ranks(draw, num_workers)
    assert first[0] == second[0]
    rows = [tuple(row) for row in first[1] + second[1]]
    assert len(rows) == 8
    for column in zip(*rows, strict=True):
        assert len(set(column)) == 8
