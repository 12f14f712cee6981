"""The page "Saving and loading weights": going on from a checkpoint, and the spellings of its time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from holdfast import LightningModule, Trainer
from holdfast.callbacks import ModelCheckpoint

from .models import LitAutoEncoder, TwoOptimizers, quiet

CHECKPOINT = "some/path/to/my_checkpoint.ckpt"


def train(model: LightningModule, **arguments: Any) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trainer = Trainer(**quiet(logger=False, enable_checkpointing=False, **arguments))
    trainer.fit(model)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", 16])
def test_resume_from_checkpoint_restores_everything_and_goes_on(precision: Any) -> None:
    straight, first, second = TwoOptimizers(), TwoOptimizers(), TwoOptimizers()
    first.load_state_dict(straight.state_dict())
    uninterrupted = train(straight, precision=precision)
    train(first, precision=precision, max_epochs=3).save_checkpoint(CHECKPOINT)

    begun: list[Any] = []
    second.on_train_start = lambda: begun.append((second.current_epoch, second.global_step))  # type: ignore[method-assign]
    with pytest.warns(DeprecationWarning, match="resume_from_checkpoint") as warned:
        trainer = Trainer(
            resume_from_checkpoint=CHECKPOINT,
            **quiet(logger=False, enable_checkpointing=False),
            precision="16-mixed" if precision == 16 else precision,
        )
    # automatically restores model, epoch, step, LR schedulers, scaler, etc...
    trainer.fit(second)
    assert [str(one.message) for one in warned] == [
        f"Trainer(resume_from_checkpoint={CHECKPOINT!r}) is the spelling of 1.x: use trainer.fit(..., "
        f"ckpt_path={CHECKPOINT!r})."
    ]
    assert begun == [(3, 6)]
    assert (trainer.current_epoch, trainer.global_step) == (5, 10)
    for key, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    for mine, theirs in zip(trainer.lr_scheduler_configs, uninterrupted.lr_scheduler_configs, strict=True):
        assert mine.scheduler.state_dict() == theirs.scheduler.state_dict()
    assert trainer.precision_plugin.state_dict() == uninterrupted.precision_plugin.state_dict()


def test_todays_form_does_the_same() -> None:
    model = LitAutoEncoder()
    train(LitAutoEncoder(), max_epochs=3).save_checkpoint(CHECKPOINT)
    Trainer(**quiet(logger=False, enable_checkpointing=False)).fit(model, ckpt_path=CHECKPOINT)
    assert model.backbone.weight.item() == pytest.approx(0.52)


@pytest.mark.parametrize(
    ("make", "arguments", "today"),
    [
        (Trainer, {"checkpoint_callback": False}, "enable_checkpointing=False"),
        (Trainer, {"resume_from_checkpoint": CHECKPOINT}, f"ckpt_path={CHECKPOINT!r}"),
        (Trainer, {"gpus": 0}, "accelerator='cpu'"),
        (Trainer, {"num_processes": 1}, "accelerator='cpu', devices=1"),
        (Trainer, {"weights_save_path": "w"}, "default_root_dir='w' or ModelCheckpoint(dirpath=...)"),
        (Trainer, {"precision": 16}, "precision='16-mixed'"),
        (ModelCheckpoint, {"period": 3}, "every_n_epochs=3"),
        (ModelCheckpoint, {"filepath": "a/b-{epoch}"}, "dirpath='a', filename='b-{epoch}'"),
        (ModelCheckpoint, {"prefix": "p"}, "filename='p-{epoch}-{step}'"),
    ],
)
def test_spellings_of_its_time(make: Any, arguments: dict[str, Any], today: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if make is Trainer:
            Trainer(max_epochs=1, logger=False, **arguments)
        else:
            make(**arguments)
    said = [one for one in caught if one.category is DeprecationWarning]
    assert len(said) == len(caught) == 1
    assert today in str(said[0].message)
    assert said[0].filename == __file__
