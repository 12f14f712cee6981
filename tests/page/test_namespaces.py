"""The page "Saving and loading weights": models that take an `argparse.Namespace`, loaded with other values."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast import Trainer

from .models import MyModel, OneWeight, quiet

CKPT_PATH = "example.ckpt"


class Both(OneWeight):
    """Takes a Namespace, and one more argument beside it."""

    def __init__(self, hparams: Namespace, out_dim: int = 1) -> None:
        super().__init__(hparams.learning_rate)
        self.save_hyperparameters()
        self.l1 = nn.Linear(hparams.width, out_dim)


def save(model: OneWeight) -> None:
    trainer = Trainer(**quiet(logger=False, enable_checkpointing=False, max_epochs=1))
    trainer.fit(model)
    trainer.save_checkpoint(CKPT_PATH)


def test_one_of_its_values_is_overridden() -> None:
    save(MyModel(Namespace(learning_rate=0.05, width=7)))
    model = MyModel.load_from_checkpoint(CKPT_PATH, learning_rate=0.2)
    assert (model.learning_rate, dict(model.hparams)) == (0.2, {"learning_rate": 0.2, "width": 7})


def test_all_of_it_is_overridden() -> None:
    save(MyModel(Namespace(learning_rate=0.05, width=7)))
    model = MyModel.load_from_checkpoint(CKPT_PATH, hparams=Namespace(learning_rate=0.3, width=7))
    assert (model.learning_rate, dict(model.hparams)) == (0.3, {"learning_rate": 0.3, "width": 7})


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_hierarchical_hparams_file_takes_its_place(suffix: str) -> None:
    save(MyModel(Namespace(learning_rate=0.05, width=7)))
    Path(f"hparams_file{suffix}").write_text(
        "learning_rate: 0.2\nwidth: 7\ndataloader:\n    batch_size: 32\n"
    )
    model = MyModel.load_from_checkpoint(CKPT_PATH, hparams_file=f"hparams_file{suffix}")
    assert model.learning_rate == 0.2
    assert model.hparams.dataloader == {"batch_size": 32}


def test_a_namespace_beside_another_argument() -> None:
    saved = Both(Namespace(learning_rate=0.05, width=7), out_dim=3)
    save(saved)
    plain = {"hparams": {"learning_rate": 0.05, "width": 7}, "out_dim": 3}
    assert torch.load(CKPT_PATH)["hyper_parameters"] == plain
    model = Both.load_from_checkpoint(CKPT_PATH)
    assert dict(model.hparams) == {"hparams": Namespace(learning_rate=0.05, width=7), "out_dim": 3}
    assert torch.equal(model.l1.weight, saved.l1.weight)
