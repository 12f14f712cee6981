"""Train the conv net of ``digits.py`` on several processes, in a job whose processes may be killed.

    torchrun --standalone --nproc-per-node=2 --max-restarts=2 examples/digits_ddp.py --root runs/digits_ddp
    python examples/digits_ddp.py --root runs/digits_ddp --processes 2
    python examples/digits_ddp.py --root runs/digits_ddp

Kill a process however you like: torchrun starts all of them again, and the job goes on from its newest whole
checkpoint. A job goes on with another number of processes too, as the last line does with one: the global
batch is the same, so every step sees the rows that it would have seen. ``make demo-ddp`` does both and
compares.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import holdfast as pl
from digits import DigitsData, DigitsNet, fingerprint
from holdfast.callbacks import ModelCheckpoint

GLOBAL_BATCH = 32


class Numbered(Dataset[tuple[Any, ...]]):
    """Rows that know their numbers, so that it can be seen who trained on which."""

    def __init__(self, rows: Dataset[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.rows[index], index)


class SharedDigits(DigitsData):
    """The digits in global batches of 32 rows, of which each process takes its part."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(Numbered(self.train_set), GLOBAL_BATCH // self.trainer.world_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(self.val_set, 180 // self.trainer.world_size)


class SharedDigitsNet(DigitsNet):
    """The net, given rows with their numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return super().training_step((images, labels), batch_idx)


class Diary(pl.Callback):
    """Notes which rows this process trained on, and leaves ``step epoch batch pid`` for who watches it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rank = trainer.global_rank
        rows = " ".join(map(str, batch[2].tolist()))
        with open(self.root / f"rows-{rank}.txt", "a") as file:
            file.write(f"{trainer.current_epoch} {batch_idx} {rows}\n")
        pulse = f"{trainer.global_step} {trainer.current_epoch} {batch_idx + 1} {os.getpid()}\n"
        (self.root / f"pulse-{rank}.txt").write_text(pulse)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            accuracy = float(trainer.callback_metrics["val_acc"])
            print(f"epoch {trainer.current_epoch + 1}  val_acc {accuracy:.4f}", flush=True)


def main() -> None:
    """Train, or go on training, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/digits_ddp"), help="the run's folder")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--processes", type=int, help="how many; torchrun says it itself")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    pl.seed_everything(7, workers=True)
    model = SharedDigitsNet()
    trainer = pl.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=args.processes or "auto",
        default_root_dir=args.root,
        max_epochs=args.epochs,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Diary(args.root),
            ModelCheckpoint(every_n_train_steps=args.save_every, filename="newest-{step}"),
        ],
    )
    trainer.fit(model, datamodule=SharedDigits(), ckpt_path="auto")
    trainer.save_checkpoint(args.root / "final.ckpt")
    if trainer.is_global_zero:
        print(f"sha256 of the final weights: {fingerprint(model)}")


if __name__ == "__main__":
    main()
