"""Hyperparameters: collected from every form of __init__, and a module built again from them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import omegaconf
import pytest
import torch
from torch import nn

import holdfast as pl
from holdfast.training.hparams import HyperparametersMixin
from holdfast.utilities.parsing import AttributeDict
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
    with pytest.warns(UserWarning, match="could not hold 'make', so it is __init__'s default"):
        loaded = Odd.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    assert loaded.hparams.lr == 0.1


def in_file(model: Any, path: Path) -> dict[str, Any]:
    """What a checkpoint of the model says of its hyperparameters, as torch reads it."""
    run = trainer()
    run.fit(model, rows())
    run.save_checkpoint(path)
    return {key: value for key, value in torch.load(path, weights_only=True).items() if "param" in key}


class Whole(Toy):
    def __init__(self, hparams: Any) -> None:
        pl.LightningModule.__init__(self)
        self.given = hparams
        self.keep(hparams)
        self.layer = nn.Linear(3, self.hparams.width)
        self.seen = []

    def keep(self, hparams: Any) -> None:
        self.save_hyperparameters(hparams)


# -- one object ----------------------------------------------------------------------------------------------


def test_the_spelling_of_1_0_warns_once_and_does_the_same(tmp_path: Path) -> None:
    class Old(Toy):
        def __init__(self, hparams: argparse.Namespace) -> None:
            pl.LightningModule.__init__(self)
            self.hparams = hparams
            self.layer = nn.Linear(3, self.hparams.width)
            self.seen = []

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = Old(argparse.Namespace(lr=0.1, width=2))
    assert [(warning.category, str(warning.message)) for warning in said] == [
        (
            DeprecationWarning,
            "self.hparams = hparams is an old spelling: use self.save_hyperparameters(hparams), in __init__.",
        )
    ]
    assert said[0].filename == __file__
    assert in_file(model, tmp_path / "a.ckpt") == {
        "hparams_name": "hparams",
        "hparams_type": "argparse.Namespace",
        "hyper_parameters": {"lr": 0.1, "width": 2},
    }
    with pytest.warns(DeprecationWarning, match="old spelling"):
        loaded = Old.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.layer.weight, model.layer.weight)


@dataclasses.dataclass
class Rate:
    base: float = 0.1
    warm: int = 3


@dataclasses.dataclass
class Config:
    width: int
    lr: float = 0.1
    rate: Rate = dataclasses.field(default_factory=Rate)
    names: list[str] = dataclasses.field(default_factory=list)


def test_a_dataclass_comes_back_where_init_says_what_it_takes(tmp_path: Path) -> None:
    class Typed(Whole):
        def __init__(self, hparams: Config) -> None:
            super().__init__(hparams)

    class Untyped(Whole):
        def __init__(self, hparams: Any) -> None:
            super().__init__(hparams)

    conf = Config(2, rate=Rate(warm=5), names=["a"])
    saved = in_file(Typed(conf), tmp_path / "a.ckpt")
    plain = {"width": 2, "lr": 0.1, "rate": {"base": 0.1, "warm": 5}, "names": ["a"]}
    assert (saved["hyper_parameters"], saved["hparams_name"]) == (plain, "hparams")
    assert Typed.load_from_checkpoint(tmp_path / "a.ckpt").given == conf
    assert Untyped.load_from_checkpoint(tmp_path / "a.ckpt").given == plain
    assert Untyped.load_from_checkpoint(tmp_path / "a.ckpt").given.width == 2


def test_an_omegaconf_container_stays_one(tmp_path: Path) -> None:
    conf = omegaconf.OmegaConf.create({"width": 2, "lr": 0.1, "more": {"lr": "${lr}"}, "open": "???"})
    omegaconf.OmegaConf.set_struct(conf, True)
    model = Whole(conf)
    assert model.hparams is conf
    model.hparams.lr = 0.2
    assert (model.hparams.more.lr, model.hparams_initial.lr) == (0.2, 0.1)
    saved = in_file(model, tmp_path / "a.ckpt")
    assert saved["hyper_parameters"] == {"width": 2, "lr": 0.2, "more": {"lr": "${lr}"}, "open": "???"}
    assert saved["hparams_type"] == "omegaconf.dictconfig.DictConfig"
    loaded = Whole.load_from_checkpoint(tmp_path / "a.ckpt", lr=0.5, new=1)
    assert isinstance(loaded.given, omegaconf.DictConfig)
    assert (loaded.given.more.lr, loaded.given.new) == (0.5, 1)


def test_an_omegaconf_container_less_and_with_other_names() -> None:
    class Both(pl.LightningModule):
        def __init__(self, conf: Any, net: Any = None, extra: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters(conf, ignore="secret")
            self.save_hyperparameters("extra")

    conf = omegaconf.OmegaConf.create({"a": 1, "same": "${a}", "secret": "x"})
    made = Both(conf)
    assert dict(made.hparams) == {"a": 1, "same": 1, "extra": 4}
    assert made.hparams_initial == {"a": 1, "same": "${a}", "extra": 4}
    assert "secret" in conf and "extra" not in conf


def test_an_object_and_names_build_the_model_again(tmp_path: Path) -> None:
    class Both(Toy):
        def __init__(self, conf: Any, width: int) -> None:
            pl.LightningModule.__init__(self)
            self.save_hyperparameters("width")
            self.save_hyperparameters(conf)
            self.layer = nn.Linear(3, width)
            self.seen = []

    in_file(Both({"lr": 0.1}, 2), tmp_path / "a.ckpt")
    loaded = Both.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.hparams, loaded.layer.out_features) == ({"width": 2, "lr": 0.1}, 2)


def test_what_is_no_such_object_is_refused() -> None:
    for wrong in (3, [1]):
        with pytest.raises(pl.ConfigError) as refused:
            Whole(wrong)
        assert str(refused.value) == (
            "save_hyperparameters(x): expected names of arguments, or one Namespace, dict, dataclass or OmegaConf "
            f"container, found {type(wrong).__name__}."
        )


# -- networks and other things that a file cannot hold -------------------------------------------------------


def test_a_network_as_an_argument_is_said_once_and_given_again(tmp_path: Path) -> None:
    class Backbone(Toy):
        def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
            pl.LightningModule.__init__(self)
            self.save_hyperparameters()
            self.layer = net
            self.seen = []

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = Backbone(nn.Linear(3, 1))
        Backbone(nn.Linear(3, 1))
        saved = in_file(model, tmp_path / "a.ckpt")
    assert [str(warning.message) for warning in said] == [
        "Backbone.save_hyperparameters(): 'net' is an nn.Module. A checkpoint holds its weights, not how to build it: "
        "give it to Backbone.load_from_checkpoint(path, net=...). To hear no more of it: "
        "save_hyperparameters(ignore=['net'])."
    ]
    assert saved["hyper_parameters"] == {"lr": 0.1}
    assert model.hparams.net is model.layer and model.hparams_initial.net is model.layer
    loaded = Backbone.load_from_checkpoint(tmp_path / "a.ckpt", net=nn.Linear(3, 1))
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    with pytest.raises(
        pl.CheckpointIncompatible, match=r"^Backbone.load_from_checkpoint: __init__ needs 'net'"
    ):
        Backbone.load_from_checkpoint(tmp_path / "a.ckpt")


def test_what_cannot_be_copied_is_an_argument_nevertheless(tmp_path: Path) -> None:
    class Opened(pl.LightningModule):
        def __init__(self, file: Any, names: list[str]) -> None:
            super().__init__()
            self.save_hyperparameters()

    with open(tmp_path / "a", "wb") as file:
        made = Opened(file, ["a"])
        made.hparams.names.append("b")
        assert made.hparams_initial == {"file": file, "names": ["a"]}


def test_changes_are_in_the_next_checkpoint(tmp_path: Path) -> None:
    model = Toy()
    model.hparams.found = [1]
    model.hparams["lr"] = 0.5
    assert in_file(model, tmp_path / "a.ckpt")["hyper_parameters"] == {"lr": 0.5, "width": 1, "found": [1]}
    model.hparams.found.append(2)
    del model.hparams.lr
    assert in_file_again(model, tmp_path / "b.ckpt") == {"width": 1, "found": [1, 2]}
    model.hparams_initial["lr"] = 7
    assert model.hparams_initial == {"lr": 0.1, "width": 1}


def in_file_again(model: Any, path: Path) -> Any:
    model.trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)["hyper_parameters"]


# -- who may call it, and from where -------------------------------------------------------------------------


def test_in_a_class_of_ones_own() -> None:
    class Plain(HyperparametersMixin):
        def __init__(self, m: int = 3, **more: Any) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    made = Plain(z=4)
    assert (made.hparams, made._log_hyperparams) == ({"m": 3, "z": 4}, False)


def test_before_the_modules_own_init() -> None:
    class Early(pl.LightningModule):
        def __init__(self, a: int) -> None:
            self.save_hyperparameters()
            super().__init__()

    assert (Early(1).hparams, Early(1)._log_hyperparams) == ({"a": 1}, True)


def test_outside_of_init_there_is_nothing_to_keep() -> None:
    made = Plain(1)
    with pytest.warns(
        UserWarning,
        match=r"^Plain.save_hyperparameters\(\) was called when no __init__ of it was running, so there are no "
        r"arguments to keep. Call it in __init__.$",
    ):
        made.save_hyperparameters()
    made.save_hyperparameters({"more": 2})
    assert (made.hparams.a, made.hparams.more) == (1, 2)


def test_a_child_of_a_dataclass_with_an_init_of_its_own() -> None:
    @dataclasses.dataclass
    class Data(pl.LightningDataModule):
        size: int = 4
        seed: dataclasses.InitVar[int] = 5

        def __post_init__(self, seed: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Child(Data):
        def __init__(self, size: int, extra: str) -> None:
            super().__init__(size * 2)

    assert Data(8).hparams == {"size": 8, "seed": 5}
    assert Child(3, "x").hparams == {"size": 3, "seed": 5, "extra": "x"}


def test_module_and_datamodule_are_logged_together(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def __init__(self, size: int = 4, quiet: bool = False) -> None:
            super().__init__()
            self.save_hyperparameters(logger=not quiet)

        def train_dataloader(self) -> Any:
            return rows(batch_size=self.hparams.size)

    for quiet, expected in (
        (False, {"lr": 0.1, "quiet": False, "size": 4, "width": 1}),
        (True, {"lr": 0.1, "width": 1}),
    ):
        logger = pl.loggers.CSVLogger(tmp_path)
        trainer(logger=logger).fit(Toy(), datamodule=Data(quiet=quiet))
        assert dict(logger.experiment.hparams) == expected


def test_one_object_from_a_file_in_memory() -> None:
    file = io.BytesIO()
    torch.save({"state_dict": Toy().state_dict(), "hyper_parameters": {"lr": 0.3, "width": 1}}, file)
    file.seek(0)
    assert Whole.load_from_checkpoint(file).given == {"lr": 0.3, "width": 1}


@dataclasses.dataclass
class Size:
    width: int = 1


class Kind(Enum):
    RELU = "relu"


class Sized(Toy):
    def __init__(self, size: Size, kind: Kind = Kind.RELU, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kind, self.layer = kind, nn.Linear(3, size.width)


def test_a_dataclass_and_an_enum_beside_other_arguments_come_back(tmp_path: Path) -> None:
    run = trainer()
    run.fit(Sized(Size(2)), rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    model = Sized.load_from_checkpoint(tmp_path / "a.ckpt")
    assert model.layer.out_features == 2
    assert model.kind is Kind.RELU


class Activated(Toy):
    def __init__(self, activation: Any = nn.ReLU, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.activation = activation()


def test_a_hyperparameter_that_was_not_stored_is_said_when_its_default_takes_its_place(
    tmp_path: Path,
) -> None:
    run = trainer()
    run.fit(Activated(nn.GELU), rows())
    with pytest.warns(UserWarning, match="hyper_parameters/activation is not in the checkpoint"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="activation") as said:
        Activated.load_from_checkpoint(tmp_path / "a.ckpt")
    assert [str(one.message) for one in said] == [
        "Activated.load_from_checkpoint: the checkpoint could not hold 'activation', so it is __init__'s "
        "default. Give activation=... for another."
    ]
    assert isinstance(
        Activated.load_from_checkpoint(tmp_path / "a.ckpt", activation=nn.GELU).activation, nn.GELU
    )
