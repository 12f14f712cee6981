"""validate, test and predict in several processes: what one process finds, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import BasePredictionWriter

from .ranks import run_ranks, start_ranks


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, 2.0)
        torch.nn.init.constant_(self.layer.bias, 1.0)

    def forward(self, batch: Any) -> Any:
        return self.layer(batch[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self(batch).mean(), sync_dist=True)
        self.log("most", self(batch).max(), reduce_fx="max", sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self(batch).pow(2).mean(), sync_dist=True)


def loader(rows: int, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    data = torch.arange(float(rows)).unsqueeze(1)
    return DataLoader(TensorDataset(data), batch_size=batch_size, shuffle=shuffle)


def make_trainer(**arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, **arguments,
    )  # fmt: skip


def evaluate(rows: int, batch_size: int, **arguments: Any) -> Any:
    model, trainer = Net(), make_trainer(**arguments)
    several = [loader(rows, batch_size), loader(rows + 1, batch_size)]
    found = [*trainer.validate(model, several), *trainer.test(model, loader(rows, batch_size))]
    return [{name: round(value, 3) for name, value in one.items()} for one in found]


def evaluate_together(rows: int) -> Any:
    return evaluate(rows, 2, strategy="ddp")


@pytest.mark.parametrize("ranks, rows", [(2, 13), (3, 16), (4, 9)])
def test_uneven_data_gives_what_one_process_finds_said_once_on_every_rank(
    capsys: pytest.CaptureFixture[str], ranks: int, rows: int
) -> None:
    alone = evaluate(rows, 2 * ranks)
    told = capsys.readouterr().out
    ended = start_ranks(evaluate_together, rows, ranks=ranks).wait()
    assert [one.error for one in ended] == [""] * ranks
    assert [one.value for one in ended] == [alone] * ranks
    lines = [line for line in ended[0].output.splitlines() if line.startswith(("validate", "test"))]
    assert lines == told.splitlines()
    assert not any("validate" in one.output for one in ended[1:])


class Writes(BasePredictionWriter):
    def __init__(self, interval: Any) -> None:
        super().__init__(interval)
        self.batches: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *rest: Any
    ) -> None:
        self.batches.append((list(batch_indices), prediction.flatten().tolist()))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = (
            [list(rows) for rows in batch_indices[0]],
            [one.flatten().tolist() for one in predictions],
        )


def predict(shuffle: bool, keep: bool) -> Any:
    writer, trainer = Writes("batch_and_epoch"), make_trainer(strategy="ddp")
    trainer.callbacks.append(writer)
    found = trainer.predict(Net(), loader(11, 2, shuffle), return_predictions=keep)
    returned = None if found is None else [one.flatten().tolist() for one in found]
    return returned, writer.batches, writer.epoch


@pytest.mark.parametrize("shuffle, keep", [(False, True), (True, False)])
def test_a_writer_gets_the_rows_of_the_dataset_and_each_once(shuffle: bool, keep: bool) -> None:
    ranks = run_ranks(predict, shuffle, keep)
    rows: list[int] = []
    for returned, batches, epoch in ranks:
        assert all(values == [2.0 * row + 1 for row in indices] for indices, values in batches)
        assert epoch == ([indices for indices, _ in batches], [values for _, values in batches])
        assert returned == (epoch[1] if keep else None)
        rows += [row for indices, _ in batches for row in indices]
    assert sorted(rows) == list(range(11))
    if not shuffle:
        assert [indices for indices, _ in ranks[1][1]] == [[2, 3], [6, 7], [9, 10]]


def with_own_loop(path: str) -> Any:
    trainer = make_trainer(strategy="ddp")
    predictions = trainer.predict(Net(), loader(10, 2))
    assert predictions is not None
    torch.save(torch.cat(predictions), f"{path}/predictions_{trainer.global_rank}.pt")
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        parts = [torch.load(f"{path}/predictions_{rank}.pt") for rank in range(trainer.world_size)]
        return torch.cat(parts).flatten().sort().values.tolist()
    return None


def test_predictions_saved_by_each_rank_are_all_of_them(tmp_path: Path) -> None:
    first, second = run_ranks(with_own_loop, str(tmp_path))
    assert first == [2.0 * row + 1 for row in range(10)]
    assert second is None
