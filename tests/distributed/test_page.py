"""A script by the page on saving and loading weights, its part on several processes: as people start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import os
import torch
import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.utilities import rank_zero_only
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).pow(2).mean(), sync_dist=True)

    def on_train_epoch_end(self):
        self.trainer.save_checkpoint("inside.ckpt")
        self.trainer.strategy.barrier()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def say(text):
    os.write(1, f"{text}\\n".encode())  # in one piece, whoever else writes


@rank_zero_only
def tell(text):
    say(text)


if __name__ == "__main__":
    pl.seed_everything(1)
    data = DataLoader(TensorDataset(torch.arange(8.0).unsqueeze(1)), batch_size=2)
    best = ModelCheckpoint(monitor="val_loss")
    trainer = pl.Trainer(accelerator="cpu", strategy="ddp", devices=2, max_epochs=2, callbacks=[best],
                         enable_progress_bar=False, enable_model_summary=False)
    model = Model(width=4)
    trainer.fit(model, data, data)
    say(f"after fit: rank {trainer.global_rank}")

    trainer.save_checkpoint("example.ckpt")
    trainer.strategy.barrier()
    new_model = Model.load_from_checkpoint(checkpoint_path="example.ckpt")
    assert torch.equal(new_model.layer.weight, model.layer.weight) and new_model.hparams.width == 4
    best_model = Model.load_from_checkpoint(best.best_model_path)
    tell(f"best is {best.best_model_path}")
    say(f"the end: rank {trainer.global_rank}")
"""


def run_script(place: Path, command: list[str]) -> tuple[list[str], str]:
    (place / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *command, "train.py"], cwd=place, env=environment, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr


def check(place: Path, lines: list[str], told: str) -> None:
    (path,) = [line.removeprefix("best is ") for line in lines if line.startswith("best is ")]
    checkpoints = place / "lightning_logs" / "version_0" / "checkpoints"
    assert Path(path).parent == checkpoints
    assert [found.name for found in checkpoints.iterdir()] == ["epoch=1-step=4.ckpt"]
    assert told.count("saved epoch=") == 2
    assert [found.name for found in (place / "lightning_logs").iterdir()] == ["version_0"]
    for name in ("inside.ckpt", "example.ckpt", path):
        assert torch.load(place / name, weights_only=True)["global_step"] == 4
    assert not [found.name for found in place.rglob("*") if "tmp" in found.name]


def test_python_runs_what_follows_fit_once(tmp_path: Path) -> None:
    lines, told = run_script(tmp_path, [])
    assert [line for line in lines if "rank" in line] == ["after fit: rank 0", "the end: rank 0"]
    check(tmp_path, lines, told)


def test_torchrun_runs_all_of_it_on_every_rank(tmp_path: Path) -> None:
    lines, told = run_script(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    ranks = sorted(line for line in lines if "rank" in line)
    assert ranks == ["after fit: rank 0", "after fit: rank 1", "the end: rank 0", "the end: rank 1"]
    check(tmp_path, lines, told)
