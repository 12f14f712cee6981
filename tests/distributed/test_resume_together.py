"""Which checkpoint a job goes on from: rank 0 says it, all ranks read it, and an error of one reaches all.

``/proc/self/cwd`` is another directory in each process, so ranks that go to directories of their own have the
disks of different machines: the same path, and not the same file behind it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint.load import load
from holdfast.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointNotFound, ConfigError

from .ranks import run_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
OWN = "/proc/self/cwd"


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Came(pl.Callback):
    """What a run went on from, seen before its first batch."""

    step = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.step = trainer.global_step


def fit(root: str | Path, ckpt_path: str | None, max_steps: int, strategy: str = "ddp", **more: Any) -> Came:
    came = Came()
    torch.manual_seed(0)
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", default_root_dir=root, logger=False, max_steps=max_steps,
        enable_progress_bar=False, enable_model_summary=False, **more,
        callbacks=[came, ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")],
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.arange(64.0).reshape(16, 4) / 64), 1)
    trainer.fit(Net(), data, ckpt_path=ckpt_path)
    return came


def saved(root: Path, max_steps: int) -> Path:
    """A run of one process that has saved after each step."""
    fit(root, None, max_steps, strategy="auto", devices=1)
    return root / "checkpoints" / f"step={max_steps}.ckpt"


def start_on_own_disk(root: Path, ckpt_path: str | None, differ: bool = False) -> tuple[int, str, str]:
    """On each rank, with a machine of its own: the step gone on from, or the error."""
    rank = int(os.environ["RANK"])
    os.chdir(root / str(rank))
    socket.gethostname = lambda: "abc"[rank]
    try:
        mine = None if differ and rank == 2 else ckpt_path
        return fit(OWN, mine, max_steps=5).step, "", ""
    except Exception as error:
        return -1, type(error).__name__, str(error)


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """Three machines' disks, each with checkpoints of steps 1, 2 and 3 of the same run."""
    newest = saved(tmp_path / "0", 3)
    for rank in "12":
        shutil.copytree(newest.parent, tmp_path / rank / "checkpoints", copy_function=shutil.copy2)
    return tmp_path


ABOUT = (
    "Every process reads the checkpoint itself: let default_root_dir or dirpath be on storage that all "
    "machines share, or copy rank 0's file to the same path on each."
)


def test_all_ranks_go_on_from_what_rank_0_finds(disks: Path) -> None:
    for rank in "12":
        os.unlink(disks / rank / "checkpoints" / "step=1.ckpt")  # nobody else looks for candidates
    assert run_ranks(start_on_own_disk, disks, "auto", ranks=3) == [(3, "", "")] * 3


@pytest.mark.parametrize("asked", ["auto", "last", f"{OWN}/checkpoints/step=3.ckpt"])
def test_a_rank_without_the_file_is_named_on_every_rank(disks: Path, asked: str) -> None:
    for rank in "12":
        os.unlink(disks / rank / "checkpoints" / "step=3.ckpt")
    told = run_ranks(start_on_own_disk, disks, asked, ranks=3)
    message = (
        f"ranks 1, 2 (hosts b, c) cannot read {OWN}/checkpoints/step=3.ckpt, which rank 0 (host a) reads: "
        f"there is no such file there. {ABOUT}"
    )
    assert told == [(-1, CheckpointNotFound.__name__, message)] * 3


def test_a_rank_with_another_file_of_that_name_is_named_on_every_rank(disks: Path) -> None:
    at = disks / "1" / "checkpoints"
    os.replace(at / "step=2.ckpt", at / "step=3.ckpt")
    told = run_ranks(start_on_own_disk, disks, "auto", ranks=3)
    mine, theirs = ((disks / rank / "checkpoints" / "step=3.ckpt").stat().st_size for rank in "10")
    sizes = f" ({mine:,} and {theirs:,} bytes)" if mine != theirs else ""
    message = (
        f"rank 1 (host b) has another file at {OWN}/checkpoints/step=3.ckpt than rank 0 (host a){sizes}, "
        f"and a run can go on from one only. {ABOUT}"
    )
    assert told == [(-1, CheckpointNotFound.__name__, message)] * 3


def damage(path: Path) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_what_one_rank_finds_damaged_all_pass_over(disks: Path) -> None:
    damage(disks / "2" / "checkpoints" / "step=3.ckpt")
    assert run_ranks(start_on_own_disk, disks, "auto", ranks=3) == [(2, "", "")] * 3


def test_damage_on_one_rank_is_an_error_on_all_where_the_file_was_named(disks: Path) -> None:
    path = disks / "2" / "checkpoints" / "step=3.ckpt"
    damage(path)
    told = run_ranks(start_on_own_disk, disks, f"{OWN}/checkpoints/step=3.ckpt", ranks=3)
    os.chdir(disks / "2")
    with pytest.raises(CheckpointCorrupt) as alone:
        load(f"{OWN}/checkpoints/step=3.ckpt")
    assert told == [(-1, CheckpointCorrupt.__name__, f"rank 2 (host c): {alone.value}")] * 3


def test_where_nothing_is_whole_on_all_ranks_nothing_begins_anew(disks: Path) -> None:
    for rank, step in ("03", "12", "21"):
        damage(disks / rank / "checkpoints" / f"step={step}.ckpt")
    told = run_ranks(start_on_own_disk, disks, "auto", ranks=3)
    assert {one[:2] for one in told} == {(-1, CheckpointIncomplete.__name__)}
    (message,) = {one[2] for one in told}
    assert message.startswith(
        'ckpt_path="auto": there are checkpoints, but not one is whole and verified, and starting from step 0 '
        "would bury them:\n"
    )
    for who in ("step=3.ckpt: step=3.ckpt", "step=2.ckpt: rank 1 (host b)", "step=1.ckpt: rank 2 (host c)"):
        assert f"{who}" in message


def test_ranks_that_were_given_something_and_nothing_agree_on_neither(disks: Path) -> None:
    told = run_ranks(start_on_own_disk, disks, "last.ckpt", True, ranks=3)
    message = (
        "ckpt_path= is not the same on all ranks: rank 0 (host a) was given 'last.ckpt', rank 2 (host c) None. "
        "os.path.exists() and the like can come out differently on each machine. Give all ranks the same, such "
        'as ckpt_path="auto" or "last", for which rank 0 looks and speaks for all.'
    )
    assert told == [(-1, ConfigError.__name__, message)] * 3


def start_with_own_path(root: Path) -> tuple[int, str]:
    step = int(os.environ["RANK"]) + 1
    return fit(root, str(root / "checkpoints" / f"step={step}.ckpt"), max_steps=5).step, os.environ["RANK"]


def test_of_different_paths_rank_0s_is_taken(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    assert run_ranks(start_with_own_path, tmp_path) == [(1, "0"), (1, "1")]


def start_without_any(root: Path) -> int:
    return fit(root, "last", max_steps=5).step


def test_where_there_is_nothing_all_start_afresh(tmp_path: Path) -> None:
    assert run_ranks(start_without_any, tmp_path) == [0, 0]
