"""Stops a run of a module at every place where it can be saved, goes on from each, and compares the ends.

The tests of what a model is made of use it: unlike `harness`, it does not come with a module of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.checkpoint.load import load

from .harness import first_difference, without_incidentals

FEATURES = 4
ROWS = 14  # in batches of 4: the last one is smaller


def rows(count: int = ROWS, **options: Any) -> DataLoader[Any]:
    """Rows ``(features (4,), their sum's sine (1,))``, shuffled."""
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(count))
    targets = inputs.sum(1, keepdim=True).sin()
    return DataLoader(TensorDataset(inputs, targets), **{"batch_size": 4, "shuffle": True, **options})


class Small(pl.LightningModule):
    """A net of two layers that remembers its losses; made to be overridden in one thing at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.make_net()
        self.losses: list[str] = []

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))

    def loss(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def remember(self, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()).hex())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.remember(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ByHand(Small):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class SaveAtEveryPlace(Checkpoint):
    """Saves after every batch, validation and epoch."""

    moment: str

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.files: list[Path] = []

    def ask(self, trainer: Any) -> None:
        if not trainer.sanity_checking:
            trainer.request_save(self)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.moment = f"batch-{trainer.progress.total_batches}"
        self.ask(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.moment = f"validation-{trainer.progress.total_batches}"
        self.ask(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.moment = f"epoch-{trainer.current_epoch}"
        self.ask(trainer)

    def plan_save(self, trainer: Any) -> SavePlan | None:
        if self.directory is None:  # a run that goes on asks alike, so that the two do the same
            return None
        self.files.append(self.directory / f"{self.moment}.ckpt")
        return SavePlan(names=(str(self.files[-1]),))


def fit(
    root: Path,
    make: Callable[[], Any],
    callbacks: Callable[[], Sequence[Any]] = list,
    ckpt_path: Path | None = None,
    *,
    save: bool = False,
    val: Any = None,
    data: Callable[[], Any] = rows,
    **arguments: Any,
) -> tuple[Any, pl.Trainer, SaveAtEveryPlace]:
    """Train what ``make`` gives; a run that goes on begins elsewhere, so that what is not restored shows."""
    pl.seed_everything(1, verbose=False)
    if ckpt_path is not None:
        torch.rand(7), numpy.random.rand(7), random.random()
    model = make()
    saver = SaveAtEveryPlace(root / "places" if save else None)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": root,
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
            "callbacks": [*callbacks(), saver],
        }
    )
    trainer.fit(model, data(), val, ckpt_path=ckpt_path)
    return trainer.lightning_module, trainer, saver


def dense(value: Any) -> Any:
    """The value with a sparse tensor as a dense one, whose bits can be compared."""
    return value.to_dense() if isinstance(value, Tensor) and value.is_sparse else value


def end_of(model: Any, trainer: pl.Trainer, file: Path) -> dict[str, Any]:
    """All that a run leaves: the file it would save, and what is in no file."""
    trainer.save_checkpoint(file)
    named = [(name.replace("_orig_mod.", ""), one) for name, one in model.named_parameters()]
    return {
        "file": without_incidentals(tree_map(dense, load(file)), file.parent),
        "trains": {name: one.requires_grad for name, one in named},
        "gradients": {name: dense(one.grad) for name, one in named if one.grad is not None},
        "buffers": {name.replace("_orig_mod.", ""): one for name, one in model.named_buffers()},
        "draw": torch.rand(3),
    }


def assert_resumes_everywhere(
    root: Path,
    make: Callable[[], Any],
    callbacks: Callable[[], Sequence[Any]] = list,
    *,
    again: Callable[[], Any] | None = None,
    choose: Callable[[list[Path]], Sequence[Path]] = list,
    compare: Callable[[Any], Any] = lambda model: None,
    **arguments: Any,
) -> tuple[Any, list[Path]]:
    """Train whole, then go on from each file with a model made anew: everything has to be the same.

    Args:
        root: Where to.
        make: Makes the model.
        callbacks: Makes the callbacks besides the one that saves.
        again: Makes the model that goes on; None for ``make``.
        choose: Which files to go on from.
        compare: Gives what more of a model has to be equal.
        arguments: For `fit` and the trainer.

    Returns:
        The model of the whole run, and the files.
    """
    model, trainer, saver = fit(root / "whole", make, callbacks, save=True, **arguments)
    whole = {**end_of(model, trainer, root / "whole" / "end.ckpt"), "more": compare(model)}
    files = list(choose(saver.files))
    assert files, "nothing was saved to go on from"
    for path in files:
        place = root / f"from-{path.stem}"
        resumed, trainer, _ = fit(place, again or make, callbacks, path, **arguments)
        end = {**end_of(resumed, trainer, place / "end.ckpt"), "more": compare(resumed)}
        done = len(resumed.losses)
        # Where nothing was left to train, nothing has computed those that every step clears.
        known = {name: one for name, one in whole["gradients"].items() if name in end["gradients"]}
        found = first_difference({**whole, "gradients": known}, end)
        assert found is None, f"from {path.stem}: {found}"
        assert model.losses[len(model.losses) - done :] == resumed.losses, f"from {path.stem}: other losses"
    return model, saver.files
