"""What the resume tests train: one small module and its data, with a switch for all that breaks a resume."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from .tape import Tape, bits

FEATURES = 6


@dataclass(frozen=True)
class Case:
    """One run to stop and resume; the defaults are the plainest run that shuffles."""

    # data
    rows: int = 30
    batch_size: int = 4
    shuffle: bool = True
    drop_last: bool = False
    workers: int = 0
    persistent: bool = False
    own_generator: bool = False
    sampler: str | None = (
        None  # "weighted", "epoch" (shuffles by set_epoch), "batch" (a batch sampler of its own)
    )
    subset: bool = False
    collate: bool = False  # draws while it puts a batch together
    iterable: bool = False
    augment: tuple[str, ...] = ()  # of "torch", "numpy", "random"
    # model and optimization
    dropout: bool = False
    batch_norm: bool = False
    optimizer: str = "sgd"  # "sgd", "adam"
    scheduler: str | None = None  # "onecycle", "step", "multistep", "plateau"
    manual: bool = False
    target: str | None = None  # "module", "callback"
    extra: str | None = None  # "warmup", "counter", "frozen", "keeps gradients"
    loss_factor: float = 1.0
    # validation
    validation: str | None = (
        None  # "plain", "shuffled", "augmented", "drawing" (augmented, and the step draws)
    )
    early_stopping: bool = False
    best_k: int = 0
    # the trainer's own arguments
    trainer: dict[str, Any] = field(default_factory=dict)


class Rows(Dataset[tuple[int, Tensor, Tensor]]):
    """(row's number, inputs, target), with noise drawn from the global generators of ``augment``."""

    def __init__(self, rows: int, augment: tuple[str, ...] = ()) -> None:
        source = torch.Generator().manual_seed(rows)
        self.inputs = torch.randn(rows, FEATURES, generator=source)
        self.targets = self.inputs.sum(1, keepdim=True).sin() + 0.1 * torch.randn(rows, 1, generator=source)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        row = self.inputs[index]
        if "torch" in self.augment:
            row = row + 0.1 * torch.randn(FEATURES)
        if "numpy" in self.augment:
            row = row * float(numpy.random.uniform(0.5, 1.5))
        if "random" in self.augment and random.random() < 0.5:
            row = -row
        return index, row, self.targets[index]


class Stream(IterableDataset[tuple[int, Tensor, Tensor]]):
    """The same rows, in order, without length or state: resuming has to read it again from the start."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        return (self.rows[index] for index in range(len(self.rows)))


def train_loader(case: Case) -> DataLoader[Any]:
    rows: Any = Rows(case.rows, case.augment)
    if case.subset:
        rows, _ = random_split(rows, [case.rows - 5, 5], torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "batch_size": case.batch_size,
        "drop_last": case.drop_last,
        "num_workers": case.workers,
        "persistent_workers": case.persistent,
    }
    if case.iterable:
        return DataLoader(Stream(rows), **options)
    if case.collate:
        options["collate_fn"] = collate_with_noise
    if case.own_generator:
        options["generator"] = torch.Generator().manual_seed(11)
    if case.sampler == "weighted":
        options["sampler"] = WeightedRandomSampler([1.0 + n % 3 for n in range(case.rows)], case.rows)
    elif case.sampler == "epoch":
        options["sampler"] = DistributedSampler(rows, num_replicas=2, rank=1)
    elif case.sampler == "batch":
        del options["batch_size"], options["drop_last"]
        options["batch_sampler"] = BatchSampler(RandomSampler(rows), case.batch_size, case.drop_last)
    else:
        options["shuffle"] = case.shuffle
    return DataLoader(rows, **options)


def collate_with_noise(rows: list[Any]) -> Any:
    """The default collate, and noise from each global generator."""
    ids, inputs, targets = default_collate(rows)
    return (
        ids,
        inputs + 0.1 * torch.randn_like(inputs) + random.random() + float(numpy.random.rand()),
        targets,
    )


def val_loader(case: Case) -> DataLoader[Any] | None:
    if case.validation is None:
        return None
    augment = ("torch", "numpy", "random") if case.validation in ("augmented", "drawing") else ()
    return DataLoader(Rows(9, augment), batch_size=4, shuffle=case.validation == "shuffled")


def module_class(pl: Any, extra: str | None) -> type:
    """The module of every case with this ``extra``, on top of ``pl.LightningModule``."""

    class CaseModule(pl.LightningModule):
        def __init__(self, case: Case, tape: Tape) -> None:
            super().__init__()
            self.case, self.tape = case, tape
            layers: list[nn.Module] = [nn.Linear(FEATURES, 8)]
            layers += [nn.BatchNorm1d(8)] if case.batch_norm else []
            layers += [nn.Tanh()]
            layers += [nn.Dropout(0.3)] if case.dropout else []
            self.net = nn.Sequential(*layers, nn.Linear(8, 1))
            if case.target is not None:
                self.target = copy.deepcopy(self.net).requires_grad_(False)
            self.automatic_optimization = not case.manual

        def compute_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            if self.case.target is not None:
                targets = 0.5 * (targets + self.target(inputs))
            return self.case.loss_factor * functional.mse_loss(self.net(inputs), targets)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            ids, inputs, targets = batch
            loss = self.compute_loss(inputs, targets)
            self.tape.record("trained", batch_idx, tuple(ids.tolist()), bits(inputs), bits(loss))
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("peak", loss, on_step=False, on_epoch=True, reduce_fx="max")
            self.log("rows", float(len(ids)), on_step=False, on_epoch=True, reduce_fx="sum")
            if self.case.manual:
                self.step_by_hand(loss, inputs, batch_idx)
            return loss

        def step_by_hand(self, loss: Tensor, inputs: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            if batch_idx % 2 == 0:
                first.zero_grad()
                self.manual_backward(loss)
                first.step()
            second.zero_grad()
            self.manual_backward(self.net(inputs).square().mean())
            second.step()
            if batch_idx % 3 == 2:
                for scheduler in self.lr_schedulers():
                    scheduler.step()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            ids, inputs, targets = batch
            if self.case.validation == "drawing":
                inputs = inputs + 0.01 * torch.randn_like(inputs)
            loss = self.compute_loss(inputs, targets)
            self.tape.record("validated", batch_idx, tuple(ids.tolist()), bits(loss))
            self.log("val_loss", loss, batch_size=len(ids))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.case.target == "module":
                move_target(self)

        def configure_optimizers(self) -> Any:
            if self.case.manual:
                first = torch.optim.Adam(self.net[0].parameters(), lr=0.02)
                second = torch.optim.SGD(self.net[-1].parameters(), lr=0.02, momentum=0.9)
                return [first, second], [torch.optim.lr_scheduler.StepLR(first, 2, 0.7),
                                         torch.optim.lr_scheduler.ExponentialLR(second, 0.9)]  # fmt: skip
            if self.case.optimizer == "adam":
                optimizer: torch.optim.Optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
            else:
                optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)
            if self.case.scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": make_scheduler(self.case, optimizer)}

    return CaseModule if extra is None else EXTRAS[extra](CaseModule)


def with_warmup(base: Any) -> type:
    """The learning rate is set in optimizer_step, from the step: there is no scheduler to restore."""

    class CaseModule(base):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = 0.002 * min(10, 1 + self.trainer.global_step)

    return CaseModule


def with_counter(base: Any) -> type:
    """A state that is no parameter, put into checkpoints by the module itself."""

    class CaseModule(base):
        seen = 0

        def compute_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            self.seen += self.training
            return super().compute_loss(inputs, targets) / (1 + 0.1 * self.seen)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = self.seen

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["seen"]

    return CaseModule


def with_frozen_layer(base: Any) -> type:
    """In the second epoch the first layers stop training: no gradients, and their statistics stand still."""

    class CaseModule(base):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[0].requires_grad_(False)
                self.net[1].eval()

    return CaseModule


def with_gradients_kept(base: Any) -> type:
    """Gradients are only halved where they would be cleared, so each step depends on all before it."""

    class CaseModule(base):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)

    return CaseModule


EXTRAS = {
    "warmup": with_warmup,
    "counter": with_counter,
    "frozen": with_frozen_layer,
    "keeps gradients": with_gradients_kept,
}


def move_target(module: Any) -> None:
    with torch.no_grad():
        for kept, live in zip(module.target.parameters(), module.net.parameters(), strict=True):
            kept.lerp_(live, 0.1)


def make_scheduler(case: Case, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    schedulers = torch.optim.lr_scheduler
    if case.scheduler == "onecycle":
        return {"scheduler": schedulers.OneCycleLR(optimizer, 0.1, total_steps=60), "interval": "step"}
    if case.scheduler == "step":
        return {"scheduler": schedulers.StepLR(optimizer, 1, 0.5), "interval": "epoch"}
    if case.scheduler == "multistep":
        multistep = schedulers.MultiStepLR(optimizer, [2, 5, 9, 11], 0.6)
        return {"scheduler": multistep, "interval": "step", "frequency": 2}
    if case.scheduler == "plateau":
        monitor = "loss_epoch" if case.validation is None else "val_loss"
        plateau = schedulers.ReduceLROnPlateau(optimizer, "min", 0.5, patience=0, threshold=0.5)
        return {"scheduler": plateau, "interval": "epoch", "monitor": monitor}
    raise ValueError(f"case.scheduler is {case.scheduler!r}; expected onecycle, step, multistep or plateau")


def target_callback(pl: Any) -> Any:
    """A callback that moves the target network after every batch."""

    class MoveTarget(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            move_target(pl_module)

    return MoveTarget()
