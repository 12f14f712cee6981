"""A script that starts its own ranks: stopped with a signal, started again, and saving after the fit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
import torch
import holdfast as pl
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()
    def on_train_batch_end(self, *args):
        if self.trainer.global_rank == 0 and self.trainer.progress.total_batches == 3 and "wait" in sys.argv:
            print("here", flush=True)
            sys.stdin.readline()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    pl.seed_everything(1)
    data = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=2)
    trainer = pl.Trainer(strategy="ddp", devices=2, accelerator="cpu", max_epochs=1, logger=False,
                         enable_progress_bar=False, enable_model_summary=False)
    model = Model()
    trainer.fit(model, data, ckpt_path="auto")
    trainer.save_checkpoint("final.ckpt")
    print("after", trainer.global_rank, model.layer.weight.sum().item())
"""


def test_a_signal_to_the_script_stops_all_and_it_goes_on_and_saves_after_the_fit(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    whole = tmp_path / "whole"
    whole.mkdir()
    run = subprocess.run(
        command, cwd=whole, env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    cut = tmp_path / "cut"
    cut.mkdir()
    job = subprocess.Popen(
        [*command, "wait"], cwd=cut, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "here\n"
    job.send_signal(signal.SIGINT)  # as Ctrl-C does, to rank 0 alone
    _, said = job.communicate("\n", timeout=120)
    assert job.returncode == 130, said
    assert len(re.findall("(?m)^SIGINT: saving", said)) == 1
    assert [one.name for one in cut.rglob("*.ckpt")] == ["stopped.ckpt"]
    again = subprocess.run(
        command, cwd=cut, env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert re.findall("(?m)^after.*$", again.stdout) == re.findall("(?m)^after.*$", run.stdout)
    assert again.stdout.count("after 0") == 1 and "after 1" not in again.stdout
    final = torch.load(cut / "final.ckpt", weights_only=True)
    assert final["global_step"] == 16
