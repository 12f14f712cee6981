"""Which rows each rank gets, from loaders of all kinds; and which loaders are left alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import holdfast as pl
from holdfast.callbacks import BasePredictionWriter, ModelCheckpoint
from holdfast.utilities.combined_loader import CombinedLoader

from .ranks import run_ranks


class Model(pl.LightningModule):
    """Keeps the rows of every batch, by the name of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def step(self, name: str, batch: Any) -> Any:
        self.seen[name].append(batch[0].view(-1).int().tolist())
        return self.layer(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step("predict", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0001)


def rows(count: int, batch_size: int | None = 4, first: int = 0, **more: Any) -> DataLoader[Any]:
    numbers = torch.arange(float(first), float(first + count)).view(-1, 1)
    return DataLoader(TensorDataset(numbers), batch_size=batch_size, **more)


def make_trainer(**more: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": bool(more.get("callbacks")), "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(**{"strategy": "ddp", "accelerator": "cpu", "max_epochs": 1, **quiet, **more})


def flat(lists: list[list[Any]]) -> list[Any]:
    return [one for inner in lists for one in inner]


def rank() -> int:
    return int(os.environ["RANK"])


def said(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a run returns, and what this rank was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(one.message) for one in caught]


# -- how many batches, and which rows ------------------------------------------------------------------------


def count(train: tuple[int, int, bool], **more: Any) -> Any:
    amount, batch_size, drop_last = train
    model, trainer = Model(), make_trainer(max_epochs=3, **more)
    trainer.fit(model, rows(amount, batch_size, drop_last=drop_last))
    return trainer.num_training_batches, trainer.estimated_stepping_batches, trainer.global_step


def counts() -> Any:
    return [
        count((20, 4, False)), count((20, 4, True)), count((20, 4, False), limit_train_batches=2),
        count((40, 4, False), limit_train_batches=0.5), count((20, 4, False), accumulate_grad_batches=2),
        count((20, 4, False), max_steps=5), count((20, 2, False), overfit_batches=3),
    ]  # fmt: skip


def test_the_number_of_batches_and_steps_is_that_of_global_batches() -> None:
    for found in run_ranks(counts):
        assert found == [(3, 9, 9), (2, 6, 6), (2, 6, 6), (2, 6, 6), (3, 6, 6), (3, 5, 5), (3, 9, 9)]


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.of_batches: list[Any] = []
        self.of_epoch: Any = None

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any
    ) -> None:
        self.of_batches.append(list(indices))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.of_epoch = indices


def evaluate() -> Any:
    torch.manual_seed(3 + rank())  # the order is rank 0's all the same
    model, writer = Model(), Writer()
    trainer = make_trainer(limit_val_batches=1, callbacks=[writer], max_epochs=2)
    trainer.fit(model, rows(8), rows(11, shuffle=True))
    trainer.test(model, rows(11, 3))
    trainer.predict(model, rows(11, 3, first=100, shuffle=True, drop_last=True))
    return model.seen, writer.of_batches, writer.of_epoch


def test_validation_test_and_prediction_are_split_too() -> None:
    first, second = run_ranks(evaluate)
    assert (first[0]["test"], second[0]["test"]) == ([[0, 1, 2], [6, 7]], [[3, 4, 5], [8, 9, 10]])
    for index in (0, 1):  # validation runs, limited to one global batch
        one, other = first[0]["val"][index], second[0]["val"][index]
        assert (len(one), len(other), len({*one, *other})) == (4, 4, 8)
    assert first[0]["val"][0] + second[0]["val"][0] != first[0]["val"][1] + second[0]["val"][1]
    assert sorted(flat(first[0]["predict"] + second[0]["predict"])) == list(range(100, 111))
    for seen, of_batches, of_epoch in (first, second):
        # The dataset's rows, which are those that this rank has predicted.
        assert [[100 + row for row in one] for one in of_batches] == seen["predict"]
        assert of_epoch == [of_batches]


def few() -> Any:
    model = Model()

    def run() -> None:
        make_trainer(max_epochs=2).fit(model, rows(9, 2))

    return model.seen["train"], said(run)[1]


def test_where_a_rank_would_have_no_row_it_has_anothers_and_that_is_said_once() -> None:
    found = run_ranks(few, ranks=4)
    assert [seen for seen, _ in found] == [[[2 * r, 2 * r + 1], [8]] * 2 for r in range(4)]
    assert [lines for _, lines in found] == [
        [
            "train_dataloader: of its 9 rows, 1 row is left for the last step of 4 ranks, and each rank needs "
            "one. So some ranks have the same. Leave them out with drop_last=True, or by limiting the batches."
        ],
        [], [], [],
    ]  # fmt: skip


# -- reloaded, combined, and loaders that are left alone -----------------------------------------------------


class Reloading(Model):
    def train_dataloader(self) -> Any:
        return rows(8 + 4 * self.current_epoch, 2, shuffle=True)


def reload(place: str, resume: bool) -> Any:
    torch.manual_seed(5)
    model = Reloading()
    saving = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=-1,
                             auto_insert_metric_name=False)  # fmt: skip
    trainer = make_trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3, callbacks=[saving])
    trainer.fit(model, ckpt_path=f"{place}/4.ckpt" if resume else None)
    return model.seen["train"]


def test_loaders_that_are_asked_for_anew_are_split_anew_and_resumed(tmp_path: Path) -> None:
    whole = run_ranks(reload, str(tmp_path), False)
    assert [len(seen) for seen in whole] == [2 + 3 + 4] * 2
    for epoch, (begin, end) in enumerate([(0, 2), (2, 5), (5, 9)]):
        assert sorted(flat(whole[0][begin:end] + whole[1][begin:end])) == list(range(8 + 4 * epoch))
    assert run_ranks(reload, str(tmp_path), True) == [seen[4:] for seen in whole]


class Combining(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen["train"].append([None if one is None else one[0].view(-1).int().tolist() for one in batch])
        return self.layer(batch[0][0]).square().mean()


def combine() -> Any:
    found = {}
    for mode in ("min_size", "max_size", "max_size_cycle"):
        model = Combining()
        make_trainer().fit(model, CombinedLoader([rows(12, 2), rows(6, 2, first=50)], mode))
        found[mode] = model.seen["train"]
    return found


def test_each_of_several_loaders_is_split() -> None:
    first, second = run_ranks(combine)
    short = [[[0, 1], [50, 51]], [[4, 5], [54]]]
    assert first == {
        "min_size": short,
        "max_size": [*short, [[8, 9], None]],
        "max_size_cycle": [*short, [[8, 9], [50, 51]]],
    }
    short = [[[2, 3], [52, 53]], [[6, 7], [55]]]
    assert second == {
        "min_size": short,
        "max_size": [*short, [[10, 11], None]],
        "max_size_cycle": [*short, [[10, 11], [52, 53]]],
    }


class Counting(DistributedSampler[Any]):
    epochs: list[int]

    def set_epoch(self, epoch: int) -> None:
        self.epochs = [*getattr(self, "epochs", []), epoch]
        super().set_epoch(epoch)


def own_sampler(place: str, batch_size: int, step: int | None) -> Any:
    loader = rows(24, batch_size)
    sampler = Counting(loader.dataset, int(os.environ["WORLD_SIZE"]), rank(), seed=4)
    loader = rows(24, batch_size, sampler=sampler)
    model = Model()
    saving = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=-1,
                             auto_insert_metric_name=False)  # fmt: skip
    trainer = make_trainer(callbacks=[saving], max_epochs=2)
    trainer.fit(model, loader, ckpt_path=None if step is None else f"{place}/{step}.ckpt")
    sampler.epoch = 0
    return model.seen["train"], list(sampler), sampler.epochs, trainer.num_training_batches


def test_a_distributed_sampler_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    whole = run_ranks(own_sampler, str(tmp_path), 4, None)
    for seen, order, epochs, batches in whole:
        assert flat(seen[:3]) == order and flat(seen[3:]) != order
        assert (epochs, batches) == ([0, 1], 3)
    # Its global batches are the same on four ranks, too, and the epoch goes on at the same one.
    rest = run_ranks(own_sampler, str(tmp_path), 2, 2, ranks=4)
    for index in range(4):
        then = flat([one[0][2 + index] for one in whole])
        now = flat([one[0][index] for one in rest])
        assert sorted(then) == sorted(now)


def alone() -> Any:
    torch.manual_seed(8)
    model = Model()
    trainer = make_trainer(use_distributed_sampler=False)
    trainer.fit(model, rows(8, first=10 * rank(), shuffle=True), rows(8))
    return model.seen, trainer.num_training_batches


def test_without_a_distributed_sampler_each_rank_has_its_own_loader() -> None:
    for index, (seen, batches) in enumerate(run_ranks(alone)):
        assert batches == 2
        assert sorted(flat(seen["train"])) == list(range(10 * index, 10 * index + 8))
        assert seen["val"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class Numbers(IterableDataset[Any]):
    def __init__(self, splits: bool) -> None:
        self.splits = splits

    def __iter__(self) -> Iterator[Any]:
        first, step = (rank(), int(os.environ["WORLD_SIZE"])) if self.splits else (0, 1)
        for number in range(first, 16, step):
            yield torch.tensor([float(number)])


class Tupled(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step("train", [batch])


def iterate(splits: bool, **more: Any) -> Any:
    model = Tupled()

    def run() -> None:
        make_trainer(max_epochs=2, **more).fit(model, DataLoader(Numbers(splits), batch_size=4))

    return model.seen["train"], said(run)[1]


def test_iterables_are_left_alone_and_said_once_where_every_rank_reads_the_same() -> None:
    (one, lines), (other, more) = run_ranks(iterate, False)
    assert one == other == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]] * 2
    assert lines == [
        "train_dataloader: the first batch of DataLoader over Numbers is the same on all 2 ranks. Only "
        "map-style datasets are split among them. Let this one give each rank other rows, by "
        "torch.distributed.get_rank() and get_world_size()."
    ]
    assert more == []
    (one, lines), (other, more) = run_ranks(iterate, True)
    assert one == [[0, 2, 4, 6], [8, 10, 12, 14]] * 2 and other == [[1, 3, 5, 7], [9, 11, 13, 15]] * 2
    assert (lines, more) == ([], [])


# -- ranks whose data differ ---------------------------------------------------------------------------------


def differing(**more: Any) -> Any:
    try:
        make_trainer(**more).fit(Model(), rows(16 + 4 * rank(), 2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_ranks_that_would_split_different_data_are_told_so() -> None:
    found = run_ranks(differing)
    assert found[0] is not None
    assert found[1] == (
        "ConfigError: train_dataloader: rank 1 has 20 rows in batches of 4, and rank 0 has 16 in batches of 4, "
        "counted over all ranks. They share one order of rows, so every rank needs the whole dataset and the "
        "same batch size. For a dataset that is split already, set Trainer(use_distributed_sampler=False)."
    )


def differing_alone() -> Any:
    return differing(use_distributed_sampler=False)


def limited_alone() -> Any:
    return differing(use_distributed_sampler=False, limit_train_batches=8)


def test_ranks_with_another_number_of_batches_are_told_so_before_one_waits_for_ever() -> None:
    found = run_ranks(differing_alone)
    assert found[0] is not None
    assert found[1] == (
        "ConfigError: train_dataloader: rank 1 has 10 batches, and rank 0 has 8. Each step needs a batch on "
        "every rank: give every rank as many, or set Trainer(limit_train_batches=...) to the smallest number."
    )
    assert run_ranks(limited_alone) == [None, None]


class Keeping(Dataset[Any]):
    """A map-style dataset with a state, for which torchdata's loader keeps it."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return torch.tensor([float(index)])

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


def stateful(place: str, step: int | None) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    model = Tupled()
    saving = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=-1,
                             auto_insert_metric_name=False)  # fmt: skip

    def run() -> None:
        make_trainer(callbacks=[saving]).fit(
            model,
            StatefulDataLoader(Keeping(), batch_size=2),
            ckpt_path=None if step is None else f"{place}/{step}.ckpt",
        )

    return model.seen["train"], [line for line in said(run)[1] if "dataloader" in line or "StatefulD" in line]


def test_a_loader_with_a_state_of_its_dataset_is_left_alone(tmp_path: Path) -> None:
    (one, lines), (other, _) = run_ranks(stateful, str(tmp_path), None)
    assert one == other == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert lines == [
        "train_dataloader: the first batch of StatefulDataLoader over Keeping is the same on all 2 ranks. Only "
        "map-style datasets are split among them. Let this one give each rank other rows, by "
        "torch.distributed.get_rank() and get_world_size()."
    ]
    # A rank that there was not has no state of it, and reads up to the position again.
    found = run_ranks(stateful, str(tmp_path), 1, ranks=3)
    assert [seen for seen, _ in found[:2]] == [[[2, 3], [4, 5], [6, 7]]] * 2
    assert found[2][1] == [
        "The checkpoint is of a job with fewer processes, and holds no state of this one's StatefulDataLoader "
        "over Keeping. So it is read again from the start of the epoch: rows may come twice or be left out."
    ]


def iterate_alone() -> Any:
    return iterate(False, use_distributed_sampler=False)


def test_nothing_is_said_of_the_data_of_somebody_who_splits_it_himself() -> None:
    assert [lines for _, lines in run_ranks(iterate_alone)] == [[], []]
