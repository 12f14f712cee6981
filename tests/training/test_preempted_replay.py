"""Told to stop while data is read again, a run leaves without reading the rest."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from holdfast import LightningModule, Trainer
from holdfast.callbacks import ModelCheckpoint


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


rows_read: list[int] = []


class Stream(IterableDataset[torch.Tensor]):
    """Eight rows; the signal comes while row ``signal_at`` is read."""

    def __init__(self, signal_at: int | None = None, number: int = signal.SIGTERM) -> None:
        self.signal_at, self.number = signal_at, number

    def __iter__(self) -> Iterator[torch.Tensor]:
        for row in range(8):
            rows_read.append(row)
            if row == self.signal_at:
                signal.raise_signal(self.number)
            yield torch.full((2,), float(row))


def fit(root: Path, data: Stream) -> None:
    rows_read.clear()
    run = Trainer(
        max_epochs=1,
        callbacks=[ModelCheckpoint(root, every_n_train_steps=1)],
        logger=False,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Regression(), DataLoader(data, batch_size=1), ckpt_path="auto")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_leaves_at_once(tmp_path: Path, number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Stream(signal_at=6))
    before = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert "stopped.ckpt" in before
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, Stream(signal_at=2, number=number))
    assert caught.value.code == code
    assert rows_read == [0, 1, 2], "of the seven rows before the position"
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == before
    assert capfd.readouterr().err.splitlines()[-1] == (
        "nothing is saved: nothing was trained since stopped.ckpt"
    )
    fit(tmp_path, Stream())
    assert rows_read == list(range(8))
