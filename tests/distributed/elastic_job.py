"""A small training script, started by torchrun; its arguments say what happens in the first attempt.

    torchrun ... elastic_job.py ROOT [kill] [damage] [wait]

With "kill" rank 1 kills itself in the second epoch, with "damage" after it has spoilt the newest file. With
"wait" all ranks say in that place that they are there, and wait for a file "go".
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint

AT = 14  # in the second of three epochs of 10 steps; a save comes every 3


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 2)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Trouble(pl.Callback):
    def __init__(self, root: Path, wishes: list[str]) -> None:
        self.root, self.wishes, self.begun_at = root, wishes, -1

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begun_at = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # How often torchrun has started this process's machine again.
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if not first or trainer.global_step != AT:
            return
        if "wait" in self.wishes:
            (self.root / f"reached-{trainer.global_rank}").touch()
            while not (self.root / "go").exists():
                time.sleep(0.01)
        if "kill" in self.wishes and trainer.global_rank == 1:
            path = newest(self.root, at_least=AT // 3 * 3)
            if "damage" in self.wishes:
                damage(path)
            os.kill(os.getpid(), signal.SIGKILL)


def newest(root: Path, at_least: int) -> Path:
    """The newest checkpoint, once that of a step is there."""
    while True:
        found = {int(path.stem.partition("=")[2]): path for path in root.rglob("step=*.ckpt")}
        if found and max(found) >= at_least:
            return found[max(found)]


def damage(path: Path) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"damaged")


def train(root: str, *wishes: str) -> int:
    """Train or go on; returns the step that it went on from."""
    torch.set_num_threads(1)
    trouble = Trouble(Path(root), list(wishes))
    pl.seed_everything(3)
    model = Net()
    trainer = pl.Trainer(
        strategy="ddp", accelerator="cpu", default_root_dir=root, logger=False, max_epochs=3,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}"), trouble],
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(80, 8)), 4, shuffle=True)
    trainer.fit(model, data, ckpt_path="auto")
    trainer.save_checkpoint(os.path.join(root, "final.ckpt"))
    return trouble.begun_at


if __name__ == "__main__":
    train(*sys.argv[1:])
