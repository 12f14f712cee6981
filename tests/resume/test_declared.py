"""What cannot be exact is declared before the first batch, and ``exact="require"`` refuses it; all else is silent."""

from __future__ import annotations

import functools
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    default_collate,
)

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint, Timer
from holdfast.training import exactness
from tests.training.toys import Toy, rows, trainer

from .cases import Case
from .harness import assert_resumes_exactly

RESUMED = "Once resumed, this run is not bit for bit the one that never stopped:\n  "
REMEDY = '\nStart it as it was started, or train all the same with exact="warn".'
REFUSED = 'Trainer(exact="require") refuses this run, and nothing was trained. It would not be exact:\n  '


def warned_of(root: Path, model: Any, data: Any, path: Path | None = None, **arguments: Any) -> list[str]:
    """What a run warns of, which saves each of its batches, in three epochs of three."""
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run = trainer(**{"callbacks": saver, "max_epochs": 3, "num_sanity_val_steps": 0, **arguments})
        run.fit(model, data, ckpt_path=path)
    return [str(one.message) for one in found]


def is_exact(root: Path, model: Callable[[], Any], data: Callable[[], Any]) -> bool:
    """Whether a run gone on with from the middle of its second epoch sees and learns what the whole one did."""

    def run(name: str, path: Path | None) -> Any:
        pl.seed_everything(1, verbose=False)
        made = model()
        warned_of(root / name, made, data(), path)
        return made

    whole, resumed = run("whole", None), run("resumed", root / "whole" / "step=5.ckpt")
    same_rows = whole.seen[len(whole.seen) - len(resumed.seen) :] == resumed.seen
    return same_rows and torch.equal(whole.layer.weight, resumed.layer.weight)


class Rows(Dataset[Any]):
    def __init__(self, transform: Any = None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        row = torch.full((3,), float(index)) / 12
        return row if self.transform is None else self.transform(row), index


class Noise:
    def __init__(self, source: Any) -> None:
        self.source = source
        self.unused = numpy.random.default_rng(1)

    def __call__(self, row: Any) -> Any:
        return row + float(self.source.random())


GLOBAL = numpy.random.default_rng(1)


def collate(rows: list[Any]) -> Any:
    features, ids = default_collate(rows)
    return features + float(GLOBAL.random()), ids


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.source = random.Random(1)

    def __iter__(self) -> Iterator[Any]:
        order = list(range(12))
        self.source.shuffle(order)
        return ((torch.full((3,), float(index)) / 12, index) for index in order)


class CountedStream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += 1
        for index in order:
            yield torch.full((3,), float(index)) / 12, index


class Counted(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += 1
        return iter(order)


class Statistics(Sampler[int]):
    """Counts how often it was asked, and does nothing with that."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return iter(range(12))


class Hidden(Sampler[int]):
    def __init__(self) -> None:
        self.sources = [torch.Generator().manual_seed(1)]

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(12, generator=self.sources[0]).tolist())


def in_workers(path: str, kind: str = "numpy's Generator") -> str:
    return (
        f"{path}, of the training data, is a generator of its own ({kind}), and each worker has a copy of it. "
        "Draw from the global generators of torch, NumPy or Python: these are seeded for each batch."
    )


def noise() -> Noise:
    return Noise(numpy.random.default_rng(1))


SET_EPOCH = "Give it set_epoch(epoch), which is called before each epoch, or state_dict and load_state_dict."

INEXACT: dict[str, tuple[Callable[[], Any], str]] = {
    "batches in any order": (
        lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=2, in_order=False),
        "DataLoader(in_order=False), of the training data: batches come as workers finish them, so the rows "
        "after a resume are not those that were left. Leave in_order out.",
    ),
    "a transform's generator in workers": (
        lambda: DataLoader(Rows(noise()), 4, num_workers=2),
        in_workers("Rows.transform.source"),
    ),
    "one within a subset and a list": (
        lambda: DataLoader(
            Subset(ConcatDataset([Rows(torch.nn.Sequential()), Rows(noise())]), range(12, 24)), 4, num_workers=1
        ),
        in_workers("Subset.dataset.datasets[1].transform.source"),
    ),
    "one in a partial function": (
        lambda: DataLoader(Rows(functools.partial(lambda row, by: row + by.random(), by=random.Random(1))), 4,
                           num_workers=1),
        in_workers("Rows.transform.by", "random's Random"),
    ),
    "a global one of a collate function": (
        lambda: DataLoader(Rows(), 4, num_workers=1, collate_fn=collate),
        in_workers("collate.GLOBAL"),
    ),
    "a sampler that counts its epochs": (
        lambda: DataLoader(Rows(), 4, sampler=Counted()),
        "Counted.__iter__, of the training data, goes on from self.epoch of the epoch before, which is in no "
        f"checkpoint. {SET_EPOCH}",
    ),
    "one inside of a batch sampler": (
        lambda: DataLoader(Rows(), batch_sampler=BatchSampler(Counted(), 4, False)),
        "Counted.__iter__, of the training data, goes on from self.epoch of the epoch before, which is in no "
        f"checkpoint. {SET_EPOCH}",
    ),
    "a sampler that hides its generator": (
        lambda: DataLoader(Rows(), 4, sampler=Hidden()),
        "Hidden.sources[0], of the training data, is a generator (torch's Generator) whose state is in no "
        "checkpoint. Make it an attribute of Hidden itself: those are saved.",
    ),
    "an iterable that counts its epochs": (
        lambda: DataLoader(CountedStream(), 4),
        "CountedStream.__iter__, of the training data, goes on from self.epoch of the epoch before, which is in "
        "no checkpoint. Draw the order of its rows from torch's global generator.",
    ),
}  # fmt: skip


class EpochFromOutside(Counted):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Kept(Counted):
    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class BeginsAnew(Counted):
    """Has a number that changes while it is read, and begins with the same one each time."""

    def __iter__(self) -> Iterator[int]:
        self.epoch = 0
        for index in range(12):
            self.epoch += 1
            yield index


EXACT: dict[str, Callable[[], Any]] = {
    "rows in any order": lambda: rows(shuffle=True),
    "one worker in any order": lambda: DataLoader(Rows(), 4, shuffle=True, in_order=False),
    "a generator in this process": lambda: DataLoader(Rows(noise()), 4, shuffle=True),
    "a global one in this process": lambda: DataLoader(Rows(), 4, collate_fn=collate_of(GLOBAL)),
    "an iterable's generator": lambda: DataLoader(Stream(), 4),
    "one in a worker": lambda: DataLoader(Stream(), 4, num_workers=1),
    "an iterable that counts, in a worker": lambda: DataLoader(CountedStream(), 4, num_workers=1),
    "a sampler that only counts": lambda: DataLoader(Rows(), 4, sampler=Statistics()),
    "a sampler that is told its epoch": lambda: DataLoader(Rows(), 4, sampler=EpochFromOutside()),
    "a sampler with a state": lambda: DataLoader(Rows(), 4, sampler=Kept()),
    "a sampler that begins anew": lambda: DataLoader(Rows(), 4, sampler=BeginsAnew()),
    "torch's draws in workers": lambda: DataLoader(Rows(lambda row: row + torch.rand(3)), 4, num_workers=2),
}


def collate_of(source: Any) -> Callable[[list[Any]], Any]:
    source = numpy.random.default_rng(1)
    return lambda batch: collate_with(source, batch)


def collate_with(source: Any, batch: list[Any]) -> Any:
    features, ids = default_collate(batch)
    return features + float(source.random()), ids


class TestData:
    @pytest.mark.parametrize("name", INEXACT)
    def test_is_said_by_a_fresh_and_by_a_resumed_run(self, tmp_path: Path, name: str) -> None:
        data, reason = INEXACT[name]
        assert warned_of(tmp_path / "a", Toy(), data()) == [RESUMED + reason]
        path = tmp_path / "a" / "step=5.ckpt"
        assert warned_of(tmp_path / "b", Toy(), data(), path) == [RESUMED + reason]

    @pytest.mark.parametrize("name", [name for name in INEXACT if name != "batches in any order"])
    def test_and_it_is_true(self, tmp_path: Path, name: str) -> None:
        # (Which worker is done first, nobody can tell.)
        assert not is_exact(tmp_path, Toy, INEXACT[name][0])

    @pytest.mark.parametrize("name", EXACT)
    def test_what_is_exact_says_nothing(self, tmp_path: Path, name: str) -> None:
        assert warned_of(tmp_path / "a", Toy(), EXACT[name](), exact="require") == []
        path = tmp_path / "a" / "step=5.ckpt"
        assert warned_of(tmp_path / "b", Toy(), EXACT[name](), path, exact="require") == []
        assert is_exact(tmp_path, Toy, EXACT[name])

    def test_validation_data_too(self, tmp_path: Path) -> None:
        class Validated(Toy):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch)

            def val_dataloader(self) -> Any:
                return [rows(4), DataLoader(Rows(), 4, sampler=Counted())]

        assert warned_of(tmp_path, Validated(), rows()) == [
            RESUMED
            + "Counted.__iter__, of the validation data, goes on from self.epoch of the epoch before, which "
            f"is in no checkpoint. {SET_EPOCH}"
        ]

    def test_nothing_is_said_where_nothing_is_saved(self, tmp_path: Path) -> None:
        data = INEXACT["a sampler that counts its epochs"][0]
        assert warned_of(tmp_path, Toy(), data(), callbacks=[], enable_checkpointing=False) == []
        assert warned_of(tmp_path, Toy(), data(), fast_dev_run=True) == []


class TestGeneratorsOfTheModel:
    def test_an_attribute_is_saved_and_goes_on(self, tmp_path: Path) -> None:
        class Noisy(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.noise = numpy.random.default_rng(3)
                self.layer.inner = torch.Generator().manual_seed(3)

            def loss(self, batch: Any) -> Any:
                return super().loss(
                    [batch[0] + self.noise.random() + torch.rand(3, generator=self.layer.inner)]
                )

        class Draws(pl.Callback):
            def __init__(self) -> None:
                self.source = random.Random(1)

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                batch[0].mul_(self.source.random())

        class NoisyWithCallback(Noisy):
            def configure_callbacks(self) -> Any:
                return [Draws()]

        assert is_exact(tmp_path, NoisyWithCallback, lambda: DataLoader(Rows(), 4))

    def test_a_global_variable_is_declared(self, tmp_path: Path) -> None:
        class Noisy(Toy):
            def loss(self, batch: Any) -> Any:
                return super().loss([batch[0] + float(GLOBAL.random())])

        assert warned_of(tmp_path / "a", Noisy(), rows()) == [
            RESUMED + "Noisy draws from GLOBAL, a global variable (numpy's Generator) whose state is in no "
            "checkpoint. Make it an attribute, self.GLOBAL: those are saved."
        ]
        assert not is_exact(tmp_path, Noisy, rows)


class TestOtherCauses:
    def test_validation_by_the_clock(self, tmp_path: Path) -> None:
        class Validated(Toy):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch)

            def val_dataloader(self) -> Any:
                return rows(4)

        by_time = {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None}
        assert warned_of(tmp_path / "a", Toy(), rows(), **by_time) == []
        assert warned_of(tmp_path / "b", Validated(), rows(), **by_time) == [
            RESUMED + "Trainer(val_check_interval='1:00:00') is a time, so the machine's speed decides when "
            "validation runs. Give a number of batches or a fraction of an epoch."
        ]

    def test_a_file_of_another_maker(self, tmp_path: Path) -> None:
        model = Toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        theirs = {
            "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 0,
            "global_step": 3,
        }  # fmt: skip
        torch.save(theirs, tmp_path / "theirs.ckpt")
        reason = (
            "theirs.ckpt is not holdfast's: it tells neither the state of the generators nor the order of the rows, "
            "so other numbers are drawn from here on. The checkpoints of this run are exact."
        )
        assert warned_of(tmp_path / "a", Toy(), rows(), tmp_path / "theirs.ckpt") == [RESUMED + reason]
        with pytest.raises(pl.ConfigError) as refused:
            warned_of(tmp_path / "b", Toy(), rows(), tmp_path / "theirs.ckpt", exact="require")
        assert str(refused.value) == REFUSED + reason + REMEDY

    def test_a_file_behind_an_epoch_that_the_time_cut_short(self, tmp_path: Path) -> None:
        class UpAtOnce(Timer):
            def time_elapsed(self, stage: str = "train") -> float:
                return 0.0 if self.start_time() is None or self.has_time else 60.0

            has_time = False

        def with_time(root: Path, path: Path) -> list[str]:
            timer = UpAtOnce("00:00:00:30")
            timer.has_time = True
            return warned_of(root, Toy(), rows(), path, callbacks=[timer, ModelCheckpoint(root)])

        run = trainer(callbacks=[UpAtOnce("00:00:00:30"), ModelCheckpoint(tmp_path, "a")], max_epochs=2)
        run.fit(Toy(), rows())
        assert run.global_step == 1
        assert with_time(tmp_path / "b", tmp_path / "a.ckpt") == [
            RESUMED
            + "a.ckpt was saved when the time for training was up, behind the early end of its epoch. The "
            "stopped.ckpt of that moment was saved before it."
        ]
        assert with_time(tmp_path / "c", tmp_path / "stopped.ckpt") == []

    def test_a_gpu_without_deterministic_algorithms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # There is none here: the trainer is told that it computes on one.
        run = trainer()
        run.fit(Toy(), rows())
        assert exactness.reasons(run) == []
        monkeypatch.setattr(run.strategy, "root_device_", torch.device("cuda", 0), raising=False)
        monkeypatch.setattr(type(run.strategy), "root_device", property(lambda self: self.root_device_))
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        assert exactness.reasons(run) == [
            "Some of torch's operations give other bits each time on CUDA. Set Trainer(deterministic=True).",
            "torch.backends.cudnn.benchmark is on, so cuDNN takes the algorithms that were fastest this time. Set "
            "Trainer(benchmark=False).",
        ]
        torch.use_deterministic_algorithms(True)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        assert exactness.reasons(run) == []


class Refuses(Toy):
    """Fails the test if it is trained on anything."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("it trains")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("it validates")


class Reader:
    """A loader that knows its position."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        for batch in list(rows())[self.at :]:
            self.at += 1
            yield batch
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class TestOneLoaderForBoth:
    def test_with_a_state_it_is_declared_and_without_it_is_not(self, tmp_path: Path) -> None:
        class Validated(Toy):
            data: Any

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch)

            def val_dataloader(self) -> Any:
                return self.data

        one, other, model = Reader(), rows(), Validated()
        model.data = one
        assert warned_of(tmp_path / "a", model, one, limit_val_batches=2) == [
            RESUMED
            + "One Reader is the training data and the validation data, and validation within an epoch "
            "moves its state. Give each a loader of its own."
        ]
        model.data = other
        assert warned_of(tmp_path / "b", model, other) == []


class TestRequire:
    def test_all_reasons_at_once_and_nothing_is_trained_or_written(self, tmp_path: Path) -> None:
        data = DataLoader(Rows(noise()), 4, num_workers=2, in_order=False)
        run = pl.Trainer(default_root_dir=tmp_path, exact="require", accelerator="cpu", max_epochs=1)
        with pytest.raises(pl.ConfigError) as refused:
            run.fit(Refuses(), data, DataLoader(Rows(), 4, sampler=Counted()))
        assert str(refused.value) == (
            REFUSED
            + INEXACT["batches in any order"][1]
            + "\n  "
            + in_workers("Rows.transform.source")
            + "\n  "
            "Counted.__iter__, of the validation data, goes on from self.epoch of the epoch before, which is in no "
            f"checkpoint. {SET_EPOCH}"
        )
        assert list(tmp_path.iterdir()) == []

    def test_a_resumed_run_that_would_differ(self, tmp_path: Path) -> None:
        def run(model: Any, data: Any, **arguments: Any) -> None:
            pl.Trainer(
                default_root_dir=tmp_path, accelerator="cpu", log_every_n_steps=1, enable_model_summary=False,
                enable_progress_bar=False, **arguments,
            ).fit(model, data, ckpt_path="auto")  # fmt: skip

        class Logged(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("loss", loss := super().training_step(batch, batch_idx))
                return loss

        run(Logged(), rows(), max_epochs=1, callbacks=[Extra()])
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        torch.set_num_threads(2)
        gone = f"{'epoch=0-step=3.ckpt'} holds the state of Extra, and this trainer has no such callback. Add it."
        with (
            pytest.warns(UserWarning, match="callbacks that this trainer does not have"),
            pytest.raises(pl.ConfigError) as refused,
        ):
            run(Refuses(lr=0.2), rows(batch_size=2), max_epochs=2, accumulate_grad_batches=2, exact="require")
        assert str(refused.value) == (
            REFUSED + "hyperparameter lr: 0.1 -> 0.2\n"
            "  learning rate of SGD, group 0: 0.1 -> 0.2 (the checkpoint's is gone on with)\n"
            "  accumulate_grad_batches: 1 -> 2\n"
            "  batch size of the training data: 4 -> 2\n"
            "  threads: 1 -> 2 (bits may differ)\n"
            f"  {gone}" + REMEDY
        )
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files

    def test_a_finished_run_is_finished(self, tmp_path: Path) -> None:
        warned_of(tmp_path, Toy(), rows())
        assert warned_of(tmp_path, Refuses(lr=3.0), rows(), tmp_path / "step=9.ckpt", exact="require",
                         max_steps=9) == []  # fmt: skip

    def test_a_higher_limit_and_other_workers_are_no_difference(self, tmp_path: Path) -> None:
        warned_of(tmp_path / "a", Toy(), rows())
        again = {"max_epochs": 5, "min_epochs": 4, "max_steps": 13, "exact": "require"}
        path = tmp_path / "a" / "step=9.ckpt"
        assert warned_of(tmp_path / "b", Toy(), rows(num_workers=1), path, **again) == []

    def test_loaders_that_are_asked_for_again_may_give_other_data(self, tmp_path: Path) -> None:
        class Grows(Toy):
            def train_dataloader(self) -> Any:
                return rows(12 + 4 * self.trainer.current_epoch)

        again = {"reload_dataloaders_every_n_epochs": 1, "exact": "require"}
        assert warned_of(tmp_path / "a", Grows(), None, **again) == []
        for step in (2, 5, 11):
            assert (
                warned_of(tmp_path / f"{step}", Grows(), None, tmp_path / "a" / f"step={step}.ckpt", **again)
                == []
            )


class Nothing:
    """Something that is referred to."""


class Points(Toy):
    """Refers weakly to its optimizer, and to something that is gone."""

    def __init__(self) -> None:
        super().__init__()
        there = Nothing()
        self.gone = weakref.proxy(there)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.optimizer = weakref.proxy(optimizer)
        return optimizer


class Follows(pl.Callback):
    """Refers weakly to the model, and to something that is gone."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.module, self.gone = weakref.proxy(pl_module), weakref.proxy(Nothing())


class PointingRows(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.held = [weakref.proxy(Nothing())]

    def __getitem__(self, index: int) -> Any:
        assert self.held
        return super().__getitem__(index)


class PointingSampler(Sampler[int]):
    def __init__(self) -> None:
        self.gone = weakref.proxy(Nothing())

    def __iter__(self) -> Iterator[int]:
        return iter(range(12)) if hasattr(self, "gone") else iter(())

    def __len__(self) -> int:
        return 12


def test_what_is_referred_to_weakly_is_somebody_elses(tmp_path: Path) -> None:
    """It is neither looked into, which raises where it is gone, nor taken for a copy that is not saved."""

    def run(path: Path | None) -> Points:
        model = Points()
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        data = DataLoader(PointingRows(), 4, sampler=PointingSampler())
        trainer(callbacks=[saver, Follows()], max_epochs=2, exact="require").fit(model, data, ckpt_path=path)
        return model

    whole, resumed = run(None), run(tmp_path / "step=2.ckpt")
    assert whole.seen[8:] == resumed.seen
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


class Extra(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"extra": 1}


CASES = {
    "everything random": Case(augment=("torch", "numpy", "random"), dropout=True, validation="drawing"),
    "workers": Case(workers=2, augment=("torch",), collate=True),
    "persistent workers": Case(workers=2, persistent=True, augment=("numpy",)),
    "weights": Case(sampler="weighted", optimizer="adam", scheduler="onecycle"),
    "a sampler with set_epoch": Case(sampler="epoch", scheduler="multistep"),
    "a batch sampler": Case(sampler="batch", batch_norm=True, target="module"),
    "a generator of the loader": Case(
        own_generator=True, subset=True, early_stopping=True, validation="plain"
    ),
    "an iterable": Case(iterable=True, augment=("random",)),
    "manual optimization": Case(manual=True, validation="shuffled"),
    "a plateau": Case(scheduler="plateau", validation="plain", trainer={"accumulate_grad_batches": 2}),
    "warm-up by hand": Case(extra="warmup", trainer={"max_epochs": 2, "gradient_clip_val": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_command_says_nothing(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    strict = Case(**{**vars(case), "trainer": {**case.trainer, "exact": "require"}})
    assert_resumes_exactly(strict, tmp_path)
