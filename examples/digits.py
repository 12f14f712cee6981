"""Train a small conv net on scikit-learn's handwritten digits, in a run that may be killed at any instant.

    python examples/digits.py --root runs/digits

Kill it however you like and give the same command again: it goes on from its newest whole checkpoint and
ends with the very same weights, bit for bit, as a run that was never stopped. ``make demo`` does that and
compares.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint

BATCH_SIZE = 32
CLASSES = 10


class AugmentedDigits(Dataset[tuple[Tensor, Tensor]]):
    """Digits that are turned, shifted and blurred with noise anew every time they are looked at."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # Two generators on purpose: a run that resumes exactly has to put both of them back.
        angle = (torch.rand(()) - 0.5) * 0.4
        shift_x, shift_y = np.random.uniform(-0.2, 0.2, size=2)
        turn = torch.tensor(
            [[angle.cos(), -angle.sin(), shift_x], [angle.sin(), angle.cos(), shift_y]], dtype=torch.float32
        )
        grid = F.affine_grid(turn[None], [1, 1, 8, 8], align_corners=False)
        image = F.grid_sample(self.images[index][None], grid, align_corners=False)[0]
        return image + 0.05 * torch.randn_like(image), self.labels[index]


class DigitsData(pl.LightningDataModule):
    """1,797 real digits of 8 x 8 pixels: 1,437 to train on, 360 to validate with."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        train, val = order[:1437], order[1437:]
        self.train_set = AugmentedDigits(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, BATCH_SIZE, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=180, num_workers=self.workers)


class DigitsNet(pl.LightningModule):
    """Two convolutions with BatchNorm and dropout, trained with AdamW on one cycle of learning rates."""

    def __init__(self, lr: float = 0.01, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * 4 * 4, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Pulse(pl.Callback):
    """Leaves ``step epoch batch`` in a file after every batch: how far the run is, for whoever watches it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.path.write_text(f"{trainer.global_step} {trainer.current_epoch} {batch_idx + 1}\n")


def fingerprint(module: nn.Module) -> str:
    """The SHA-256 of every weight and buffer, in order of their names: one flipped bit changes it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Train, or go on training, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/digits"), help="the run's folder")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0, help="processes that load the data")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # the net is so small that a second thread would cost more than it brings
    pl.seed_everything(7, workers=True)
    model = DigitsNet()
    trainer = pl.Trainer(
        default_root_dir=args.root,
        max_epochs=args.epochs,
        log_every_n_steps=10,
        callbacks=[
            Pulse(args.root / "pulse.txt"),
            ModelCheckpoint(every_n_train_steps=args.save_every, filename="newest-{step}"),
            ModelCheckpoint(monitor="val_acc", mode="max", filename="best-{val_acc:.4f}"),
        ],
    )
    trainer.fit(model, datamodule=DigitsData(args.workers), ckpt_path="auto")
    trainer.save_checkpoint(args.root / "final.ckpt")

    accuracy = float(trainer.callback_metrics["val_acc"])
    print(f"val_acc {accuracy:.4f} after {trainer.global_step} steps")
    print(f"sha256 of the final weights: {fingerprint(model)}")


if __name__ == "__main__":
    main()
