"""What the ranks of the tests of DDP run: a model, its data, and a record of every bit that training gives."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import holdfast as pl
from holdfast.callbacks.base import Callback, Checkpoint, SavePlan
from holdfast.strategies import DDPStrategy

ROWS = 96


def bits(value: Any) -> Any:
    """What is equal only where every bit is."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        return tuple(value.shape), str(value.dtype), zlib.crc32(flat.view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(one) for one in value]
    return value.hex() if isinstance(value, float) else value


class Rows(Dataset[Any]):
    """Rows that depend on their index; with ``noisy`` a draw of the data's own generators is added."""

    def __init__(self, noisy: bool = False, rows: int = ROWS) -> None:
        self.rows, self.noisy = rows, noisy

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.sin(torch.arange(8) * (index + 1) * 0.37)
        return (row + 0.1 * torch.rand(8) if self.noisy else row), row.sum() * 0.1


class Parts:
    """The batches of one rank: global batch k is rows k*G to (k+1)*G, and each rank has its part of it."""

    def __init__(self, rank: int, world_size: int, global_batch: int, rows: int = ROWS) -> None:
        self.size = global_batch // world_size
        self.starts = [start + rank * self.size for start in range(0, rows, global_batch)]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Any:
        return iter([list(range(start, start + self.size)) for start in self.starts])


def loader(trainer: pl.Trainer, *, workers: int = 0, noisy: bool = False, global_batch: int = 12) -> Any:
    parts: Any = Parts(trainer.global_rank, trainer.world_size, global_batch)
    return DataLoader(Rows(noisy), batch_sampler=parts, num_workers=workers)


class Net(pl.LightningModule):
    """A model whose parameters are registered in another order than the one their gradients come in."""

    def __init__(self, dropout: float = 0.2, width: int = 24) -> None:
        super().__init__()
        self.head = nn.Linear(width, 1)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width)
        self.first = nn.Linear(8, width)
        self.drop = nn.Dropout(dropout)
        self.losses: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.last(torch.tanh(self.first(x))))
        out: Tensor = self.head(self.drop(torch.tanh(x)))
        return out.squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[1]).pow(2).mean()
        self.losses.append(float(loss.detach()).hex())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self(batch[0]) - batch[1]).pow(2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), "interval": "step"}
        ]


class PlainNet(Net):
    """The same without anything that is drawn, or that goes by the batch of one process."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.norm = nn.LayerNorm(24)  # type: ignore[assignment]


class Everywhere(Checkpoint):
    """Asks for a save after each batch and each epoch, and makes a file of those whose numbers it is given."""

    def __init__(self, directory: Path, numbers: Sequence[int]) -> None:
        self.directory, self.numbers, self.count = directory, numbers, 0
        self.files: dict[int, str] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.request_save(self)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.request_save(self)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def plan_save(self, trainer: Any) -> SavePlan | None:
        self.count += 1
        if self.count not in self.numbers:
            return None
        self.files[self.count] = str(self.directory / f"{self.count:03d}.ckpt")
        return SavePlan(names=(self.files[self.count],))


class Logged(Callback):
    """Keeps what callbacks see of the logged values, at each epoch's and validation's end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(bits({name: float(value) for name, value in trainer.callback_metrics.items()}))


def trainer_for(place: Path, strategy: Any = "ddp", **options: Any) -> pl.Trainer:
    given = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "max_epochs": 2, "use_distributed_sampler": False, "enable_checkpointing": True,
        "num_sanity_val_steps": 0, "default_root_dir": place, **options,
    }  # fmt: skip
    return pl.Trainer(strategy=strategy, **given)


def train(
    place: Path,
    ckpt_path: str | None = None,
    *,
    make: Any = Net,
    save: Sequence[int] = (),
    data: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    callbacks: Any = (),
    **options: Any,
) -> dict[str, Any]:
    """Train, from the start or from a file; what a rank of two equal runs has in common, bit for bit."""
    pl.seed_everything(7, verbose=False)
    module = make()
    if ckpt_path is not None:  # what is not restored shall show
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
    saver = Everywhere(place / "saved", save)
    logged = Logged()
    own = [one() for one in callbacks]
    strategy: Any = DDPStrategy(**(ddp or {})) if ddp is not None else "ddp"
    trainer = trainer_for(place, strategy, callbacks=[logged, *own, saver], **options)
    torch.manual_seed(100 + trainer.global_rank)  # ranks differ in what they draw
    random.seed(trainer.global_rank)
    train_loader = loader(trainer, **(data or {}))
    trainer.fit(module, train_loader, loader(trainer), ckpt_path=ckpt_path)
    return {
        "weights": bits(dict(module.state_dict())),
        "optimizer": bits([one.state_dict() for one in trainer.optimizers]),
        "draws": (bits(torch.rand(4)), random.random()),
        "losses": module.losses,
        "logged": logged.seen,
        "steps": trainer.global_step,
        "files": saver.files,
        "values": {name: value.detach().clone() for name, value in module.state_dict().items()},
    }


def whole_and_resumed(place: Path, numbers: Sequence[int], options: dict[str, Any]) -> list[list[str]]:
    """For each of these files of a whole run: the names of what a run that goes on from it has differently."""
    whole = train(place, save=numbers, **options)
    found = []
    for file in whole["files"].values():
        again = train(place, file, **options)
        found.append([key for key in ("weights", "optimizer", "draws", "steps") if again[key] != whole[key]])
        count = len(again["losses"])
        if not count or again["losses"] != whole["losses"][-count:]:
            found[-1].append("losses")
        if again["logged"] != whole["logged"][-len(again["logged"]) :]:
            found[-1].append("logged")
    return found


def train_with(place: Path, ckpt_path: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """`train`, for `run_ranks`."""
    return train(place, ckpt_path, **options)
