"""Batches from any position: which rows are loaded, in which order, and with which random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import holdfast as pl
from holdfast.training import rng
from holdfast.training.data import BatchStream, batch_size_of


class Recorded(Dataset[Any]):
    """Remembers which rows were asked for."""

    def __init__(self, count: int = 20) -> None:
        self.count = count
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


class Drawing(Recorded):
    """Every row holds draws from three generators."""

    def __getitem__(self, index: int) -> Any:
        return index, random.random(), numpy.random.rand(), torch.rand(()).item()


def stream_of(loader: Any, seed: int = 1) -> BatchStream:
    return BatchStream(loader, stage="train", index=0, seed=seed)


def listed(batches: Iterator[Any]) -> list[Any]:
    return [torch.stack([torch.as_tensor(part) for part in batch]).tolist() for batch in batches]


def test_seeking_loads_no_row_before_the_position() -> None:
    dataset = Recorded()
    stream = stream_of(DataLoader(dataset, batch_size=2, shuffle=True))
    torch.manual_seed(3)
    whole = [batch.tolist() for batch in stream.start(0)]
    state = stream.state(mid_epoch=True)
    dataset.asked.clear()
    rest = [batch.tolist() for batch in stream.resume(0, 7, state, nothing_left=False)]
    assert rest == whole[7:]
    assert dataset.asked == [row for batch in whole[7:] for row in batch]


def test_the_order_is_what_torch_gives_for_the_seed() -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(50)), batch_size=4, shuffle=True)

    torch.manual_seed(5)
    plain = [batch[0].tolist() for _ in range(2) for batch in loader()]
    torch.manual_seed(5)
    stream = stream_of(loader())
    ours = [batch[0].tolist() for epoch in range(2) for batch in stream.start(epoch)]
    assert ours == plain


@given(seed=st.integers(0, 2**63), position=st.integers(0, 9), between=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_draws_in_a_dataset_depend_on_the_batch_alone(seed: int, position: int, between: int) -> None:
    stream = stream_of(DataLoader(Drawing(), batch_size=2), seed)
    torch.manual_seed(0)
    whole = listed(stream.start(4))
    state = stream.state(mid_epoch=True)
    torch.rand(between)
    random.random()
    rest = listed(stream.resume(4, position, state, nothing_left=False))
    assert rest == whole[position:]
    assert listed(stream.start(5)) != whole


def test_draws_in_a_dataset_leave_the_runs_generators_alone() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    expected = torch.rand(3).tolist(), random.random(), numpy.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    stream = stream_of(DataLoader(Drawing(), batch_size=2, generator=torch.Generator()))
    assert len(list(stream.start(0))) == 10
    assert (torch.rand(3).tolist(), random.random(), numpy.random.rand()) == expected


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("position", [1, 2, 3, 4])
def test_a_samplers_own_generator_goes_on_where_it_was(position: int, workers: int) -> None:
    """An incomplete last batch ends the sampler, which then draws once more, when that batch is fetched."""

    def made() -> BatchStream:
        generator = torch.Generator().manual_seed(5)
        sampler = RandomSampler(range(7), generator=generator)
        return stream_of(DataLoader(Recorded(7), batch_size=2, sampler=sampler, num_workers=workers))

    whole = made()
    epoch = whole.start(0)
    first = [next(epoch).tolist() for _ in range(position)]
    state = whole.state(mid_epoch=True)
    first += [batch.tolist() for batch in epoch]
    second = [batch.tolist() for batch in whole.start(1)]
    resumed = made()
    rest = resumed.resume(0, position, state, nothing_left=False)
    assert [batch.tolist() for batch in rest] == first[position:]
    assert [batch.tolist() for batch in resumed.start(1)] == second


def test_a_loader_that_draws_for_each_batch_goes_on_where_it_was() -> None:
    class Drawn:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(3)

        def __iter__(self) -> Iterator[Any]:
            return (torch.rand(1, generator=self.generator) for _ in range(5))

    stream = stream_of(Drawn())
    epoch = stream.start(0)
    whole = [next(epoch).item() for _ in range(2)]
    state = stream.state(mid_epoch=True)
    whole += [batch.item() for batch in epoch]
    rest = stream_of(Drawn()).resume(0, 2, state, nothing_left=False)
    assert [batch.item() for batch in rest] == whole[2:]


def test_an_iterable_is_replayed_with_the_same_draws() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for index in range(12):
                yield index, random.random(), torch.rand(()).item()

    stream = stream_of(DataLoader(Stream(), batch_size=3))
    torch.manual_seed(1)
    whole = listed(stream.start(0))
    state = stream.state(mid_epoch=True)
    torch.rand(9)
    assert listed(stream.resume(0, 2, state, nothing_left=False)) == whole[2:]


def test_a_loader_that_iterates_in_its_own_way_is_replayed() -> None:
    class Doubled(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch
                yield batch

        def __len__(self) -> int:
            return 2 * super().__len__()

    stream = stream_of(Doubled(Drawing(8), batch_size=2, shuffle=True))
    torch.manual_seed(2)
    whole = listed(stream.start(0))
    assert listed(stream.resume(0, 3, stream.state(mid_epoch=True), nothing_left=False)) == whole[3:]


def test_data_that_ends_before_the_position_is_named() -> None:
    stream = stream_of([torch.zeros(1)] * 3)
    list(stream.start(0))
    with pytest.raises(pl.CheckpointIncompatible) as refused:
        stream.resume(0, 5, stream.state(mid_epoch=True), nothing_left=False)
    assert str(refused.value) == (
        "The checkpoint is 5 batches into the epoch, but the training data ended after 3. "
        "Give the run the data it was started with."
    )


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        (torch.zeros(()), 1),
        ([torch.zeros(3), torch.zeros(4)], 3),
        ({"text": ["a", "b", "c"], "label": torch.zeros(2)}, 2),
        ({"id": 7, "image": torch.zeros(4, 1)}, 4),
        ((None, 1.5, [], [torch.zeros(5)]), 5),
        ((numpy.zeros((3, 2)), torch.zeros(4)), 4),
        ({"image": numpy.zeros((3, 2))}, 3),
        ({"image": torch.zeros(6, 1)}, 6),
        ([], 1),
        (None, 1),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size_of(batch) == size


class TestGenerators:
    def test_the_state_brings_every_draw_back(self) -> None:
        numpy.random.randn()  # leaves the second of a pair waiting
        state = rng.capture()
        drawn = [random.gauss(0, 1), numpy.random.randn(), torch.rand(()).item()]
        assert rng.restore(state) == []
        assert [random.gauss(0, 1), numpy.random.randn(), torch.rand(()).item()] == drawn

    def test_a_block_on_generators_of_its_own(self) -> None:
        random.seed(0)
        expected = [random.random(), random.random()]
        random.seed(0)
        first = random.random()
        with rng.apart(7):
            inside = random.random(), numpy.random.rand(), torch.rand(()).item()
        assert [first, random.random()] == expected
        with rng.apart(7):
            assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == inside

    @given(base=st.integers(0, 2**64 - 1))
    def test_seeds_of_neighbouring_batches_differ(self, base: int) -> None:
        seeds = {rng.mix(base, index) for index in range(50)}
        assert len(seeds) == 50
        assert all(0 <= seed < 2**64 for seed in seeds)

    def test_seeds_depend_on_every_part(self) -> None:
        assert (
            len(
                {rng.derive(1, "a", 2), rng.derive(1, "a", 3), rng.derive(1, "b", 2), rng.derive("1", "a", 2)}
            )
            == 4
        )

    def test_seed_everything(self) -> None:
        assert pl.seed_everything(11, verbose=False) == 11
        drawn = random.random(), numpy.random.rand(), torch.rand(()).item()
        pl.seed_everything(11, verbose=False)
        assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == drawn
        with pytest.raises(pl.ConfigError) as refused:
            pl.seed_everything(-1)
        assert str(refused.value) == "seed_everything(-1): the seed must lie between 0 and 4294967295."


class TestDescription:
    """What `exactness` reads of a loader."""

    def test_of_rows(self) -> None:
        loader = DataLoader(Recorded(), batch_size=4, shuffle=True, num_workers=2, in_order=False)
        assert stream_of(loader).describe() == {
            "kind": "sought",
            "loader": "DataLoader over Recorded",
            "iterable": False,
            "workers": 2,
            "in_order": False,
            "batch_size": 4,
            "rows": 20,
            "foreign_sampler": False,
            "keeps_generators": False,
        }

    def test_of_a_list_of_batches(self) -> None:
        assert stream_of([torch.zeros(1)]).describe() == {
            "kind": "replayed",
            "loader": "list",
            "iterable": True,
            "workers": 0,
            "in_order": True,
            "batch_size": None,
            "rows": None,
            "foreign_sampler": False,
            "keeps_generators": False,
        }
