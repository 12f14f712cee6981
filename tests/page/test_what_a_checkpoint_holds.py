"""The page "Saving and loading weights": what a checkpoint holds, read with torch.load's safe default."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

import pytest
import torch

from holdfast import LightningModule, Trainer
from holdfast.callbacks import Callback, EarlyStopping, ModelCheckpoint

from .models import LitAutoEncoder, MyModel, TwoOptimizers, quiet

CKPT_PATH = "example.ckpt"


def save(model: LightningModule, **arguments: Any) -> Trainer:
    """Train and save by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # precision=16; test_spellings.py has it
        trainer = Trainer(**quiet(logger=False, **arguments))
    trainer.fit(model)
    trainer.save_checkpoint(CKPT_PATH)
    return trainer


def test_the_epoch_the_step_and_the_model() -> None:
    model = LitAutoEncoder()
    trainer = save(model)
    checkpoint = torch.load(CKPT_PATH)
    assert checkpoint["global_step"] == trainer.global_step == 5
    assert checkpoint["epoch"] == trainer.current_epoch == 5  # of epochs done; 4 where one has just ended
    assert torch.equal(checkpoint["state_dict"]["backbone.weight"], model.backbone.weight)


@pytest.mark.parametrize("precision", [16, "16-mixed"])
def test_the_16_bit_scaling_factor(precision: Any) -> None:
    trainer = save(LitAutoEncoder(), precision=precision)
    assert trainer.precision == "16-mixed"
    scaler = torch.load(CKPT_PATH)["MixedPrecision"]
    assert scaler == trainer.precision_plugin.state_dict()
    assert scaler["scale"] >= 1


def test_every_optimizer_and_scheduler() -> None:
    trainer = save(TwoOptimizers())
    checkpoint = torch.load(CKPT_PATH)
    assert len(checkpoint["optimizer_states"]) == len(trainer.optimizers) == 2
    for state, optimizer in zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True):
        assert state["state"][0]["step"] == 5
        moments = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(state["state"][0]["exp_avg"], moments)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    assert [state["last_epoch"] for state in checkpoint["lr_schedulers"]] == [5, 5]
    assert [state["_last_lr"] for state in checkpoint["lr_schedulers"]] == [
        scheduler.get_last_lr() for scheduler in schedulers
    ]


def test_every_callback() -> None:
    class Counting(Callback):
        """Counts batches."""

        count = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

    callbacks = [Counting(), EarlyStopping("val_loss", patience=9), ModelCheckpoint("c", monitor="val_loss")]
    save(LitAutoEncoder(), callbacks=callbacks)
    counting, stopping, saving = (torch.load(CKPT_PATH)["callbacks"][one.state_key] for one in callbacks)
    assert counting == {"count": 5}
    assert stopping["best_score"] == pytest.approx(0.32) and stopping["wait_count"] == 2
    assert saving["best_model_path"] == callbacks[2].best_model_path  # type: ignore[attr-defined]


def test_hyperparameters_given_as_keyword_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    class MyLightningModule(LitAutoEncoder):
        def __init__(self, learning_rate: float, *args: Any, **kwargs: Any) -> None:
            super().__init__(learning_rate)
            self.save_hyperparameters()

    save(MyLightningModule(learning_rate=0.02))
    capsys.readouterr()
    # all init args were saved to the checkpoint
    checkpoint = torch.load(CKPT_PATH)
    print(checkpoint["hyper_parameters"])
    assert capsys.readouterr().out == "{'learning_rate': 0.02}\n"


def test_hyperparameters_given_as_a_namespace_named_hparams() -> None:
    save(MyModel(hparams=Namespace(learning_rate=0.02, width=3)))
    checkpoint = torch.load(CKPT_PATH)
    assert checkpoint["hparams_name"] == "hparams"
    assert checkpoint["hyper_parameters"] == {"learning_rate": 0.02, "width": 3}
