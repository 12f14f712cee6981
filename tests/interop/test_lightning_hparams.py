"""Hyperparameters: one class body each, on top of both packages, must collect the same."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import omegaconf
import pytest
import torch

import holdfast
from holdfast.utilities.parsing import AttributeDict, is_picklable

from .regression import FEATURES, loader, make_trainer

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

CASES: dict[str, Callable[[Any], Any]] = {}


def case(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CASES[make.__name__] = make
    return make


@case
def every_kind_of_argument(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: int, /, b: int, *rest: int, c: int, d: int = 4, **more: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    return M(1, 2, 3, c=5, e=6)


@case
def another_name_for_self(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(this, a: int, b: int = 2) -> None:
            super().__init__()
            this.save_hyperparameters()

    return M(1)


def calls_from(pl: Any, *args: Any, **options: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()
            self.keep(7)

        def keep(self, other: int) -> None:
            self.save_hyperparameters(*args, **options)

    return M(1)


@case
def from_another_method(pl: Any) -> Any:
    return calls_from(pl)


@case
def named_from_another_method(pl: Any) -> Any:
    return calls_from(pl, "a")


@case
def ignored_by_text(pl: Any) -> Any:
    return calls_from(pl, ignore="b")


@case
def ignored_by_a_tuple_with_a_stranger(pl: Any) -> Any:
    return calls_from(pl, ignore=("a", "stranger"))


@case
def a_frame_that_is_given(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()
            keep(self, inspect.currentframe())

    def keep(module: Any, frame: Any) -> None:
        module.save_hyperparameters(frame=frame)

    return M(1)


@case
def called_twice(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters("a")
            self.save_hyperparameters("b")

    return M(1)


@case
def names_after_an_object(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: int) -> None:
            super().__init__()
            self.save_hyperparameters({"q": 1})
            self.save_hyperparameters("a")

    return M(1)


class Parent:
    @staticmethod
    def of(pl: Any) -> Any:
        class P(pl.LightningModule):
            def __init__(self, a: int = 1, p: int = 9) -> None:
                super().__init__()
                self.save_hyperparameters()

        return P


@case
def a_child_that_ignores(pl: Any) -> Any:
    class C(Parent.of(pl)):
        def __init__(self, a: int = 5, c: int = 2, **more: Any) -> None:
            super().__init__(a=a + 1)
            self.save_hyperparameters(ignore="c")

    return C(z=1)


@case
def a_grandchild_that_says_nothing(pl: Any) -> Any:
    class C(Parent.of(pl)):
        def __init__(self, a: int = 5, c: int = 2) -> None:
            super().__init__(a=a + 1)

    class G(C):
        def __init__(self, g: int, **more: Any) -> None:
            super().__init__(**more)

    return G(3, c=4)


@case
def an_argument_that_was_assigned_to(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: int = 1, b: int = 2) -> None:
            super().__init__()
            a = 77  # noqa: F841
            self.save_hyperparameters()
            b = 99  # noqa: F841

    return M()


@case
def a_list_that_changes_later(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, a: list[int]) -> None:
            super().__init__()
            self.save_hyperparameters()
            a.append(1)

    return M([])


@case
def a_mixin_that_is_no_module(pl: Any) -> Any:
    class Mixin:
        def __init__(self, *args: Any, m: int = 3, **more: Any) -> None:
            super().__init__(*args, **more)

    class M(Mixin, pl.LightningModule):
        def __init__(self, a: int, **more: Any) -> None:
            super().__init__(**more)
            self.save_hyperparameters()

    return M(1, m=4)


@case
def decorated(pl: Any) -> Any:
    def decorator(init: Any) -> Any:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **more: Any) -> Any:
            local = 1  # noqa: F841
            return init(self, *args, **more)

        return wrapper

    class P(pl.LightningModule):
        @decorator
        def __init__(self, a: int, b: int = 2, **more: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    class C(P):
        @decorator
        def __init__(self, q: int = 1, **more: Any) -> None:
            super().__init__(a=5, **more)
            self.save_hyperparameters()

    return C(c=3)


@case
def a_dataclass_of_a_datamodule(pl: Any) -> Any:
    @dataclasses.dataclass
    class D(pl.LightningDataModule):
        size: int = 4
        names: list[str] = dataclasses.field(default_factory=list)
        hidden: int = dataclasses.field(default=3, init=False)

        def __post_init__(self) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="ignored")

    return D(8)


@case
def no_arguments_at_all(pl: Any) -> Any:
    return pl.LightningModule()


@case
def names_removed_again(pl: Any) -> Any:
    made = calls_from(pl)
    made.remove_ignored_hparams(["a", "stranger"])
    return made


@case
def changed_by_hand(pl: Any) -> Any:
    made = calls_from(pl)
    made.hparams.a = 8
    made.hparams["new"] = 3
    return made


def whole(pl: Any, conf: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, conf: Any, other: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    return M(conf)


@case
def one_namespace(pl: Any) -> Any:
    return whole(pl, argparse.Namespace(lr=1, more={"a": 1}))


@case
def one_dict(pl: Any) -> Any:
    return whole(pl, {"lr": 1})


@case
def one_omegaconf_container(pl: Any) -> Any:
    return whole(pl, omegaconf.OmegaConf.create({"lr": 1, "more": {"same": "${lr}"}}))


@case
def none_at_all(pl: Any) -> Any:
    return whole(pl, None)


@case
def a_namespace_among_others(pl: Any) -> Any:
    class M(pl.LightningModule):
        def __init__(self, hparams: Any, other: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    return M(argparse.Namespace(lr=1))


@pytest.mark.parametrize("name", CASES)
def test_both_collect_the_same(name: str) -> None:
    mine, theirs = CASES[name](holdfast), CASES[name](lightning)
    assert dict(mine.hparams) == dict(theirs.hparams)
    assert dict(mine.hparams_initial) == dict(theirs.hparams_initial)
    assert isinstance(mine.hparams, omegaconf.DictConfig) == isinstance(theirs.hparams, omegaconf.DictConfig)
    if hasattr(theirs, "_hparams_name"):
        assert mine._hparams_name == theirs._hparams_name
        assert mine._log_hyperparams == theirs._log_hyperparams


def test_lightning_gives_our_namespace_back_with_attributes(tmp_path: Path) -> None:
    """It does not do so for its own: there it is a dict."""

    def module(pl: Any) -> Any:
        class Whole(pl.LightningModule):
            def __init__(self, conf: Any) -> None:
                super().__init__()
                self.save_hyperparameters(conf)
                self.layer = torch.nn.Linear(FEATURES, conf.width)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.layer(batch[0]).square().mean()

            def train_dataloader(self) -> Any:
                return loader(8)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Whole

    trainer = make_trainer(holdfast, tmp_path, max_epochs=1)
    trainer.fit(module(holdfast)(argparse.Namespace(width=6)))
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    assert torch.load(tmp_path / "ours.ckpt", weights_only=True)["hparams_type"] == "argparse.Namespace"
    assert module(lightning).load_from_checkpoint(tmp_path / "ours.ckpt").hparams.width == 6
    trainer = make_trainer(lightning, tmp_path, max_epochs=1)
    trainer.fit(module(lightning)(argparse.Namespace(width=6)))
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'width'"):
        module(lightning).load_from_checkpoint(tmp_path / "theirs.ckpt")
    assert module(holdfast).load_from_checkpoint(tmp_path / "theirs.ckpt").hparams.width == 6


def test_the_text_of_an_attribute_dict() -> None:
    values = {"lr": 0.1, "long_name": "x", "a": None}
    mine = AttributeDict(values)
    assert repr(mine) == str(mine) == repr(lightning.utilities.parsing.AttributeDict(values))


def test_what_can_be_pickled() -> None:
    for value in (1, lambda: 1, torch.nn.Linear(1, 1), Path("a"), (i for i in ()), open):
        assert is_picklable(value) == lightning.utilities.parsing.is_picklable(value)


@dataclasses.dataclass
class Size:
    width: int = 1


class Kind(enum.Enum):
    RELU = "relu"


def sized(pl: Any) -> Any:
    class Sized(pl.LightningModule):
        def __init__(self, size: Size, kind: Kind | None = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.kind, self.layer = kind, torch.nn.Linear(FEATURES, size.width)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Sized


@pytest.mark.parametrize("writer", [lightning, holdfast], ids=["theirs", "ours"])
def test_types_of_ones_own_come_back(writer: Any, tmp_path: Path) -> None:
    run = make_trainer(writer, tmp_path, max_epochs=1)
    run.fit(sized(writer)(Size(2), Kind.RELU), loader(8))
    run.save_checkpoint(tmp_path / "a.ckpt")
    model = sized(holdfast).load_from_checkpoint(tmp_path / "a.ckpt")
    assert (model.layer.out_features, model.kind) == (2, Kind.RELU)
