"""Hyperparameters: collected from every form of __init__, and a module built again from them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast as pl
from holdfast.training.hparams import AttributeDict
from tests.training.toys import Toy, rows, trainer


class Plain(pl.LightningModule):
    def __init__(self, a: int, b: str = "x", *rest: Any, c: float = 0.5, **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class Child(Plain):
    def __init__(self, d: int, a: int = 7) -> None:
        super().__init__(a + 1, "parent")
        self.d = d


def test_all_arguments_with_kwargs_flattened_and_args_dropped() -> None:
    assert Plain(1, "y", 2, 3, c=4.0, e=5).hparams == {"a": 1, "b": "y", "c": 4.0, "e": 5}


def test_the_childs_arguments_win_over_the_parents() -> None:
    assert Child(3).hparams == {"a": 7, "b": "parent", "c": 0.5, "d": 3}


def test_named_and_ignored_arguments() -> None:
    class Named(pl.LightningModule):
        def __init__(self, a: int, b: int, c: int) -> None:
            super().__init__()
            self.save_hyperparameters("a", "c")

    class Ignoring(pl.LightningModule):
        def __init__(self, a: int, net: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="net")

    assert Named(1, 2, 3).hparams == {"a": 1, "c": 3}
    assert Ignoring(1, nn.ReLU()).hparams == {"a": 1}


def test_a_name_that_is_no_argument_is_refused() -> None:
    class Wrong(pl.LightningModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters("learning_rate")

    with pytest.raises(pl.ConfigError) as refused:
        Wrong(0.1)
    assert str(refused.value) == (
        "save_hyperparameters('learning_rate'): 'learning_rate' is not an argument of Wrong.__init__, which takes ['lr']."
    )


def test_one_namespace_is_kept_whole_under_its_arguments_name() -> None:
    class Whole(pl.LightningModule):
        def __init__(self, conf: argparse.Namespace) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    made = Whole(argparse.Namespace(lr=0.1, layers=3))
    assert made.hparams == {"lr": 0.1, "layers": 3}
    assert made._hparams_name == "conf"


def test_a_dataclass_module() -> None:
    @dataclasses.dataclass
    class Data(pl.LightningDataModule):
        batch_size: int = 4
        name_of_set: str = "a"

        def __post_init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert Data(batch_size=8).hparams == {"batch_size": 8, "name_of_set": "a"}


def test_hparams_are_attributes_and_the_initial_ones_do_not_change() -> None:
    made = Plain(1)
    made.hparams.a = 9
    assert (made.hparams["a"], made.hparams_initial["a"]) == (9, 1)
    with pytest.raises(AttributeError, match="Missing attribute 'z'"):
        made.hparams.z
    assert isinstance(made.hparams, AttributeDict)


def test_load_from_checkpoint_with_saved_and_overridden_values(tmp_path: Path) -> None:
    run = trainer()
    model = Toy(lr=0.25, width=2)
    run.fit(model, rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.hparams == {"lr": 0.25, "width": 2}
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    assert Toy.load_from_checkpoint(tmp_path / "a.ckpt", lr=0.5).hparams == {"lr": 0.5, "width": 2}
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == {"lr": 0.25, "width": 2}


def test_load_from_checkpoint_is_refused_on_an_instance(tmp_path: Path) -> None:
    with pytest.raises(TypeError) as refused:
        Toy().load_from_checkpoint(tmp_path / "a.ckpt")
    assert str(refused.value) == (
        "Toy.load_from_checkpoint makes a new object: call it on the class, not on an instance, and keep what it returns."
    )


def test_a_missing_argument_is_named(tmp_path: Path) -> None:
    class Silent(Toy):
        def __init__(self, size: int) -> None:
            pl.LightningModule.__init__(self)
            self.layer = nn.Linear(3, size)
            self.seen = []

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer()
    run.fit(Silent(2), rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(pl.CheckpointIncompatible) as refused:
        Silent.load_from_checkpoint(tmp_path / "a.ckpt")
    assert str(refused.value) == (
        "Silent.load_from_checkpoint: __init__ needs 'size', which the checkpoint's hyperparameters [] do not hold. "
        "Give it as a keyword argument, or call self.save_hyperparameters() in __init__ before training."
    )
    assert Silent.load_from_checkpoint(tmp_path / "a.ckpt", size=2).layer.out_features == 2


def test_a_hyperparameter_that_cannot_be_stored_is_named_and_the_weights_are_saved(tmp_path: Path) -> None:
    class Odd(Toy):
        def __init__(self, make: Any = None, lr: float = 0.1) -> None:
            super().__init__(lr=lr)
            self.save_hyperparameters()

    run = trainer()
    model = Odd(make=lambda: 1)
    run.fit(model, rows())
    with pytest.warns(UserWarning, match=r"hyper_parameters.*make.* is not in the checkpoint"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Odd.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    assert loaded.hparams.lr == 0.1
