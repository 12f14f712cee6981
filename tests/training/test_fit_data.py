"""A fit's loaders: reloaded every n epochs, not shuffled under overfit_batches, and exact after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.training.sources import in_order
from holdfast.utilities.combined_loader import CombinedLoader
from tests.training.toys import Toy, rows, trainer


class Reloading(Toy):
    """Makes a loader over randomly chosen rows, of a size that depends on the epoch; keeps when it was asked."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.asked: list[str] = []
        self.loaders: list[DataLoader[Any]] = []

    def some_rows(self, kind: str) -> DataLoader[Any]:
        self.asked.append(f"{kind} {self.trainer.current_epoch}")
        chosen = torch.randperm(40)[: 6 + self.trainer.current_epoch]
        data = TensorDataset(torch.rand(len(chosen), 3), chosen)
        loader = DataLoader(
            data, batch_size=2, shuffle=True, num_workers=self.workers, persistent_workers=self.workers > 0
        )
        self.loaders.append(loader)
        return loader

    def train_dataloader(self) -> Any:
        return self.some_rows("train")

    def val_dataloader(self) -> Any:
        return self.some_rows("val")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen += (-batch[1]).tolist()


def train(directory: Path | None = None, ckpt_path: Any = None, **arguments: Any) -> Reloading:
    torch.manual_seed(9)
    workers = arguments.pop("workers", 0)
    directory = ckpt_path.parent / "resumed" if directory is None else directory
    saving = ModelCheckpoint(
        directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    model = Reloading(workers)
    trainer(**{"callbacks": saving, "max_epochs": 5, **arguments}).fit(model, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize(
    ("every", "check", "sanity", "train_epochs", "val_epochs"),
    [
        (0, 1, 1, [0], [0]),
        (1, 1, 0, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (2, 1, 1, [0, 2, 4], [0, 2, 4]),
        (3, 1, 1, [0, 3], [0, 3]),
        (1, 2, 0, [0, 1, 2, 3, 4], [1, 3]),
        (2, 2, 1, [0, 2, 4], [0, 1, 3]),
    ],
)
def test_the_epochs_in_which_loaders_are_asked_for(
    tmp_path: Path, every: int, check: int, sanity: int, train_epochs: list[int], val_epochs: list[int]
) -> None:
    """As Lightning does it: what the sanity check had is dropped unless validation follows in epoch 0."""
    model = train(
        tmp_path,
        reload_dataloaders_every_n_epochs=every,
        check_val_every_n_epoch=check,
        num_sanity_val_steps=sanity,
    )
    assert [asked for asked in model.asked if asked[0] == "t"] == [f"train {n}" for n in train_epochs]
    assert [asked for asked in model.asked if asked[0] == "v"] == [f"val {n}" for n in val_epochs]


def test_an_epoch_has_as_many_batches_as_its_loader(tmp_path: Path) -> None:
    counts = []

    class Counting(Reloading):
        def on_train_epoch_start(self) -> None:
            counts.append(self.trainer.num_training_batches)

    run = trainer(max_epochs=4, reload_dataloaders_every_n_epochs=2)
    run.fit(Counting())
    assert counts == [3, 3, 4, 4]
    assert run.global_step == 14


@pytest.mark.parametrize(("every", "check"), [(1, 1), (2, 1), (3, 2)])
def test_a_resume_keeps_the_phase_the_rows_and_the_bits(tmp_path: Path, every: int, check: int) -> None:
    arguments = {"reload_dataloaders_every_n_epochs": every, "check_val_every_n_epoch": check}
    whole = train(tmp_path, **arguments)
    asked = [int(text.split()[1]) for text in whole.asked if text[0] == "t"]
    steps = len(list(tmp_path.glob("*.ckpt")))
    assert steps > 15
    for step in range(1, steps, 2):
        rest = train(ckpt_path=tmp_path / f"{step}.ckpt", **arguments)
        assert whole.seen[-len(rest.seen) :] == rest.seen
        assert torch.equal(rest.layer.weight, whole.layer.weight)
        # Asked as of the epoch in which it was asked then, and from there on in the same epochs.
        again = [int(text.split()[1]) for text in rest.asked if text[0] == "t"]
        assert again == asked[-len(again) :]


def test_workers_of_the_loader_before_are_stopped(tmp_path: Path) -> None:
    alive: list[int] = []

    class Watching(Reloading):
        def on_train_epoch_end(self) -> None:
            import multiprocessing

            alive.append(len(multiprocessing.active_children()))

    model = Watching(workers=1)
    trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, limit_val_batches=0).fit(model)
    assert alive == [1, 1, 1]


# -- overfit_batches -------------------------------------------------------------------------------------------


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(4))


def test_overfitting_sees_the_same_rows_in_every_epoch() -> None:
    model = Toy()
    data = rows(shuffle=True)
    with pytest.warns(UserWarning, match="batch") as said:
        trainer(overfit_batches=2, max_epochs=2).fit(model, data)
    assert model.seen == [*range(8), *range(8)]
    assert [str(warning.message) for warning in said] == [
        "Trainer(overfit_batches=...) needs the same batches in every epoch. train_dataloader: the rows come in "
        "order instead of by its RandomSampler."
    ]
    assert isinstance(data.sampler, RandomSampler), "the user's own loader is as it was"


def test_overfitting_validates_in_order_and_only_in_fit() -> None:
    class Validated(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen += batch[1].tolist()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    torch.manual_seed(0)
    model, run = Validated(), trainer(overfit_batches=1, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="val_dataloader"):
        run.fit(model, rows(), rows(shuffle=True))
    assert model.seen == [0, 1, 2, 3]
    run.validate(model, rows(shuffle=True), verbose=False)
    assert model.seen[4:] != [0, 1, 2, 3]


def test_loaders_that_are_in_order_already_are_left_alone() -> None:
    for loader in (rows(), DataLoader(Numbers())):
        assert in_order(loader, "train") is loader


def test_a_batch_sampler_keeps_its_size() -> None:
    data = TensorDataset(torch.arange(7))
    loader = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 3, drop_last=True))
    with pytest.warns(UserWarning, match="RandomSampler"):
        combined = in_order(CombinedLoader({"a": loader}), "train")
    assert [batch["a"][0].tolist() for batch, _, _ in combined] == [[0, 1, 2], [3, 4, 5]]


def test_a_batch_sampler_of_ones_own_is_named() -> None:
    class Backwards(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[1], [0]])

    data = TensorDataset(torch.arange(2))
    loader = DataLoader(data, batch_sampler=Backwards(RandomSampler(data), 1, False))
    with pytest.warns(UserWarning, match="batch") as said:
        assert in_order(loader, "train") is loader
    assert [str(warning.message) for warning in said] == [
        "Trainer(overfit_batches=...) needs the same batches in every epoch. train_dataloader: its Backwards is "
        "left as it is."
    ]


# -- what else a fit reads of its loaders ----------------------------------------------------------------------


def test_accumulation_that_a_hook_sets_holds_for_its_epoch() -> None:
    class Scheduled(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = 1 + 2 * trainer.current_epoch

    run = trainer(max_epochs=2, callbacks=Scheduled())
    run.fit(Toy(), rows())
    assert run.global_step == 3 + 1


def test_validation_without_a_batch_calls_no_hook() -> None:
    called = []

    class Hooked(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...
        def on_validation_start(self) -> None:
            called.append("start")

        def on_validation_model_zero_grad(self) -> None:
            called.append("zero_grad")

    trainer().fit(Hooked(), rows(), rows(count=0))
    assert called == []


def test_the_loops_limits_are_the_trainers() -> None:
    run, model = trainer(), Toy()
    run.fit(model, rows())
    loop = run.fit_loop
    assert loop is not None
    loop.max_epochs = 2
    run.fit(model, rows())
    assert (run.max_epochs, run.current_epoch, run.global_step) == (2, 2, 6)
    assert (loop.epoch_loop.total_batch_idx, loop.epoch_loop.batch_idx, loop.max_batches) == (5, 2, 3)


# -- another batch size in the middle of an epoch ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "after", "batches", "line"),
    [
        (4, 2, 2, [[8, 9], [10, 11], [12, 13]], "row 8, batch 4"),
        (2, 4, 3, [[6, 7], [8, 9, 10, 11], [12, 13]], "row 6, batch 1, which has the 2 rows up to 8"),
        (4, 3, 2, [[8], [9, 10, 11], [12, 13]], "row 8, batch 2, which has the 1 row up to 9"),
        (3, 10, 2, [[6, 7, 8, 9], [10, 11, 12, 13]], "row 6, batch 0, which has the 4 rows up to 10"),
    ],
)
def test_another_batch_size_goes_on_at_the_same_row(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    old: int,
    new: int,
    after: int,
    batches: list[list[int]],
    line: str,
) -> None:
    """The first batch is a short one, up to where the batches of the new size begin."""
    assert batch_of(tmp_path, old, None) == [
        list(range(14))[begin : begin + old] for begin in range(0, 14, old)
    ]
    with pytest.warns(UserWarning, match="the epoch goes on at the same row"):
        assert batch_of(tmp_path, new, tmp_path / f"{old}-{after}.ckpt") == batches
    # And once more, from checkpoints that were saved behind it in the same epoch.
    assert batch_of(tmp_path, new, tmp_path / f"{new}-{after + 1}.ckpt") == batches[1:]
    assert batch_of(tmp_path, new, tmp_path / f"{new}-{after + len(batches) - 1}.ckpt") == batches[-1:]
    told = [message for message in caplog.messages if message.startswith("the batch size")]
    assert told == [f"the batch size was {old} and is {new}: the epoch goes on at {line}"]


def batch_of(directory: Path, size: int, ckpt_path: Path | None) -> list[list[int]]:
    class Batched(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batches.append(batch[1].tolist())
            return super().training_step(batch, batch_idx)

    batches: list[list[int]] = []
    saving = ModelCheckpoint(
        directory, filename=f"{size}-{{step}}", every_n_train_steps=1, save_top_k=-1,
        auto_insert_metric_name=False,
    )  # fmt: skip
    trainer(callbacks=saving).fit(Batched(), rows(14, size), ckpt_path=ckpt_path)
    return batches


def test_another_batch_size_behind_the_last_row_begins_the_next_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch_of(tmp_path, 7, None)
    saved = tmp_path / "7-2.ckpt"
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="the epoch goes on at the same row"):
        assert batch_of(tmp_path, 4, saved) == []
    assert "the batch size was 7 and is 4: every row of the epoch is done" in caplog.messages


def test_validation_is_not_due_where_the_position_is_inside_of_a_batch(tmp_path: Path) -> None:
    validated = []

    class Validated(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            validated.append(self.trainer.fit_loop.total_batch_idx)

    def run(size: int, ckpt_path: Path | None = None) -> pl.Trainer:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1,
                                 auto_insert_metric_name=False)  # fmt: skip
        made = trainer(callbacks=saving, val_check_interval=2, num_sanity_val_steps=0)
        made.fit(Validated(), rows(16, size), rows(1), ckpt_path=ckpt_path)
        return made

    run(2)
    validated.clear()
    with pytest.warns(UserWarning, match="the epoch goes on at the same row"):
        made = run(4, tmp_path / "3.ckpt")
    assert made.global_step == 3 + 3
    assert validated == [3, 5]  # behind batches 1 and 3 of the new size, of which the first has two rows
    assert made.progress.batches_that_stepped == 6
