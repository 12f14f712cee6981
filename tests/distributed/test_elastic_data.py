"""A job that goes on with another number of processes sees the rows that it would have seen anyway."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.utilities.combined_loader import CombinedLoader

from .ranks import run_ranks

ROWS = 45


class Rows(Dataset[Any]):
    """Rows that know their number, and keep which of them were loaded in this process."""

    def __init__(self, count: int = ROWS) -> None:
        self.count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.stack([self[one] for one in index])
        self.loaded.append(int(index))
        return torch.tensor([float(index)])


class Lazy(Sampler[int]):
    """A user's sampler, which draws each row when it is asked for it."""

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        for _ in range(ROWS):
            yield int(torch.randint(ROWS, ()))


class Shuffled(Sampler[list[int]]):
    """A user's batch sampler: batches of ``size`` neighbours, in random order."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return -(-ROWS // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in torch.randperm(len(self)).tolist():
            yield list(range(ROWS))[first * self.size : (first + 1) * self.size]


def loader_of(kind: str, batch: int) -> Any:
    data, seven = Rows(), torch.Generator().manual_seed(7)
    more: dict[str, Any] = {"batch_size": batch}
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data, shuffle=True, **more)
    if kind == "items":
        return DataLoader(data, batch_size=None, shuffle=True, collate_fn=None)
    if kind == "batches":
        return DataLoader(data, batch_sampler=Shuffled(3))
    if kind in MODES:
        return CombinedLoader(
            [DataLoader(data, shuffle=True, **more), DataLoader(Rows(20), shuffle=True, **more)], kind
        )
    return DataLoader(data, **more, **{
        "sequential": {},
        "random": {"shuffle": True},
        "drop_last": {"shuffle": True, "drop_last": True},
        "generator": {"shuffle": True, "generator": seven},
        "weighted": {"sampler": WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS)},
        "weighted own": {"sampler": WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS, generator=seven)},
        "replacement": {"sampler": RandomSampler(data, replacement=True, generator=seven)},
        "long": {"sampler": RandomSampler(data, num_samples=2 * ROWS - 2)},
        "subset": {"sampler": SubsetRandomSampler(range(3, 43))},
        "workers": {"shuffle": True, "num_workers": 2},
        "persistent": {"sampler": Lazy(), "num_workers": 2, "persistent_workers": True},
        "lazy": {"sampler": Lazy()},
    }[kind])  # fmt: skip


MODES = ("min_size", "max_size", "max_size_cycle")


class Model(pl.LightningModule):
    """Keeps the rows of each batch that it is trained on, and draws from its generators, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, int, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = [rows_of(part) for part in batch] if isinstance(batch, list) else rows_of(batch)
        self.seen.append((self.current_epoch, batch_idx, rows))
        torch.rand(3)
        first = next(part for part in batch if part is not None) if isinstance(batch, list) else batch
        return self.layer(first.view(-1, 1) / ROWS).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def rows_of(batch: Any) -> list[int]:
    return [] if batch is None else [int(row) for row in batch.view(-1)]


@dataclass
class Life:
    """One life of a run: its processes, and from where to where it trains.

    Attributes:
        ranks: How many.
        batch: Rows in a batch of one of them.
        after: The step of the checkpoint that it goes on from; None for a fresh start.
        of: The directory of that checkpoint.
        steps: It ends after this many in all.
        epochs: Or after these.
    """

    ranks: int
    batch: int
    after: int | None = None
    of: str = ""
    steps: int = -1
    epochs: int = 2


def fit(kind: str, life: Life, place: str) -> Any:
    """What a rank sees of a life: the rows of each batch, what it has loaded, and batches in an epoch."""
    torch.manual_seed(11)
    model, loader = Model(), loader_of(kind, life.batch)
    saving = ModelCheckpoint(
        os.path.join(place, kind), filename="{step}", every_n_train_steps=2, save_top_k=-1,
        auto_insert_metric_name=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        strategy="ddp", accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=saving, max_steps=life.steps, max_epochs=life.epochs,
    )  # fmt: skip
    path = None if life.after is None else os.path.join(life.of, kind, f"{life.after}.ckpt")
    trainer.fit(model, loader, ckpt_path=path)
    dataset = getattr(loader, "dataset", None)
    return model.seen, [] if dataset is None else dataset.loaded, trainer.num_training_batches


def fits(kinds: Sequence[str], life: Life, place: str) -> dict[str, Any]:
    return {kind: fit(kind, life, place) for kind in kinds}


@dataclass
class Seen:
    """What all ranks saw of a life, for one kind of loader.

    Attributes:
        parts: The rows that each rank had of each global batch, by epoch and number.
        loaded: The rows that each rank loaded, in this process.
        batches: Batches in an epoch.
    """

    parts: dict[tuple[int, int], list[Any]]
    loaded: list[list[int]]
    batches: set[int]

    @property
    def rows(self) -> dict[tuple[int, int], list[Any]]:
        """The rows of each global batch, in their order; with several loaders those of each."""
        return {where: joined(parts) for where, parts in self.parts.items()}


def joined(parts: list[Any]) -> list[Any]:
    if parts and isinstance(parts[0], list) and parts[0] and isinstance(parts[0][0], list):
        return [joined(list(of_one)) for of_one in zip(*parts, strict=True)]
    return [row for part in parts for row in part]


def lives(kinds: Sequence[str], life: Life, place: Path) -> dict[str, Seen]:
    """One life of a run on each kind of loader, all in the same processes."""
    found = run_ranks(fits, kinds, life, str(place), ranks=life.ranks)
    seen: dict[str, Seen] = {}
    for kind in kinds:
        parts: dict[tuple[int, int], list[Any]] = {}
        for batches, _, _ in (one[kind] for one in found):
            for epoch, index, rows in batches:
                parts.setdefault((epoch, index), []).append(rows)
        assert all(len(one) == life.ranks for one in parts.values())
        seen[kind] = Seen(parts, [one[kind][1] for one in found], {one[kind][2] for one in found})
    return seen


def after(rows: dict[tuple[int, int], Any], position: tuple[int, int]) -> dict[tuple[int, int], Any]:
    return {where: found for where, found in rows.items() if where >= position}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


KINDS = ("sequential", "random", "drop_last", "generator", "weighted", "weighted own", "replacement", "long",
         "subset", "lazy", "stateful", "workers", "persistent", *MODES)  # fmt: skip
ONCE = ("sequential", "random", "generator", "stateful", "workers")
WORKERS = ("workers", "persistent")


@pytest.fixture(scope="module")
def two(place: Path) -> dict[str, Seen]:
    """A run of two ranks that is never stopped."""
    return lives((*KINDS, "batches", "items"), Life(2, 6), place / "two")


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def gone_on(request: pytest.FixtureRequest, place: Path, two: Any) -> tuple[int, dict[str, Seen]]:
    """What is left of that run behind its second batch, on a number of processes."""
    ranks = request.param
    life = Life(ranks, 12 // ranks, after=2, of=str(place / "two"))
    here = [kind for kind in KINDS if kind not in WORKERS]
    kinds = {
        1: (*here, "batches", "items"),
        2: ("random", "weighted own", "lazy", "stateful"),
        3: (*KINDS, "batches"),
        4: ("random", "weighted", "lazy", "max_size_cycle", "batches", "items"),
    }[ranks]
    return ranks, lives(kinds, life, place / f"two on {ranks}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MODES])
def test_the_parts_of_a_global_batch_are_contiguous_and_of_one_size(two: dict[str, Seen], kind: str) -> None:
    seen, count = two[kind], {"drop_last": 3, "long": 8}.get(kind, 4)
    assert seen.batches == {count}
    assert sorted(seen.parts) == [(epoch, index) for epoch in (0, 1) for index in range(count)]
    for (_, index), (first, second) in seen.parts.items():
        assert (
            (len(first), len(second)) == (6, 6) if index < count - 1 else len(second) - len(first) in (0, 1)
        )
    if kind in ONCE:
        for epoch in (0, 1):
            order = [row for (of, _), rows in seen.rows.items() if of == epoch for row in rows]
            assert sorted(order) == list(range(45))
            assert (order == list(range(45))) == (kind == "sequential")


def test_what_the_model_draws_and_who_loads_the_rows_do_not_matter_for_the_order(
    two: dict[str, Seen],
) -> None:
    assert two["workers"].rows == two["random"].rows
    assert two["persistent"].rows == two["lazy"].rows
    assert two["generator"].rows != two["random"].rows  # which has another seed


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_global_batches_on_any_number_of_ranks(
    two: dict[str, Seen], gone_on: tuple[int, dict[str, Seen]], kind: str
) -> None:
    _, rest = gone_on
    if kind in rest:
        assert rest[kind].rows == after(two[kind].rows, (0, 2))
        assert rest[kind].batches == two[kind].batches
        sizes = [[len(part) for part in parts] for parts in rest[kind].parts.values() if kind not in MODES]
        assert all(max(found) - min(found) <= 1 for found in sizes)


@pytest.mark.parametrize("kind", ["random", "weighted own", "lazy"])
def test_rows_before_the_position_are_not_loaded(gone_on: tuple[int, dict[str, Seen]], kind: str) -> None:
    ranks, rest = gone_on
    for rank in range(ranks if kind in rest else 0):
        assert rest[kind].loaded[rank] == [row for parts in rest[kind].parts.values() for row in parts[rank]]


@pytest.mark.parametrize("kind", ["batches", "items"])
def test_what_a_batch_sampler_gives_is_not_taken_apart_and_comes_once(
    two: dict[str, Seen], gone_on: tuple[int, dict[str, Seen]], kind: str
) -> None:
    """Its items are dealt out: with other ranks there are others of them side by side, in the same order."""
    ranks, rest = gone_on
    size = 3 if kind == "batches" else 1
    steps = {"batches": 8, "items": 23}[kind]  # of 15 batches and 45 rows
    assert two[kind].batches == {steps}
    whole = [row for (epoch, _), rows in two[kind].rows.items() if epoch == 0 for row in rows]
    repeated = whole[-2 * size : -size]
    assert sorted(whole[:-size]) == list(range(45)) and whole[-size:] == repeated
    if kind in rest:
        left = [row for (epoch, _), rows in rest[kind].rows.items() if epoch == 0 for row in rows]
        assert left[: 45 - 4 * size] == whole[4 * size : -size]
        assert set(left) == set(whole[4 * size :])
        assert rest[kind].batches == {-(-45 // (size * ranks))}


def test_a_run_of_one_process_goes_on_with_two(place: Path) -> None:
    """It draws as torch does, so the epoch that is under way is the one that one process would have seen."""
    kinds = ("random", "generator", "weighted own", "lazy", "max_size")
    one = lives(kinds, Life(1, 12), place / "one")
    rest = lives(kinds, Life(2, 6, after=2, of=str(place / "one")), place / "one on two")
    for kind in kinds:
        first = {where: rows for where, rows in one[kind].rows.items() if where[0] == 0}
        assert {where: rows for where, rows in rest[kind].rows.items() if where[0] == 0} == after(
            first, (0, 2)
        )
        second = [rows for where, rows in rest[kind].rows.items() if where[0] == 1]
        if kind in ("random", "generator"):
            assert sorted(joined(second)) == list(range(45))
        if kind in ("generator", "weighted own"):  # from which the model does not draw
            assert second == [rows for where, rows in one[kind].rows.items() if where[0] == 1]
    # And back in one process it is still the same run.
    back = lives(kinds, Life(1, 12, after=6, of=str(place / "one on two")), place / "one again")
    for kind in kinds:
        assert back[kind].rows == after(rest[kind].rows, (1, 2))


def test_four_and_two_and_four_ranks_in_one_epoch(place: Path) -> None:
    whole = lives(["long"], Life(4, 3), place / "whole")["long"]
    first = lives(["long"], Life(4, 3, steps=2), place / "first")["long"]
    second = lives(["long"], Life(2, 6, after=2, of=str(place / "first"), steps=4), place / "second")["long"]
    third = lives(["long"], Life(4, 3, after=4, of=str(place / "second")), place / "third")["long"]
    assert {**first.rows, **second.rows, **third.rows} == whole.rows
    assert [sorted(one.rows)[0] for one in (first, second, third)] == [(0, 0), (0, 2), (0, 4)]
    assert third.parts == after(whole.parts, (0, 4))


@pytest.mark.parametrize(("ranks", "batch"), [(1, 5), (2, 5), (3, 7)])
def test_another_global_batch_size_goes_on_at_the_same_row(
    place: Path, two: dict[str, Seen], ranks: int, batch: int
) -> None:
    """The first batch is a short one, up to where the batches of the new size begin."""
    kinds = ("random", "weighted own", "lazy")
    rest = lives(
        kinds, Life(ranks, batch, after=2, of=str(place / "two"), epochs=1), place / f"{ranks}x{batch}"
    )
    for kind in kinds:
        order = [row for (epoch, _), rows in two[kind].rows.items() if epoch == 0 for row in rows]
        size = ranks * batch
        edges = [24, *range(24 // size * size + size, 45, size), 45]
        expected = [order[begin:end] for begin, end in itertools.pairwise(edges)]
        assert list(rest[kind].rows.values()) == expected
        assert sorted(rest[kind].rows)[0] == (0, 24 // size)
