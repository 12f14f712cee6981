"""Loaders of every kind, in a run that is stopped and resumed: the rows, their draws and the bits are the same."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import holdfast as pl
from holdfast.training import replay
from holdfast.utilities.combined_loader import CombinedLoader

from .loaders import GoingRound, Numbers, Resumable, Rows, assert_exact, draws, fit, loader, noisy

stateful = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # The machine that runs this may have fewer cores than a case has workers, and no GPU to pin memory for.
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]

IN_BOTH_EPOCHS = (2, 5, 8)
"""Of six steps each: in the middle of the first and near its end, and in the middle of the second."""


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"num_workers": 0}, {"num_workers": 2, "persistent_workers": True}),
        ({"num_workers": 1, "prefetch_factor": 5}, {"num_workers": 4}),
        ({"num_workers": 4, "persistent_workers": True}, {"num_workers": 0}),
        ({"num_workers": 2, "pin_memory": True}, {"num_workers": 1, "prefetch_factor": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [False, True], ids=["global generator", "its own"])
def test_another_number_of_workers(tmp_path: Path, then: Any, now: Any, own: bool) -> None:
    def data(workers: Any) -> Any:
        return loader(**workers, generator=seeded() if own else None)

    assert_exact(tmp_path, lambda: data(then), resumed=lambda: data(now), steps=IN_BOTH_EPOCHS)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_ways_to_start_workers(tmp_path: Path, method: str) -> None:
    def data() -> Any:
        return loader(num_workers=1, persistent_workers=True, multiprocessing_context=method)

    assert_exact(tmp_path, loader, resumed=data, steps=[4])


def seeds_itself(worker_id: int) -> None:
    torch.manual_seed(worker_id)
    numpy.random.seed(worker_id)
    random.seed(worker_id)


def test_a_worker_init_fn_that_seeds(tmp_path: Path) -> None:
    def data(workers: int) -> Any:
        return loader(num_workers=workers, worker_init_fn=seeds_itself)

    assert_exact(tmp_path, lambda: data(2), resumed=lambda: data(1), steps=IN_BOTH_EPOCHS)


# -- samplers ----------------------------------------------------------------------------------------------------


class Buckets(Sampler[list[int]]):
    """Rows of like length together, shuffled by itself, in batches of different sizes; draws as it goes."""

    def __iter__(self) -> Iterator[list[int]]:
        buckets = [[row for row in range(23) if row % 3 == length] for length in range(3)]
        random.shuffle(buckets)
        for bucket in buckets:
            order = torch.randperm(len(bucket)).tolist()
            size = random.randint(2, 4)
            yield from (
                [bucket[at] for at in order[start : start + size]] for start in range(0, len(order), size)
            )


class OwnGenerator(Sampler[int]):
    """Draws each row as it goes, from a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(5)

    def __len__(self) -> int:
        return 23

    def __iter__(self) -> Iterator[int]:
        for _ in range(23):
            yield self.random.randrange(23)


class BothAtOnce(Rows):
    """Gives a whole batch when asked for one."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        shift = torch.rand(()).item()
        return [row + shift for row in map(self.__getitem__, indices)]


class Pairs(Rows):
    """Asked for a tuple, since its sampler gives such."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.stack([super(Pairs, self).__getitem__(one) for one in index])


def two_at_a_time() -> Any:
    return BatchSampler(RandomSampler(range(11)), 2, False)


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0 + row % 3 for row in range(23)], 23)},
    "a subset": lambda: {"sampler": SubsetRandomSampler(range(3, 20), generator=seeded())},
    "with replacement": lambda: {
        "sampler": RandomSampler(range(23), replacement=True, num_samples=70, generator=seeded())
    },
    "more rows than there are": lambda: {"sampler": RandomSampler(range(23), num_samples=30, generator=seeded())},
    "a list": lambda: {"sampler": [5, 3, 8, 1, 9, 2, 6]},
    "draws as it goes": lambda: {"sampler": OwnGenerator()},
    "drop_last": lambda: {"shuffle": True, "drop_last": True, "generator": seeded()},
    "buckets": lambda: {"batch_sampler": Buckets()},
    "batches of batches": lambda: {"batch_sampler": BatchSampler(SequentialSampler(range(23)), 5, True)},
    "__getitems__": lambda: {"dataset": BothAtOnce(), "shuffle": True},
    "batch_size=None": lambda: {"dataset": Rows(7), "batch_size": None, "shuffle": True, "collate_fn": None},
    "batch_size=None and tuples": lambda: {
        "dataset": Pairs(), "batch_size": None, "sampler": two_at_a_time(), "collate_fn": None,
    },
}  # fmt: skip


def sampled(name: str, workers: int) -> DataLoader[Any]:
    arguments = {"shuffle": None, **SAMPLERS[name]()}
    if "batch_sampler" in arguments:
        arguments["batch_size"] = 1
    return loader(**arguments, num_workers=workers)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(tmp_path: Path, name: str) -> None:
    assert_exact(tmp_path, lambda: sampled(name, 0))


@pytest.mark.parametrize("name", ["with replacement", "draws as it goes", "drop_last", "buckets"])
@pytest.mark.parametrize(("then", "now"), [(2, 0), (0, 2)])
def test_samplers_with_another_number_of_workers(tmp_path: Path, name: str, then: int, now: int) -> None:
    """Workers fetch ahead, and a sampler with a generator of its own draws ahead with them."""
    whole = assert_exact(
        tmp_path, lambda: sampled(name, then), resumed=lambda: sampled(name, now), steps=[1, 4]
    )
    assert fit(sampled(name, now)).seen == whole.seen


# -- generators of the data's own --------------------------------------------------------------------------------


class Drawing(Rows):
    """Has generators of its own, one of them in a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = numpy.random.default_rng(1)
        self.transforms = [Jitter()]

    def __getitem__(self, index: int) -> Tensor:
        row = super().__getitem__(index) + self.generator.random()
        for transform in self.transforms:
            row = transform(row)
        return row


class Jitter:
    def __init__(self) -> None:
        self.random = random.Random(2)

    def __call__(self, row: Tensor) -> Tensor:
        return row * self.random.uniform(0.9, 1.1)


class DrawingStream(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.generator = seeded()

    def __iter__(self) -> Iterator[Tensor]:
        for row in super().__iter__():
            yield row + torch.rand((), generator=self.generator)


@pytest.mark.parametrize(
    "data", [lambda: loader(dataset=Drawing()), lambda: loader(dataset=DrawingStream(), shuffle=None)]
)
def test_generators_of_a_dataset_without_workers(tmp_path: Path, data: Any) -> None:
    assert_exact(tmp_path, data)


# -- iterables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("made", [DataLoader, stateful.StatefulDataLoader])
def test_an_iterable_without_state(tmp_path: Path, made: Any, workers: int) -> None:
    def data() -> Any:
        return made(Numbers(shuffled=True), batch_size=4, collate_fn=noisy, num_workers=workers)

    assert_exact(tmp_path, data, steps=IN_BOTH_EPOCHS)


def test_persistent_workers_of_an_iterable(tmp_path: Path) -> None:
    def data() -> Any:
        return DataLoader(Numbers(shuffled=True), batch_size=4, num_workers=2, persistent_workers=True)

    assert_exact(tmp_path, data, steps=IN_BOTH_EPOCHS)


@pytest.mark.filterwarnings("ignore:3.ckpt was saved by a run with other settings:UserWarning")
def test_an_iterable_with_another_number_of_workers_trains_on(tmp_path: Path) -> None:
    """Not exact: its rows come in another order. But none is missing, and none comes twice, in the next epoch."""

    def data(workers: int) -> Any:
        return DataLoader(Numbers(), batch_size=4, num_workers=workers)

    whole = fit(data(2), tmp_path)
    rest = fit(data(1), None, tmp_path / "3.ckpt")
    assert len(rest.seen) == len(whole.seen) - 3
    assert sorted(rows_of(rest.seen[3:])) == list(range(23))


def rows_of(batches: list[list[float]]) -> list[int]:
    """The rows' numbers, each the first of four."""
    return [int(number) for batch in batches for number in batch[::4]]


def test_reading_again_is_said(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def data() -> Any:
        return DataLoader(Numbers(), batch_size=4)

    fit(data(), tmp_path)
    said.clear()
    fit(data(), None, tmp_path / "3.ckpt")
    announced = (
        "train_dataloader: DataLoader over Numbers has no state, so the 3 batches before the position are read "
        "again. A loader with state_dict and load_state_dict, such as torchdata's StatefulDataLoader over a "
        "dataset that has them too, goes on at once."
    )
    assert [line for line in said if line.startswith(("train_dataloader", "read "))] == [announced]
    said.clear()
    monkeypatch.setattr(replay, "EVERY_S", 0.0)  # as if each batch took that long
    fit(CombinedLoader([loader(), data()]), None, None)
    assert [line for line in said if line.startswith(("train_dataloader", "read "))] == [], (
        "nothing is resumed"
    )
    fit(CombinedLoader([loader(), data()]), tmp_path / "two")
    said.clear()
    fit(CombinedLoader([loader(), data()]), None, tmp_path / "two" / "2.ckpt")
    assert [line for line in said if line.startswith(("train_dataloader", "read "))] == [
        announced.replace("the 3", "the 2").replace("train_dataloader", "train_dataloader, loader 1"),
        "read 0 of 2 batches again",
        "read 1 of 2 batches again",
    ]


@pytest.mark.parametrize("shown", [False, True])
def test_reading_again_is_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def data() -> Any:
        return DataLoader(Numbers(), batch_size=4)

    fit(data(), tmp_path)
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    fit(data(), None, tmp_path / "3.ckpt", enable_progress_bar=shown)
    assert ("Reading again" in terminal.getvalue()) is shown
    assert "the 3 batches before the position are read again" in terminal.getvalue()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What holdfast logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("holdfast").addHandler(handler)
    yield lines
    logging.getLogger("holdfast").removeHandler(handler)


# -- loaders with a state ----------------------------------------------------------------------------------------


def with_state(dataset: Any, workers: int = 0, **arguments: Any) -> Any:
    return stateful.StatefulDataLoader(dataset, batch_size=4, num_workers=workers, **arguments)


@pytest.mark.parametrize(
    ("then", "now", "weighted"), [(0, 0, True), (0, 2, False), (2, 2, True), (2, 0, False)]
)
def test_torchdatas_loader_over_rows(tmp_path: Path, then: int, now: int, weighted: bool) -> None:
    """It is sought, so augmentation is exact with workers too, and with another number of them."""

    def data(workers: int) -> Any:
        order: dict[str, Any] = (
            {"sampler": WeightedRandomSampler([1.0] * 23, 23)} if weighted else {"shuffle": True}
        )
        return with_state(Rows(), workers, collate_fn=noisy, **order)

    assert_exact(tmp_path, lambda: data(then), resumed=lambda: data(now), steps=(1, 5, 6, 14), max_epochs=3)


class Counting(Rows):
    """Has a state that goes on over epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.count_of_reads = 0

    def __getitem__(self, index: int) -> Tensor:
        self.count_of_reads += 1
        return super().__getitem__(index) + self.count_of_reads

    def state_dict(self) -> dict[str, Any]:
        return {"reads": self.count_of_reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count_of_reads = state["reads"]


@pytest.mark.parametrize("limit", [None, 3])
def test_torchdatas_loader_over_rows_with_a_state(tmp_path: Path, limit: int | None) -> None:
    def data() -> Any:
        return with_state(Counting(), collate_fn=noisy, shuffle=True)

    assert_exact(tmp_path, data, max_epochs=3, limit_train_batches=limit)


@pytest.mark.parametrize("limit", [None, 3, 1])
@pytest.mark.parametrize("dataset", [Resumable, GoingRound])
def test_torchdatas_loader_over_an_iterable(tmp_path: Path, dataset: Any, limit: int | None) -> None:
    """Also in epochs that are cut short: a dataset that goes on then does so in a resumed run."""

    def data() -> Any:
        return with_state(dataset(), collate_fn=noisy)

    assert_exact(tmp_path, data, max_epochs=3, limit_train_batches=limit)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_torchdatas_loader_over_an_iterable_with_workers(
    tmp_path: Path, persistent: bool, limit: int | None
) -> None:
    def data() -> Any:
        return with_state(Resumable(), 2, persistent_workers=persistent)

    steps = (1, 5, 6, 8) if limit is None else (1, 3, 5)
    assert_exact(tmp_path, data, steps=steps, max_epochs=3, limit_train_batches=limit)


@pytest.mark.filterwarnings("ignore:..ckpt was saved by a run with other settings:UserWarning")
def test_torchdatas_loader_with_another_number_of_workers_trains_on(tmp_path: Path) -> None:
    def data(workers: int) -> Any:
        return with_state(Resumable(), workers)

    whole = fit(data(2), tmp_path)
    with pytest.warns(UserWarning, match="for that number alone") as warned:
        rest = fit(data(1), None, tmp_path / "3.ckpt")
    assert len(rest.seen) == len(whole.seen) - 3
    assert sorted(rows_of(rest.seen[3:])) == list(range(23))
    told = "StatefulDataLoader over Resumable had 2 workers and has 1. Its state is for that number alone, so it "
    assert told + "is read again from the start of the epoch: rows may come twice or be left out." in [
        str(warning.message) for warning in warned
    ]


class Own:
    """A loader that knows its position and gives every epoch another order, but goes on only once it is read."""

    def __init__(self) -> None:
        self.position = self.begun = 0
        self.goes_on_at: int | None = None

    def __iter__(self) -> Iterator[Tensor]:
        start, self.goes_on_at = self.goes_on_at, None
        if start is None:
            start = 0
            self.begun += 1
        order = list(range(6))
        random.Random(self.begun).shuffle(order)
        for at in range(start, 6):
            self.position = at + 1
            yield torch.tensor([float(order[at]), *draws()])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = self.goes_on_at = state["position"]
        self.begun = state["begun"]


@pytest.mark.parametrize("limit", [None, 5, 2])
def test_a_loader_of_ones_own(tmp_path: Path, limit: int | None) -> None:
    assert_exact(tmp_path, Own, max_epochs=3, limit_train_batches=limit)


# -- validation --------------------------------------------------------------------------------------------------


VALIDATION: dict[str, Callable[[], Any]] = {
    "shuffled, with workers": lambda: loader(num_workers=2),
    "shuffled, with persistent workers": lambda: loader(
        num_workers=2, persistent_workers=True, generator=seeded()
    ),
    "with a generator of its own": lambda: loader(dataset=Drawing(), generator=seeded()),
    "with a state": lambda: with_state(GoingRound()),
    "several": lambda: [loader(), loader(dataset=Numbers(shuffled=True), shuffle=None)],
}


@pytest.mark.parametrize("limit", [1.0, 2])
@pytest.mark.parametrize("name", VALIDATION)
def test_validation_loaders(tmp_path: Path, name: str, limit: Any) -> None:
    if name == "several" and limit == 1.0:
        limit = 3
    arguments = {"val_check_interval": 4, "limit_val_batches": limit, "num_sanity_val_steps": 1}
    whole = assert_exact(tmp_path, loader, val=VALIDATION[name], steps=(1, 4, 9), **arguments)
    assert whole.validated
    assert fit(loader(), val=None).seen == whole.seen, "validation does not shift training"


# -- several loaders, reloads, datamodules -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The training loader promised:UserWarning")
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_kinds_at_once(tmp_path: Path, mode: Any) -> None:
    def data(workers: int) -> Any:
        parts = {
            "rows": loader(num_workers=workers, generator=seeded()),
            "few": loader(dataset=Rows(9), sampler=OwnGenerator9(), shuffle=None, num_workers=workers),
            "stream": DataLoader(Numbers(13, shuffled=True), batch_size=4),
            "state": with_state(Resumable(17)),
        }
        return CombinedLoader(parts, mode)

    # Where the shortest ends the epoch, workers have had the other ones draw ahead, further than it went.
    now = 2 if mode == "min_size" else 0
    assert_exact(tmp_path, lambda: data(2), resumed=lambda: data(now), steps=(1, 3, 5))


class OwnGenerator9(OwnGenerator):
    def __iter__(self) -> Iterator[int]:
        return (row % 9 for row in super().__iter__())


class Module(pl.LightningDataModule):
    """Chooses its rows anew for each loader, and counts that in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        return loader(dataset=Rows(10 + self.made), num_workers=self.made % 2)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The loader that is asked for first on a resume is the one of then.
        self.made = state["made"] - 1


def test_a_datamodule_with_state_and_reloads(tmp_path: Path) -> None:
    whole = assert_exact(tmp_path, Module, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(whole.seen) == 3 + 3 + 4


# -- seeking -----------------------------------------------------------------------------------------------------


class Virtual(Rows):
    """More rows than anybody reads; counts what is read."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return super().__getitem__(index)


def test_a_million_batches_in_no_row_before_is_read(tmp_path: Path) -> None:
    """The position of a file is moved there: that many steps would take an hour."""

    def data() -> Any:
        return DataLoader(Virtual(4_000_010), batch_size=4, shuffle=True)

    resumed = data()
    stream = pl.training.data.BatchStream(resumed, stage="train", index=0, seed=1)
    state = stream.state(mid_epoch=True)
    state["begin"] = stream.begin_state()
    batches = stream.resume(0, 1_000_000, state, nothing_left=False)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert len(resumed.dataset.read) == len(set(resumed.dataset.read)) == 10
