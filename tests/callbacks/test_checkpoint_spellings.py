"""The arguments of ModelCheckpoint as 1.x spelled them."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.callbacks import ModelCheckpoint
from holdfast.errors import ArgumentError, ConfigError
from tests.training.toys import Toy, checkpoints, rows, trainer


def said(*positional: Any, **arguments: Any) -> tuple[ModelCheckpoint, list[str]]:
    """The callback, and the warnings that making it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        callback = ModelCheckpoint(*positional, **arguments)
    assert all(one.category is DeprecationWarning for one in caught)
    # It points at the line that has the old spelling.
    assert all((one.filename, one.lineno) == (__file__, line) for one in caught)
    return callback, [str(one.message) for one in caught]


def test_period() -> None:
    callback, messages = said(period=2, monitor="val_loss", save_top_k=3)
    assert callback.every_n_epochs == 2
    assert messages == ["ModelCheckpoint(period=2) is the spelling of 1.x: use every_n_epochs=2."]


@pytest.mark.parametrize(
    ("filepath", "today", "means"),
    [
        ("my/name-{epoch}", "dirpath='my', filename='name-{epoch}'", ("my", "name-{epoch}")),
        ("my/path/", "dirpath='my/path'", ("my/path", None)),
        ("there", "dirpath='there'", ("there", None)),
        ("{epoch}", "dirpath='.', filename='{epoch}'", (".", "{epoch}")),
    ],
)
def test_filepath(filepath: str, today: str, means: tuple[str, str | None]) -> None:
    os.mkdir("there")
    callback, messages = said(filepath=filepath)
    assert (callback.dirpath, callback.filename) == (os.path.realpath(means[0]), means[1])
    assert messages == [f"ModelCheckpoint(filepath={filepath!r}) is the spelling of 1.x: use {today}."]


def test_prefix() -> None:
    callback, messages = said(prefix="cnn", filename="{epoch:02d}")
    assert callback.filename == "cnn-{epoch:02d}"
    assert messages == [
        "ModelCheckpoint(prefix='cnn') is the spelling of 1.x: use filename='cnn-{epoch:02d}'."
    ]
    assert said(prefix="cnn")[0].filename == "cnn-{epoch}-{step}"


def test_defaults_of_1x_change_nothing() -> None:
    callback, messages = said(filepath=None, prefix="")
    assert (callback.dirpath, callback.filename) == (None, None)
    assert messages == [
        "ModelCheckpoint(filepath=None) is the spelling of 1.x: leave it out.",
        "ModelCheckpoint(prefix='') is the spelling of 1.x: leave it out.",
    ]


def test_all_of_them_in_a_run(tmp_path: Path) -> None:
    callback, messages = said(
        filepath=str(tmp_path / "name-{epoch}"), prefix="cnn", period=2, monitor="score", save_top_k=2
    )
    assert len(messages) == 3

    class Scored(Toy):
        def on_train_epoch_end(self) -> None:
            self.log("score", float(self.current_epoch))

    trainer(callbacks=callback, max_epochs=6).fit(Scored(), rows())
    assert checkpoints(tmp_path) == ["cnn-name-epoch=1.ckpt", "cnn-name-epoch=3.ckpt"]


def test_todays_spellings_say_nothing(tmp_path: Path) -> None:
    assert said(tmp_path, "{epoch}", every_n_epochs=2)[1] == []


@pytest.mark.parametrize(
    ("positional", "arguments", "message"),
    [
        (
            (),
            {"period": 2, "every_n_epochs": 3},
            "ModelCheckpoint(period=2) is the old spelling of every_n_epochs=, which is given as well: 3. "
            "Leave period= out.",
        ),
        (
            ("/d",),
            {"filepath": "/e/f"},
            "ModelCheckpoint(filepath='/e/f') is the old spelling of dirpath=, which is given as well: '/d'. "
            "Leave filepath= out.",
        ),
        (
            (),
            {"filepath": "e/f", "filename": "g"},
            "ModelCheckpoint(filepath='e/f') is the old spelling of filename=, which is given as well: 'g'. "
            "Leave filepath= out.",
        ),
    ],
)
def test_old_and_new_together(positional: tuple[Any, ...], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelCheckpoint(*positional, **arguments)
    assert str(refused.value) == message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_period_and_another_interval() -> None:
    with pytest.raises(ConfigError) as refused:
        ModelCheckpoint(period=2, every_n_train_steps=5)
    assert str(refused.value) == (
        "ModelCheckpoint takes one of every_n_train_steps, every_n_epochs and train_time_interval, not "
        "several. Use one ModelCheckpoint for each interval."
    )


def test_an_argument_that_there_is_not() -> None:
    with pytest.raises(ArgumentError) as refused:
        ModelCheckpoint(save_topk=3)  # type: ignore[call-arg]
    assert str(refused.value) == (
        "ModelCheckpoint() got an unexpected keyword argument 'save_topk'. Did you mean 'save_top_k'?"
    )
    with pytest.raises(ArgumentError) as refused:
        ModelCheckpoint(zzz=3)  # type: ignore[call-arg]
    assert str(refused.value).startswith(
        "ModelCheckpoint() got an unexpected keyword argument 'zzz'. It takes dirpath, filename, monitor, "
    )


def test_a_subclass_takes_them_too_and_the_signature_is_todays() -> None:
    class Mine(ModelCheckpoint):
        pass

    with pytest.warns(DeprecationWarning, match="use every_n_epochs=4"):
        assert Mine(period=4).every_n_epochs == 4  # type: ignore[call-arg]
    assert "period" not in inspect.signature(ModelCheckpoint).parameters
    assert "every_n_epochs" in inspect.signature(ModelCheckpoint).parameters


@pytest.mark.parametrize("monitor", [None, "train_loss"])
def test_the_default_of_save_top_k_in_1_0(tmp_path: Path, monitor: str | None) -> None:
    class Logged(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

    torch.manual_seed(1)
    callback = ModelCheckpoint(tmp_path, save_top_k=None, monitor=monitor)
    trainer(max_epochs=2, callbacks=[callback]).fit(Logged(), rows())
    assert callback.save_top_k == 1
    assert checkpoints(tmp_path) == ["epoch=1-step=6.ckpt"]
