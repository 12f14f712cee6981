"""The training that test_kill_training kills: the same command starts it and starts it again.

    python child.py ROOT [OPTIONS AS JSON]

OPTIONS["checkpoint"] are further arguments of ModelCheckpoint; its clock is OPTIONS["fast_s"] seconds fast. Says each step on stdout when its hooks have run, and where it starts. Leaves ROOT/final.pt.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import holdfast as pl
from holdfast.callbacks import EarlyStopping, ModelCheckpoint
from holdfast.loggers import CSVLogger

SAVE_EVERY_N_STEPS = 5
EPOCHS = 24
BATCHES = 40
BATCH_SIZE = 4


class Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, rows: int) -> None:
        source = torch.Generator().manual_seed(rows)
        self.inputs = torch.randn(rows, 16, generator=source)
        self.targets = self.inputs.sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(16) * random.random()
        return self.inputs[index] + noise, self.targets[index]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 1)
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.mse_loss(self.net(batch[0]), batch[1]))

    def on_train_start(self) -> None:
        say("started", self.trainer.global_step, self.trainer.resumed_from)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        say("step", self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def say(*words: object) -> None:
    """Say it in one piece, whatever other threads say meanwhile."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def set_clock(fast_s: float) -> None:
    right = time.time
    time.time = lambda: right() + fast_s


def main(root: Path, options: dict[str, Any]) -> None:
    signal.alarm(100)  # ends a run that hangs, and with it the test that waits for it
    how = options.get("checkpoint", {})
    set_clock(options.get("fast_s", 0.0))
    torch.set_num_threads(1)
    pl.seed_everything(5)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        default_root_dir=root,
        logger=CSVLogger(root),
        log_every_n_steps=1,
        callbacks=[
            ModelCheckpoint(
                every_n_train_steps=SAVE_EVERY_N_STEPS,
                monitor="loss_step",
                save_top_k=2,
                save_last=True,
                **how,
            ),
            ModelCheckpoint(monitor="val_loss", filename="best-{epoch}", **how),
            EarlyStopping(monitor="val_loss", patience=EPOCHS),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = Net()
    loader = DataLoader(Rows(BATCHES * BATCH_SIZE), batch_size=BATCH_SIZE, shuffle=True)
    trainer.fit(net, loader, DataLoader(Rows(8), batch_size=8), ckpt_path="auto")
    torch.save(net.state_dict(), root / "final.pt")
    say("done", trainer.global_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
