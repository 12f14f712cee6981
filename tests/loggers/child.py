"""The training that test_killed kills: the same command starts it and starts it again.

    python child.py ROOT [STEP]

With STEP it kills itself with SIGKILL when that step's hooks have run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.loggers import CSVLogger, TensorBoardLogger

BATCHES = 6
EPOCHS = 4
SAVE_EVERY_N_STEPS = 5
FLUSH_EVERY_N_ROWS = 2  # so a kill finds rows in the file that no checkpoint counts on


class Net(pl.LightningModule):
    def __init__(self, kill_at: int, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="kill_at")
        self.kill_at = kill_at
        self.layer = nn.Linear(3, width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # By batch, it has an axis of its own; by epoch, its step may be the next training step's.
        self.log("val", self.layer(batch[0]).mean(), on_step=True, on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        board = self.trainer.loggers[0]
        board.log_metrics({"bounds": {"low": -step, "high": step}}, step=step)
        board.experiment.add_scalar("own", step, step // 2)
        if step == self.kill_at:
            # Whatever the writer's thread has not written yet is lost, or half of it is there.
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(root: Path, kill_at: int) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(5)
    rows = TensorDataset(torch.randn(4 * BATCHES, 3))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        default_root_dir=root,
        logger=[TensorBoardLogger(root), CSVLogger(root, flush_logs_every_n_steps=FLUSH_EVERY_N_ROWS)],
        log_every_n_steps=1,
        val_check_interval=5,
        callbacks=[ModelCheckpoint(every_n_train_steps=SAVE_EVERY_N_STEPS)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Net(kill_at), DataLoader(rows, batch_size=4, shuffle=True), DataLoader(rows, 12), ckpt_path="auto"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1)
