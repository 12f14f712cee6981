"""Predictions reach the writer when it asked for them; their rows are in test_beside_lightning.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from holdfast.callbacks.prediction_writer import BasePredictionWriter
from holdfast.errors import ConfigError
from tests.training.toys import Toy, rows, trainer


class Predicts(Toy):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[1] if isinstance(batch, list) else batch


class Files(BasePredictionWriter):
    """The writer of everybody's example: one file a batch, one file for all."""

    def __init__(self, directory: Path, write_interval: Any) -> None:
        super().__init__(write_interval)
        self.directory = directory

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        torch.save((prediction, batch_indices), self.directory / f"{dataloader_idx}-{batch_idx}.pt")

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        torch.save((predictions, batch_indices), self.directory / "all.pt")


@pytest.mark.parametrize(
    ("interval", "names"),
    [
        ("batch", ["0-0.pt", "0-1.pt"]),
        ("epoch", ["all.pt"]),
        ("batch_and_epoch", ["0-0.pt", "0-1.pt", "all.pt"]),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_writes_when_it_said(interval: Any, names: list[str], keep: bool, tmp_path: Path) -> None:
    writer = Files(tmp_path, interval)
    run = trainer(callbacks=writer)
    data = rows(6, shuffle=True, generator=torch.Generator().manual_seed(1))
    returned = run.predict(Predicts(), data, return_predictions=keep)
    assert (returned is not None) is keep
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        predictions, indices = torch.load(tmp_path / name)
        if name == "all.pt":
            predictions, indices = torch.cat(predictions), [row for batch in indices[0] for row in batch]
        # The toy's rows carry their own number.
        assert predictions.tolist() == indices


@pytest.mark.parametrize(
    ("interval", "called"), [("epoch", "on_predict_batch_end"), ("batch", "on_predict_epoch_end")]
)
def test_a_hook_that_a_subclass_takes_is_called_whatever_is_written(
    interval: Any, called: str, tmp_path: Path
) -> None:
    calls: list[str] = []
    taking = type("Taking", (Files,), {called: lambda self, *args, **kwargs: calls.append(called)})
    trainer(callbacks=taking(tmp_path, interval)).predict(Predicts(), rows(6))
    assert calls == [called] * (2 if interval == "epoch" else 1)


def test_data_without_rows_has_no_indices(tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(4.0).view(4, 1))

    writer = Files(tmp_path, "batch_and_epoch")
    trainer(callbacks=writer).predict(Predicts(), DataLoader(Stream(), batch_size=2))
    assert torch.load(tmp_path / "0-0.pt")[1] == []


def test_the_method_that_is_missing_is_named() -> None:
    run = trainer(callbacks=BasePredictionWriter())
    with pytest.raises(NotImplementedError) as caught:
        run.predict(Predicts(), rows())
    assert str(caught.value) == ("BasePredictionWriter writes after each batch: define write_on_batch_end.")
    run = trainer(callbacks=BasePredictionWriter("epoch"))
    with pytest.raises(NotImplementedError) as caught:
        run.predict(Predicts(), rows())
    assert str(caught.value) == (
        "BasePredictionWriter writes after the last batch: define write_on_epoch_end."
    )


def test_another_interval_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        BasePredictionWriter("day")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "BasePredictionWriter(write_interval='day') must be one of 'batch', 'epoch', 'batch_and_epoch'."
    )
