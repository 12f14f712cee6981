"""LightningDataModule: made from datasets, printed, and asked for its loaders by the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from tests.training.toys import Toy, rows, trainer


class Numbers(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)), index


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Numbers(3)[index] for index in range(3))


class Sized(pl.LightningDataModule):
    def __init__(self, width: int, batch_size: int = 9, **others: Any) -> None:
        super().__init__()
        self.given = (width, batch_size, others)


def test_from_datasets() -> None:
    made = pl.LightningDataModule.from_datasets(
        Numbers(6), [Numbers(4), Endless()], Endless(), Numbers(2), batch_size=2
    )
    train = made.train_dataloader()
    first, second = made.val_dataloader()
    assert (type(train.sampler), train.batch_size) == (RandomSampler, 2)
    assert type(first.sampler) is SequentialSampler
    assert len(list(second)) == len(list(made.test_dataloader())) == 2
    assert type(made.predict_dataloader().sampler) is SequentialSampler
    named = pl.LightningDataModule.from_datasets({"a": Numbers(2), "b": Numbers(3)})
    assert {name: len(loader) for name, loader in named.train_dataloader().items()} == {"a": 2, "b": 3}


def test_from_datasets_hands_its_arguments_on() -> None:
    assert Sized.from_datasets(Numbers(3), width=5, batch_size=4).given == (5, 4, {"num_workers": 0})


def test_training_on_one_that_was_made_of_datasets() -> None:
    model = Toy()
    made = pl.LightningDataModule.from_datasets(Numbers(6), batch_size=2)
    trainer(max_epochs=2).fit(model, datamodule=made)
    assert sorted(model.seen[:6]) == sorted(model.seen[6:]) == list(range(6))


def test_printed() -> None:
    class Late(pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.data = Numbers(5)

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, batch_size=2)

        def val_dataloader(self) -> Any:
            return {"a": DataLoader(Numbers(4)), "b": DataLoader(Endless())}

    late = Late()
    assert str(late) == (
        "Late\n"
        "  train    not ready: AttributeError: 'Late' object has no attribute 'data'\n"
        "  val      4 rows in 4 batches; unknown length"
    )
    late.setup("fit")
    assert str(late).splitlines()[1] == "  train    5 rows in 3 batches"
    assert str(pl.LightningDataModule()) == "LightningDataModule"


class Traced(pl.LightningDataModule):
    """Keeps what it was asked, and with which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.restored: Any = None

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self) -> Any:
        self.calls.append(f"train in epoch {self.trainer.current_epoch}")  # type: ignore[union-attr]
        return {"a": rows(4), "b": rows(8)}

    def predict_dataloader(self) -> Any:
        return [rows(4), rows(8)]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"batch of {dataloader_idx}")
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict


class OnPairs(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["a"]) + self.loss(batch["b"])

    def predict_step(self, batch: Any) -> Any:
        return len(batch[1])


def test_in_a_run(tmp_path: Path) -> None:
    data, model = Traced(), OnPairs()
    run = trainer(callbacks=ModelCheckpoint(tmp_path, filename="end"))
    run.fit(model, datamodule=data)
    assert data.calls == [
        "prepare", "setup fit", "train in epoch 0", "batch of 0", "batch of 0", "teardown fit",
    ]  # fmt: skip
    assert data.prepare_data_per_node
    assert run.predict(model, datamodule=data) == [[4], [4, 4]]
    assert data.calls[6:] == [
        "prepare",
        "setup predict",
        *["batch of 0"],
        *["batch of 1"] * 2,
        "teardown predict",
    ]
    again = Traced()
    saving = ModelCheckpoint(tmp_path / "again")
    trainer(max_epochs=2, callbacks=saving).fit(OnPairs(), datamodule=again, ckpt_path=tmp_path / "end.ckpt")
    assert again.restored == {"calls": 5}
