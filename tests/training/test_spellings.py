"""The spelling of 1.x works, warns once at the user's line and names today's; what is left out says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary
from holdfast.errors import ArgumentError, ConfigError

from .toys import Toy, checkpoints, rows

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


def said(**arguments: Any) -> tuple[pl.Trainer, list[str]]:
    """A trainer, and the deprecations that making it said, each of which points at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(**{**QUIET, **arguments})
    found = [one for one in caught if one.category is DeprecationWarning]
    assert [one.filename for one in found] == [__file__] * len(found)
    return trainer, [str(one.message) for one in found]


class TestEachOldSpellingIsSaidOnce:
    @pytest.mark.parametrize(
        "old, message, today",
        [
            (
                {"checkpoint_callback": False},
                "Trainer(checkpoint_callback=False) is the spelling of 1.x: use enable_checkpointing=False.",
                lambda trainer: trainer.checkpoint_callbacks == [],
            ),
            (
                {"resume_from_checkpoint": "some/path.ckpt"},
                "Trainer(resume_from_checkpoint='some/path.ckpt') is the spelling of 1.x: use "
                "trainer.fit(..., ckpt_path='some/path.ckpt').",
                lambda trainer: trainer.resume_from_checkpoint == "some/path.ckpt",
            ),
            (
                {"accelerator": "ddp"},
                "Trainer(accelerator='ddp') is the spelling of 1.x: use strategy='ddp'.",
                lambda trainer: trainer.world_size == 1,
            ),
            (
                {"accelerator": "ddp_spawn", "num_processes": 1},
                "Trainer(accelerator='ddp_spawn') is the spelling of 1.x: use strategy='ddp_spawn'.",
                lambda trainer: trainer.strategy.root_device.type == "cpu",
            ),
            (
                {"accelerator": "ddp_cpu"},
                "Trainer(accelerator='ddp_cpu') is the spelling of 1.x: use accelerator='cpu', "
                "strategy='ddp'.",
                lambda trainer: trainer.strategy.root_device.type == "cpu",
            ),
            (
                {"gpus": 0},
                "Trainer(gpus=0) is the spelling of 1.x: use accelerator='cpu'.",
                lambda trainer: trainer.strategy.root_device.type == "cpu",
            ),
            (
                {"num_processes": 1},
                "Trainer(num_processes=1) is the spelling of 1.x: use accelerator='cpu', devices=1.",
                lambda trainer: trainer.strategy.root_device.type == "cpu",
            ),
            (
                {"weights_save_path": "elsewhere"},
                "Trainer(weights_save_path='elsewhere') is the spelling of 1.x: use "
                "default_root_dir='elsewhere' or ModelCheckpoint(dirpath=...).",
                lambda trainer: trainer.weights_save_path == "elsewhere",
            ),
            (
                {"precision": 16, "accelerator": "cpu"},
                "Trainer(precision=16) is the spelling of 1.x: use precision='16-mixed'.",
                lambda trainer: trainer.precision == "16-mixed",
            ),
            (
                {"weights_summary": "full", "enable_model_summary": None},
                "Trainer(weights_summary='full') is the spelling of 1.x: use "
                "callbacks=[ModelSummary(max_depth=-1)].",
                lambda trainer: any(isinstance(one, ModelSummary) for one in trainer.callbacks),
            ),
            (
                {"reload_dataloaders_every_epoch": True},
                "Trainer(reload_dataloaders_every_epoch=True) is the spelling of 1.x: use "
                "reload_dataloaders_every_n_epochs=1.",
                lambda trainer: trainer.reload_dataloaders_every_n_epochs == 1,
            ),
            (
                {"train_percent_check": 0.5},
                "Trainer(train_percent_check=0.5) is the spelling of 1.x: use limit_train_batches=0.5.",
                lambda trainer: trainer.limit_train_batches == 0.5,
            ),
            (
                {"terminate_on_nan": True},
                "Trainer(terminate_on_nan=True) is the spelling of 1.x: use detect_anomaly=True.",
                lambda trainer: trainer.detect_anomaly,
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_and_means_todays(self, old: dict[str, Any], message: str, today: Any) -> None:
        trainer, messages = said(**old)
        assert messages[-1 if len(old) == 1 else 0] == message or message in messages
        assert len(messages) == sum(name != "enable_model_summary" for name in old) - (
            old.get("accelerator") == "cpu"
        )
        assert today(trainer)

    def test_a_callback_that_saves_is_one_of_the_callbacks(self) -> None:
        saving, stopping = ModelCheckpoint(), EarlyStopping("loss")
        trainer, messages = said(checkpoint_callback=saving, callbacks=stopping)
        assert messages == ["Trainer(checkpoint_callback=...) is the spelling of 1.x: use callbacks=[...]."]
        assert trainer.callbacks == [stopping, saving]

    def test_todays_spelling_says_nothing(self) -> None:
        assert said(accelerator="cpu", devices=1, strategy="auto", enable_checkpointing=False)[1] == []

    def test_a_subclass_takes_them_too(self) -> None:
        class Mine(pl.Trainer):
            def __init__(self, **arguments: Any) -> None:
                super().__init__(**{**QUIET, **arguments})

        with pytest.warns(DeprecationWarning, match="enable_checkpointing=False") as caught:
            trainer = Mine(checkpoint_callback=False)
        assert [one.filename for one in caught] == [__file__]
        assert trainer.checkpoint_callbacks == []


class TestResumeFromCheckpoint:
    def test_goes_on_from_it(self, tmp_path: Path) -> None:
        first = pl.Trainer(**QUIET, enable_checkpointing=False)
        torch.manual_seed(0)
        first.fit(Toy(), rows())
        first.save_checkpoint(tmp_path / "my_checkpoint.ckpt")
        with pytest.warns(DeprecationWarning, match="ckpt_path="):
            second = pl.Trainer(
                **{**QUIET, "max_epochs": 2},
                resume_from_checkpoint=str(tmp_path / "my_checkpoint.ckpt"),
                enable_checkpointing=False,
            )
        model = Toy()
        second.fit(model, rows())
        assert (second.current_epoch, second.global_step) == (2, 6)
        assert len(model.seen) == 12

    def test_what_fit_is_told_wins(self, tmp_path: Path) -> None:
        with pytest.warns(DeprecationWarning, match="ckpt_path="):
            trainer = pl.Trainer(**QUIET, resume_from_checkpoint="gone.ckpt", enable_checkpointing=False)
        trainer.fit(Toy(), rows(), ckpt_path="auto")
        assert trainer.global_step == 3


def test_weights_save_path_is_where_checkpoints_go(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="ModelCheckpoint"):
        trainer = pl.Trainer(
            **{**QUIET, "logger": True}, default_root_dir="logs", weights_save_path="weights"
        )
    trainer.fit(Toy(), rows())
    assert checkpoints(tmp_path / "weights") == ["epoch=0-step=3.ckpt"]
    assert checkpoints(tmp_path / "logs") == []
    assert (tmp_path / "logs/lightning_logs/version_0/hparams.yaml").exists()


class TestRefused:
    def test_both_spellings_with_different_values(self) -> None:
        with pytest.raises(ConfigError) as caught:
            pl.Trainer(num_processes=1, devices=2, accelerator="cpu")
        assert str(caught.value) == (
            "Trainer(num_processes=...) is the old spelling of devices=, which is given as well, with "
            "another value: 2. Leave num_processes= out."
        )

    @pytest.mark.parametrize(
        "name, message",
        [
            ("tpu_cores", "Trainer(tpu_cores=...) is not there. Use accelerator='cpu' or 'gpu'."),
            (
                "auto_lr_find",
                "Trainer(auto_lr_find=...) is not there. There is no tuner: try learning rates by runs with "
                "max_steps=.",
            ),
            (
                "track_grad_norm",
                "Trainer(track_grad_norm=...) is not there. Log holdfast.utilities.grad_norm(self, 2) in "
                "on_before_optimizer_step.",
            ),
            (
                "max_epoch",
                "Trainer() got an unexpected keyword argument 'max_epoch'. Did you mean 'max_epochs'?",
            ),
        ],
    )
    def test_what_is_left_out_names_what_to_use(self, name: str, message: str) -> None:
        with pytest.raises(ArgumentError) as caught:
            pl.Trainer(**{name: 1})
        assert str(caught.value) == message
        assert isinstance(caught.value, TypeError)

    def test_an_unknown_argument_lists_those_that_there_are(self) -> None:
        with pytest.raises(TypeError) as caught:
            pl.Trainer(abcdefg=1)
        text = str(caught.value)
        assert text.startswith(
            "Trainer() got an unexpected keyword argument 'abcdefg'. It takes accelerator, accumulate_grad"
        )
        assert text.endswith("use_distributed_sampler, val_check_interval.")

    def test_apex(self) -> None:
        with pytest.raises(ConfigError) as caught:
            pl.Trainer(amp_backend="apex")
        assert str(caught.value) == (
            "Trainer(amp_backend='apex') is not there: torch's own is. Use precision='16-mixed'."
        )
