"""N ranks that go on from a file hold the optimizer's state N times, in use, and no further copy of anything."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint import tensors

from .ranks import run_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

MIB = 1 << 20
WEIGHTS_BYTES = 8 * 2048 * 512 * 4
OPTIMIZER_BYTES = 2 * WEIGHTS_BYTES
SLACK_BYTES = 24 * MIB  # less than one copy of the weights


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.ModuleList(torch.nn.Linear(512, 2048, bias=False) for _ in range(8))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return sum(part.weight.mean() for part in self.net) * batch[0].mean()  # type: ignore[return-value]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def private_bytes() -> int:
    """What this process alone has in memory; pages of a file that it has mapped are not."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


class Memory(pl.Callback):
    """What loading takes over what was there before it."""

    def __init__(self) -> None:
        self.read = self.restored = self.highest = 0
        self._before = private_bytes()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.wait(0.001):
            self.highest = max(self.highest, private_bytes() - self._before)

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        self.read = private_bytes() - self._before

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.restored = private_bytes() - self._before
        self._ends.set()
        self._thread.join()


def train(root: Path, max_steps: int, *callbacks: Any, **more: Any) -> None:
    trainer = pl.Trainer(
        strategy="ddp", accelerator="cpu", max_epochs=1, max_steps=max_steps, default_root_dir=root, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **more,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(64, 1)), 1), ckpt_path="auto")


def save(root: Path) -> None:
    train(root, 1, ModelCheckpoint(every_n_train_steps=1))


def resume(root: Path) -> tuple[int, int, int]:
    weight = torch.nn.Parameter(torch.ones(1))  # torch imports much of itself at an optimizer's first step
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    memory = Memory()
    train(root, 2, memory, ModelCheckpoint(every_n_train_steps=100))
    return memory.read, memory.restored, memory.highest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("state")
    run_ranks(save, place, ranks=2)
    return place


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loading_takes_the_live_state_and_nothing_more(root: Path, ranks: int) -> None:
    for read, restored, highest in run_ranks(resume, root, ranks=ranks):
        # The module that fit is given is made after the measuring began.
        live = WEIGHTS_BYTES + OPTIMIZER_BYTES
        assert OPTIMIZER_BYTES <= read <= live + SLACK_BYTES
        assert live - SLACK_BYTES <= restored <= live + SLACK_BYTES
        # When it wraps a module torch broadcasts its weights, in a buffer of up to 250 MiB; a fresh run has it too.
        own = 0 if ranks == 1 else WEIGHTS_BYTES
        assert highest <= live + own + SLACK_BYTES


class Devices(pl.Callback):
    found: set[str]

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        self.found = {one.device.type for one in checkpoint["state_dict"].values()}
        (states,) = checkpoint["optimizer_states"]
        self.found |= {one.device.type for state in states["state"].values() for one in state.values()}


def say_from_a_gpu(path: Path) -> None:
    payload = torch.load(path, weights_only=True)
    torch.serialization.location_tag = lambda storage: "cuda:0"
    os.unlink(path)
    torch.save(payload, path)


def resume_and_tell(root: Path) -> set[str]:
    def refuse(storage: Any, location: str) -> None:
        raise AssertionError(f"asked for {location}")

    tensors._saved_or_cpu = refuse
    devices = Devices()
    train(root, 2, devices, ModelCheckpoint(every_n_train_steps=100))
    return devices.found


def test_no_rank_asks_for_the_device_that_rank_0_saved_from(tmp_path: Path) -> None:
    """Tensors come to the CPU, and from there to each rank's own device; else all would meet on rank 0's."""
    run_ranks(save, tmp_path, ranks=1)
    (path,) = (tmp_path / "checkpoints").iterdir()
    run_ranks(say_from_a_gpu, path, ranks=1)
    assert b"cuda:0" in path.read_bytes()
    assert run_ranks(resume_and_tell, tmp_path, ranks=2) == [{"cpu"}, {"cpu"}]
