"""Damaged checkpoints where a run looks for one: "auto" passes them over by name, a path never falls back."""

from __future__ import annotations

import builtins
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from tests.training.toys import Toy, rows, trainer


class Momentum(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two epochs with a checkpoint of each, in the current directory."""
    monkeypatch.chdir(tmp_path)
    saver = pl.callbacks.ModelCheckpoint(dirpath="saved", save_top_k=-1, filename="{epoch}")
    trainer(max_epochs=2, callbacks=[saver]).fit(Momentum(), rows())
    return tmp_path / "saved"


def resume(ckpt_path: Any) -> pl.Trainer:
    saver = pl.callbacks.ModelCheckpoint(dirpath="saved", save_top_k=-1, filename="{epoch}-again")
    resumed = trainer(max_epochs=3, callbacks=[saver])
    resumed.fit(Momentum(), rows(), ckpt_path=ckpt_path)
    return resumed


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)  # a file with two names is read-only
    path.write_bytes(data)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    overwrite(path, bytes(data))


def in_optimizer(path: Path) -> None:
    state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0]["momentum_buffer"]
    flip(path, path.read_bytes().index(state.numpy().tobytes()))


def in_header(path: Path) -> None:
    flip(path, path.read_bytes().index(b"archive/data/1") + 9)


def truncated(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-100])


def empty(path: Path) -> None:
    overwrite(path, b"")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone.ckpt")


DAMAGES: dict[str, tuple[Callable[[Path], None], str, type[Exception], str]] = {
    "optimizer state": (
        in_optimizer,
        r"epoch=1\.ckpt is corrupt: data/\d+ \(optimizer_states/0/state/0/momentum_buffer\) has checksum "
        r"\w+, the manifest says \w+\.\nNewest whole checkpoint in .*saved: epoch=0\.ckpt\. Check them all: holdfast verify .*saved",
        pl.CheckpointCorrupt,
        "",
    ),
    "header": (
        in_header,
        r"epoch=1\.ckpt is corrupt: the zip header of data/1 \(.*\) is not the one that was written\.\n"
        r"Newest whole checkpoint in .*saved: epoch=0\.ckpt\. Check them all: holdfast verify .*saved",
        pl.CheckpointCorrupt,
        "",
    ),
    "truncated": (
        truncated,
        r"epoch=1\.ckpt is not a whole checkpoint: it does not end with a zip directory\.\n"
        r"Newest whole checkpoint in .*saved: epoch=0\.ckpt\. Check them all: holdfast verify .*saved",
        pl.CheckpointIncomplete,
        r"it does not end with a zip directory",
    ),
    "empty": (
        empty,
        r"epoch=1\.ckpt is not a checkpoint: it is empty\.",
        pl.CheckpointIncomplete,
        r"it is not a checkpoint",
    ),
    "dangling link": (
        dangling,
        r"There is no checkpoint .*saved/epoch=1\.ckpt\. The nearest names there: epoch=1\.ckpt, epoch=0\.ckpt\.",
        pl.CheckpointNotFound,
        r"it is a link to a file that does not exist",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_auto_passes_it_over_by_name_and_reason(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message, _, listed = DAMAGES[name]
    damage(run / "epoch=1.ckpt")
    resumed = resume("auto")
    assert resumed.resumed_from == str(run / "epoch=0.ckpt")
    said = capsys.readouterr().err
    assert re.search(rf"passed over saved/epoch=1\.ckpt: {listed or message}$", said, re.MULTILINE), said
    assert resumed.global_step == 9


@pytest.mark.parametrize("name", DAMAGES)
def test_a_path_never_falls_back(name: str, run: Path) -> None:
    damage, message, error, _ = DAMAGES[name]
    damage(run / "epoch=1.ckpt")
    with pytest.raises(error) as refused:
        resume(run / "epoch=1.ckpt")
    assert re.fullmatch(message, str(refused.value)), str(refused.value)
    assert sorted(path.name for path in run.iterdir() if "again" in path.name) == []


def test_a_directory_of_that_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "epoch=2.ckpt").mkdir()
    assert resume("auto").resumed_from == str(run / "epoch=1.ckpt")
    with pytest.raises(pl.CheckpointIncomplete) as refused:
        resume(run / "epoch=2.ckpt")
    assert str(refused.value) == f"{run}/epoch=2.ckpt is a directory, not a checkpoint file."


@pytest.fixture
def locked(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The newest one may not be opened; a fault, since root may open anything."""
    path, plain = run / "epoch=1.ckpt", builtins.open

    def refusing(file: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and os.path.abspath(file) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return plain(file, *arguments, **named)

    monkeypatch.setattr(builtins, "open", refusing)
    return path


def test_no_permission(locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume("auto").resumed_from == str(locked.with_name("epoch=0.ckpt"))
    said = capsys.readouterr().err
    assert "passed over saved/epoch=1.ckpt: it cannot be read: Permission denied" in said
    with pytest.raises(pl.StorageError, match=r"epoch=1\.ckpt.*Permission denied"):
        resume(locked)


def test_a_disk_that_cannot_read_its_data(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad sector under a tensor, which the listing from the file's tail cannot see."""
    inode, read = (run / "epoch=1.ckpt").stat().st_ino, os.preadv

    def failing(fd: int, buffers: Any, at: int) -> int:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    assert resume("auto").resumed_from == str(run / "epoch=0.ckpt")
    assert re.search(r"passed over saved/epoch=1\.ckpt: .*Input/output error", capsys.readouterr().err)
    with pytest.raises(pl.StorageError, match=r"epoch=1\.ckpt.*Input/output error"):
        resume(run / "epoch=1.ckpt")
