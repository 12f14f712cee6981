"""The page "Saving and loading weights": saving, by itself and by hand, and turning it off.

Each statement of the page is a test that carries its example; the others are in the files beside this one.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from holdfast import Trainer
from holdfast.callbacks import ModelCheckpoint

from .models import LitAutoEncoder, LitModel, MyModel, quiet


def saved(directory: str | Path = ".") -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*.ckpt"))


def test_saves_automatically_into_the_working_directory_with_the_state_of_the_last_epoch() -> None:
    model = LitAutoEncoder()
    trainer = Trainer(**quiet())
    trainer.fit(model)
    assert saved() == ["lightning_logs/version_0/checkpoints/epoch=4-step=5.ckpt"]
    checkpoint = torch.load(saved()[0])
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (4, 5)
    assert torch.equal(checkpoint["state_dict"]["backbone.weight"], model.backbone.weight)


def test_default_root_dir_changes_where() -> None:
    trainer = Trainer(default_root_dir="your/path/to/save/checkpoints", **quiet(logger=False))
    trainer.fit(LitAutoEncoder())
    assert saved() == ["your/path/to/save/checkpoints/checkpoints/epoch=4-step=5.ckpt"]


def test_monitors_any_logged_quantity() -> None:
    checkpoint_callback = ModelCheckpoint(monitor="val_loss")
    trainer = Trainer(callbacks=[checkpoint_callback], **quiet())
    trainer.fit(LitAutoEncoder())
    assert saved() == ["lightning_logs/version_0/checkpoints/epoch=2-step=3.ckpt"]


def test_save_top_k_mode_and_the_file_names() -> None:
    # saves a file like: my/path/sample-mnist-epoch=02-val_loss=0.32.ckpt
    checkpoint_callback = ModelCheckpoint(
        monitor="val_loss",
        dirpath="my/path/",
        filename="sample-mnist-{epoch:02d}-{val_loss:.2f}",
        save_top_k=3,
        mode="min",
    )
    trainer = Trainer(callbacks=[checkpoint_callback], **quiet())
    trainer.fit(LitAutoEncoder())
    assert saved() == [
        "my/path/sample-mnist-epoch=01-val_loss=0.42.ckpt",
        "my/path/sample-mnist-epoch=02-val_loss=0.32.ckpt",
        "my/path/sample-mnist-epoch=03-val_loss=0.42.ckpt",
    ]
    # What the name says is what the file holds.
    path = "my/path/sample-mnist-epoch=02-val_loss=0.32.ckpt"
    assert torch.load(path)["epoch"] == 2
    model = LitAutoEncoder.load_from_checkpoint(path)
    assert Trainer(**quiet(logger=False)).validate(model)[0]["val_loss"] == pytest.approx(0.32)


def test_best_model_path_after_training() -> None:
    checkpoint_callback = ModelCheckpoint(
        monitor="val_loss", dirpath="my/path/", filename="sample-mnist-{epoch:02d}-{val_loss:.2f}"
    )
    trainer = Trainer(callbacks=[checkpoint_callback], **quiet())
    trainer.fit(LitAutoEncoder())
    best = Path("my/path/sample-mnist-epoch=02-val_loss=0.32.ckpt").resolve()
    assert checkpoint_callback.best_model_path == str(best)
    assert trainer.checkpoint_callback is checkpoint_callback
    assert checkpoint_callback.best_model_score == pytest.approx(0.32)


def test_save_weights_only() -> None:
    Trainer(callbacks=[ModelCheckpoint("w", save_weights_only=True)], **quiet()).fit(LitAutoEncoder())
    checkpoint = torch.load("w/epoch=4-step=5.ckpt")
    assert "state_dict" in checkpoint and "hyper_parameters" in checkpoint
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & set(checkpoint)


def test_period_is_the_interval_of_epochs_between_checkpoints() -> None:
    with pytest.warns(DeprecationWarning, match="period") as warned:
        checkpoint_callback = ModelCheckpoint(dirpath="p", period=2, save_top_k=-1)  # type: ignore[call-arg]
    assert [str(one.message) for one in warned] == [
        "ModelCheckpoint(period=2) is the spelling of 1.x: use every_n_epochs=2."
    ]
    Trainer(callbacks=[checkpoint_callback], **quiet()).fit(LitAutoEncoder())
    assert saved("p") == ["epoch=1-step=2.ckpt", "epoch=3-step=4.ckpt"]


def test_disables_checkpointing() -> None:
    with pytest.warns(DeprecationWarning, match="checkpoint_callback") as warned:
        trainer = Trainer(checkpoint_callback=False, **quiet())
    assert len(warned) == 1 and "enable_checkpointing=False" in str(warned[0].message)
    trainer.fit(LitAutoEncoder())
    assert trainer.checkpoint_callback is None
    assert saved() == []


def test_saves_by_hand_and_loads() -> None:
    model = LitModel(in_dim=32, out_dim=10)
    trainer = Trainer(**quiet(enable_checkpointing=False))
    trainer.fit(model)
    trainer.save_checkpoint("example.ckpt")
    new_model = LitModel.load_from_checkpoint(checkpoint_path="example.ckpt")
    assert (new_model.hparams.in_dim, new_model.hparams.out_dim) == (32, 10)
    assert all(torch.equal(new_model.state_dict()[key], value) for key, value in model.state_dict().items())


def test_saves_by_hand_and_loads_a_model_that_takes_a_namespace() -> None:
    model = MyModel(Namespace(learning_rate=0.05, width=7))
    trainer = Trainer(**quiet(enable_checkpointing=False))
    trainer.fit(model)
    trainer.save_checkpoint("example.ckpt")
    new_model = MyModel.load_from_checkpoint(checkpoint_path="example.ckpt")
    assert new_model.learning_rate == 0.05
    assert torch.equal(new_model.l1.weight, model.l1.weight)
    assert dict(new_model.hparams) == {"learning_rate": 0.05, "width": 7}
