"""What a job that goes on with another number of ranks says of its batches: all ranks count together."""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.callbacks import ModelCheckpoint
from tests.training.toys import Toy, rows, trainer

from .ranks import start_ranks


def train(place: str, batch_size: int, steps: int, ckpt_path: str | None) -> None:
    saves = ModelCheckpoint(place, "{step}", every_n_train_steps=1, save_top_k=-1)
    one = trainer(accelerator="cpu", strategy="ddp", max_steps=steps, callbacks=saves)
    one.fit(Toy(), rows(96, batch_size=batch_size), ckpt_path=ckpt_path)


def said(place: Path, batch_size: int, *, ranks: int, steps: int) -> list[str]:
    """What is said of the batches by a job that goes on from where the one before ended, for one step."""
    path = os.path.join(place, f"step={steps - 1}.ckpt") if steps > 1 else None
    ended = start_ranks(train, str(place), batch_size, steps, path, ranks=ranks).wait()
    assert [one.error for one in ended] == [""] * ranks
    lines = [line.strip() for one in ended for line in one.output.splitlines()]
    return [line for line in lines if "batch size" in line]


def test_only_the_global_batch_size_is_a_difference(tmp_path: Path) -> None:
    assert said(tmp_path, 4, ranks=2, steps=1) == []
    assert said(tmp_path, 8, ranks=1, steps=2) == []
    assert said(tmp_path, 4, ranks=2, steps=3) == []
    assert said(tmp_path, 2, ranks=2, steps=4) == [
        "batch size of the training data: 8 -> 4 (the epoch goes on at the same row)",
        "the batch size was 8 and is 4 (2 on each of 2 ranks): the epoch goes on at row 24, batch 6",
    ]
