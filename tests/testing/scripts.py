"""Training scripts as people write them: one function that builds everything and trains below a directory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

import holdfast as pl

ROWS = 16


class Regression(pl.LightningModule):
    """A net with everything that has to come back: dropout, running statistics, a scheduler, momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def rows() -> TensorDataset:
    """The same in every run: features (ROWS, 3) and ids."""
    return TensorDataset(torch.arange(ROWS * 3.0).view(ROWS, 3) / 10, torch.arange(ROWS))


def loader(dataset: Any = None, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(rows() if dataset is None else dataset, **{"batch_size": 4, **arguments})


def fit(
    root: Path,
    module: pl.LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    ckpt_path: str | None = "auto",
    **arguments: Any,
) -> pl.Trainer:
    """Two epochs of four batches."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": 2, "log_every_n_steps": 1, **quiet, **arguments}
    trainer = pl.Trainer(default_root_dir=root, **settings)
    pl.seed_everything(3, verbose=False)
    trainer.fit(
        Regression() if module is None else module,
        loader(shuffle=True) if train is None else train,
        val,
        ckpt_path=ckpt_path,
    )
    return trainer


def script(*arguments: Any, **named: Any) -> Callable[[Path], Any]:
    """`fit` with these arguments, made anew for every run where they are functions."""

    def train(root: Path) -> pl.Trainer:
        made = {name: value() if callable(value) else value for name, value in named.items()}
        return fit(root, **made)

    return train


# -- scripts that resume exactly -----------------------------------------------------------------------------


def good(root: Path) -> None:
    """Shuffled rows, validation twice an epoch."""
    fit(root, val=loader(batch_size=8), val_check_interval=2)


class Adversarial(Regression):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            loss = (net(batch[0]) + torch.randn(4, 1)).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.net.parameters(), lr=0.05),
            torch.optim.SGD(self.other.parameters(), lr=0.05, momentum=0.9),
        ]


class OnSeveral(Regression):
    """Trains on a batch of each of its loaders."""

    def loss(self, batch: Any) -> Tensor:
        return sum(super(OnSeveral, self).loss(part) for part in batch)


class OneByOne(Regression):
    """Trains on rows, not on batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))


class Stream(IterableDataset[Any]):
    """Rows one after the other, with noise from the global generator, of a length that is not told."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(ROWS):
            yield torch.full((3,), index / 10) + torch.rand(3), index


class Noisy(Dataset[Any]):
    """Augmentation from the global generator: seeded for each batch, also in workers."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), index / 10) + torch.rand(3), index


class Data(pl.LightningDataModule):
    """A datamodule with validation."""

    def train_dataloader(self) -> Any:
        return loader(Noisy(), shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(batch_size=8)


def with_datamodule(root: Path) -> None:
    trainer = pl.Trainer(
        default_root_dir=root,
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    pl.seed_everything(3, verbose=False)
    trainer.fit(Regression(), datamodule=Data(), ckpt_path="auto")


def two_fits(root: Path) -> None:
    """Pretraining, and training on from what came of it."""
    first = fit(root / "pretraining", max_epochs=1)
    module = Regression()
    module.load_state_dict(first.lightning_module.state_dict())
    fit(root / "training", module, val=loader(batch_size=8), max_epochs=1)


def validated_after(root: Path) -> None:
    """Evaluates what was trained, with the same trainer."""
    trainer = fit(root, val=loader(batch_size=8), max_epochs=1)
    trainer.validate(dataloaders=loader(batch_size=8), verbose=False)


def unseeded(root: Path) -> None:
    """Its data is fixed; weights, order and dropout come from whatever the generators hold."""
    trainer = pl.Trainer(
        default_root_dir=root,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Regression(), loader(shuffle=True), ckpt_path="auto")


GOOD: dict[str, Callable[[Path], Any]] = {
    "validation": good,
    "manual optimization": script(module=Adversarial),
    "accumulation": script(accumulate_grad_batches=3),
    "workers": script(train=functools.partial(loader, Noisy(), shuffle=True, num_workers=2)),
    "iterable": script(train=lambda: loader(Stream())),
    "several loaders": script(
        module=OnSeveral, train=lambda: [loader(shuffle=True), loader(Noisy(), batch_size=2)]
    ),
    "no batch size": script(module=OneByOne, train=lambda: loader(Noisy(), batch_size=None, shuffle=True)),
    "callbacks": script(
        val=functools.partial(loader, batch_size=8),
        callbacks=lambda: [
            pl.callbacks.EMAWeightAveraging(decay=0.9),
            pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=100),
            pl.callbacks.LearningRateMonitor("step"),
            pl.callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
        ],
        max_epochs=4,
    ),
    "reloaded loaders": script(train=None, reload_dataloaders_every_n_epochs=1),
    "datamodule": with_datamodule,
    "two fits": two_fits,
    "not seeded": unseeded,
    "validated after": validated_after,
    "no checkpoints": script(enable_checkpointing=False, logger=False),
    "steps": script(max_epochs=-1, max_steps=6),
}


# -- scripts that do not ------------------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """Two weights that start at 0 and go down by ``factor(batch)`` in each step: whole numbers, all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def factor(self, batch: Any) -> Any:
        return 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum() * self.factor(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class OnIds(Plain):
    """Each step depends on the rows."""

    def factor(self, batch: Any) -> Any:
        return batch[1].sum()


class Rotating(Sampler[int]):
    """An order that begins one further each time that it is asked for it."""

    def __init__(self) -> None:
        self.times = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter([(index + self.times) % ROWS for index in range(ROWS)])


class OwnNumbers:
    """A generator that nobody knows for one."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = itertools.cycle(numbers)

    def draw(self) -> int:
        return next(self.numbers)


class OwnGenerator(Dataset[Any]):
    """Augmentation from a generator that nobody saves."""

    def __init__(self) -> None:
        self.noise = OwnNumbers(*range(1, 10))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(self.noise.draw())), index


def feed() -> Any:
    """A loader that goes on where it was left in memory: read again, it gives what comes next."""
    numbers = itertools.count(1)

    class Feed:
        def __iter__(self) -> Iterator[Any]:
            return (torch.full((2,), float(next(numbers))) for _ in range(4))

    return Feed()


class Counts(Plain):
    """The step depends on how many of them this object has made."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def factor(self, batch: Any) -> Any:
        self.steps += 1
        return self.steps


class LoudCounts(Counts):
    """Likewise, and it can be seen in the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Shaken(Plain):
    """Logs a loss that torch's generator has shaken."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss + torch.rand(()))
        return loss


class OwnNoise(Plain):
    """Noise in the step from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = OwnNumbers(40, 20, 50)

    def factor(self, batch: Any) -> Any:
        return self.noise.draw()


class Average(Plain):
    """A metric made by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.count = 0.0, 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.total, self.count = self.total + batch[1].sum().item(), self.count + 1

    def on_train_epoch_end(self) -> None:
        self.log("mean_id", self.total / self.count)


class Clock(Plain):
    """Logs for how long it is in use, as something that measures time would."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ticks += 1
        self.log("time/ticks", float(self.ticks))


class Straight(Plain):
    """Gives its logger values itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ticks += 1
        self.logger.log_metrics({"ticks": self.ticks}, step=self.global_step)


class Counting(pl.Callback):
    """Counts batches, and keeps that to itself."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches += 1
        self.counted(trainer, pl_module)

    def counted(self, trainer: Any, pl_module: Any) -> None: ...


class Halves(Counting):
    """Halves the weights after every third batch that it has seen."""

    def counted(self, trainer: Any, pl_module: Any) -> None:
        if self.batches % 3 == 0:
            with torch.no_grad():
                pl_module.weight.mul_(0.5)


class Impatient(Counting):
    """Stops after five batches that it has seen."""

    def counted(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = self.batches == 5


class Forgets(Counting):
    """Saves what it counts, and does not take it back."""

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}


class Draws(pl.Callback):
    """Draws a number before the first batch that it sees, unless it has seen the epoch begin."""

    drawn = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.drawn = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.drawn:
            torch.rand(())
