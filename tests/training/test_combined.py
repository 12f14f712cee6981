"""Several loaders at once: which batches meet, how many there are, and an exact resume in the middle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, WeightedRandomSampler

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.utilities.combined_loader import CombinedLoader
from tests.training.toys import trainer

MODES = ("min_size", "max_size", "max_size_cycle")


class Rows(Dataset[Any]):
    """Row ``i`` is ``first + i`` with a bit of noise; remembers what was asked for."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count = count
        self.first = first
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return torch.tensor(float(self.first + index)), torch.rand(()) + random.random()


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.count):
            yield torch.tensor(float(index)), torch.rand(())


def loader(count: int, first: int = 0, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Rows(count, first), **{"batch_size": 2, "shuffle": True, **arguments})


def flat(batch: Any) -> list[float]:
    """Every number in a batch, None as -1."""
    if batch is None:
        return [-1.0]
    if isinstance(batch, torch.Tensor):
        return batch.flatten().tolist()
    parts = batch.values() if isinstance(batch, dict) else batch
    return [number for part in parts for number in flat(part)]


class Noisy(pl.LightningModule):
    """Its weights depend on every number that it is given, in order, and on dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        numbers = flat(batch)
        self.seen.append(numbers)
        noise = torch.nn.functional.dropout(self.weight, 0.5) * random.random()
        return (noise * torch.tensor(numbers).sum().cos()).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(data: Any, directory: Path | None = None, ckpt_path: Any = None, **arguments: Any) -> Noisy:
    torch.manual_seed(4)
    random.seed(4)
    saving = {}
    if directory is None and ckpt_path is not None:
        directory = ckpt_path.parent / "resumed"
    if directory is not None:
        saving["callbacks"] = ModelCheckpoint(
            directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
        )
    model = Noisy()
    trainer(**{"max_epochs": 2, **saving, **arguments}).fit(model, data, ckpt_path=ckpt_path)
    return model


# -- CombinedLoader by itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [({"a": 0, "b": 10}, 0, 0), ({"a": 1, "b": 11}, 1, 0)]),
        ("max_size", [({"a": 0, "b": 10}, 0, 0), ({"a": 1, "b": 11}, 1, 0), ({"a": None, "b": 12}, 2, 0)]),
        ("max_size_cycle", [({"a": 0, "b": 10}, 0, 0), ({"a": 1, "b": 11}, 1, 0), ({"a": 0, "b": 12}, 2, 0)]),
        ("sequential", [(0, 0, 0), (1, 1, 0), (10, 0, 1), (11, 1, 1), (12, 2, 1)]),
    ],
)
def test_modes(mode: Any, expected: list[Any]) -> None:
    combined = CombinedLoader({"a": range(2), "b": [10, 11, 12]}, mode)
    assert list(combined) == expected
    assert list(combined) == expected
    assert len(combined) == len(expected)


def test_nesting_is_kept() -> None:
    iterables = {"x": [range(1), range(2)], "y": (range(1), {"z": range(3)})}
    combined = CombinedLoader(iterables, "max_size")
    assert combined.flattened == [range(1), range(2), range(1), range(3)]
    assert next(iter(combined)) == ({"x": [0, 0], "y": (0, {"z": 0})}, 0, 0)
    combined.flattened = [range(5), range(6), range(7), range(8)]
    assert combined.iterables == {"x": [range(5), range(6)], "y": (range(7), {"z": range(8)})}


def test_samplers_of_the_parts() -> None:
    first = loader(4)
    combined = CombinedLoader([first, range(3)])
    assert combined.sampler == [first.sampler, None]
    assert combined.batch_sampler == [first.batch_sampler, None]


@pytest.mark.parametrize(("limits", "length"), [(None, 5), (1, 2), ([2, 0], 2), ([9, 1], 3)])
def test_limits_of_a_sequence(limits: Any, length: int) -> None:
    combined = CombinedLoader([range(2), range(3)], "sequential")
    combined.limits = limits
    assert len(combined) == len(list(combined)) == length


def test_reset_begins_anew_and_stops_the_workers() -> None:
    combined = CombinedLoader([loader(4, num_workers=1, persistent_workers=True), range(2)])
    next(iter(combined))
    workers = combined._iterators[0]._workers  # type: ignore[attr-defined]
    combined.reset()
    assert [worker.is_alive() for worker in workers] == [False]
    assert len(list(combined)) == 2


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: CombinedLoader([], "all"),  # type: ignore[arg-type]
            ValueError,
            "CombinedLoader(mode='all'): expected one of 'min_size', 'max_size_cycle', 'max_size', 'sequential'.",
        ),
        (
            lambda: setattr(CombinedLoader([range(1), range(2)]), "flattened", [range(1)]),
            ValueError,
            "CombinedLoader.flattened: expected 2 iterables, found 1.",
        ),
        (
            lambda: setattr(CombinedLoader([range(1), range(2)]), "limits", [1]),
            ValueError,
            "CombinedLoader.limits: expected 2 limits, one for each iterable, found 1.",
        ),
        (
            lambda: len(CombinedLoader([range(1), iter(())], "max_size")),
            TypeError,
            "CombinedLoader(mode='max_size') has no length: one of its iterables has none.",
        ),
        (
            lambda: next(CombinedLoader([range(1)])),
            RuntimeError,
            "next(combined_loader) works after iter(combined_loader) only.",
        ),
    ],
)
def test_misuse_is_named(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as refused:
        call()
    assert str(refused.value) == message


# -- in a run --------------------------------------------------------------------------------------------------


def test_training_on_a_list_goes_on_until_the_longest_has_ended() -> None:
    run, model = trainer(), Noisy()
    data = {"short": loader(4, shuffle=False), "long": loader(10, 100, shuffle=False)}
    run.fit(model, data)
    assert run.num_training_batches == run.global_step == 5
    assert run.train_dataloader is data
    rows = [[n for n in seen if n == int(n)] for seen in model.seen]
    assert rows == [
        [0, 1, 100, 101], [2, 3, 102, 103], [0, 1, 104, 105], [2, 3, 106, 107], [0, 1, 108, 109],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "full", "half"), [("min_size", 2, 1), ("max_size", 5, 2), ("max_size_cycle", 5, 2)]
)
def test_limits_count_rounds(mode: Any, full: int, half: int) -> None:
    for limit, expected in ((None, full), (0.5, half), (1, 1), (9, full)):
        run = trainer(limit_train_batches=limit)
        run.fit(Noisy(), CombinedLoader([loader(4), loader(10)], mode))
        assert (run.num_training_batches, run.global_step) == (expected, expected)


class Estimated(Sampler[Any]):
    """Three batches of two rows, of which it says that they are five: one that packs rows can only guess."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        return iter([[0, 1], [2, 3], [4, 5]])


def test_a_part_that_gives_fewer_batches_than_it_says_goes_round_all_the_same(tmp_path: Path) -> None:
    def data() -> Any:
        return [DataLoader(Rows(6), batch_sampler=Estimated()), loader(24, 100, shuffle=False)]

    whole = train(data(), tmp_path, max_epochs=1)
    rows = [[n for n in seen if n == int(n)] for seen in whole.seen]
    first = [[0, 1], [2, 3], [4, 5]] * 4
    assert rows == [[*own, 100 + 2 * at, 101 + 2 * at] for at, own in enumerate(first)]
    for step in (2, 3, 8):
        rest = train(data(), ckpt_path=tmp_path / f"{step}.ckpt", max_epochs=1)
        assert rest.seen == whole.seen[step:]
        assert torch.equal(rest.weight, whole.weight)


def test_training_on_loaders_in_turn_is_refused() -> None:
    with pytest.raises(pl.ConfigError) as refused:
        trainer().fit(Noisy(), CombinedLoader([loader(4)], "sequential"))
    assert str(refused.value) == (
        'trainer.fit cannot train on a CombinedLoader(mode="sequential"). Take "min_size", "max_size" or '
        '"max_size_cycle", or one loader over a torch.utils.data.ConcatDataset.'
    )


def workers_of(part: DataLoader[Any], workers: int) -> DataLoader[Any]:
    return DataLoader(
        part.dataset, batch_size=part.batch_size, sampler=part.sampler, num_workers=workers,
        persistent_workers=workers > 0 and len(part) == 2,
    )  # fmt: skip


def three(workers: int) -> list[Any]:
    weighted = WeightedRandomSampler([1.0] * 5, 5, generator=torch.Generator().manual_seed(1))
    parts = [loader(3), loader(10, 100), loader(5, 200, shuffle=False, sampler=weighted)]
    return [workers_of(part, workers) for part in parts]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_after_each_step_ends_in_the_same_bits(tmp_path: Path, mode: Any, workers: int) -> None:
    whole = train(CombinedLoader(three(workers), mode), tmp_path)
    steps = len(whole.seen)
    assert steps == 2 * (2 if mode == "min_size" else 5)
    for step in range(1, steps) if workers == 0 else (1, 3, steps - 2):
        rest = train(CombinedLoader(three(workers), mode), ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.seen == whole.seen[step:]
        assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_where_no_part_but_one_has_a_length(tmp_path: Path, mode: Any) -> None:
    def data() -> Any:
        return CombinedLoader(
            {"rows": loader(3), "stream": DataLoader(Stream(9), batch_size=2), "list": [torch.ones(1)] * 3},
            mode,
        )

    whole = train(data(), tmp_path)
    assert len(whole.seen) == 2 * (2 if mode == "min_size" else 5)
    for step in range(1, len(whole.seen)):
        rest = train(data(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.seen == whole.seen[step:]
        assert torch.equal(rest.weight, whole.weight)


class Stateful:
    """A loader that knows where it is, as torchdata's does."""

    def __init__(self, count: int) -> None:
        self.count, self.position, self.begin = count, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.position, self.begin = self.begin, 0
        while self.position < self.count:
            self.position += 1
            yield torch.tensor(float(self.position)), torch.rand(())

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["position"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [lambda: loader(9), lambda: DataLoader(Stream(9), batch_size=2)])
def test_resumed_beside_a_loader_with_a_state(tmp_path: Path, mode: Any, other: Any) -> None:
    whole = train(CombinedLoader([Stateful(3), other()], mode), tmp_path)
    for step in range(1, len(whole.seen)):
        rest = train(CombinedLoader([Stateful(3), other()], mode), ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.seen == whole.seen[step:]
        assert torch.equal(rest.weight, whole.weight)


def sharing_a_generator() -> list[Any]:
    shared = torch.Generator().manual_seed(11)
    return [
        loader(6, generator=shared), loader(11, 100, batch_size=3, generator=shared), loader(4, 200, batch_size=3)
    ]  # fmt: skip


def ending_inside_of_a_pass() -> list[Any]:
    return [DataLoader(Stream(6), batch_size=1), loader(4, batch_size=1)]


@pytest.mark.parametrize("parts", [sharing_a_generator, ending_inside_of_a_pass])
@pytest.mark.parametrize("mode", MODES)
def test_resumed_with_parts_that_are_harder(tmp_path: Path, parts: Any, mode: Any) -> None:
    whole = train(CombinedLoader(parts(), mode), tmp_path, max_epochs=3)
    for step in range(1, len(whole.seen)):
        rest = train(CombinedLoader(parts(), mode), ckpt_path=tmp_path / f"{step}.ckpt", max_epochs=3)
        assert rest.seen == whole.seen[step:]
        assert torch.equal(rest.weight, whole.weight)


def test_a_second_resume_in_the_same_epoch(tmp_path: Path) -> None:
    whole = train(CombinedLoader(three(0), "max_size_cycle"))
    train(CombinedLoader(three(0), "max_size_cycle"), tmp_path, max_steps=2)
    train(CombinedLoader(three(0), "max_size_cycle"), tmp_path, tmp_path / "2.ckpt", max_steps=4)
    rest = train(CombinedLoader(three(0), "max_size_cycle"), ckpt_path=tmp_path / "4.ckpt")
    assert rest.seen == whole.seen[4:]
    assert torch.equal(rest.weight, whole.weight)


def test_rows_before_the_position_are_not_loaded(tmp_path: Path) -> None:
    train([loader(4), loader(10)], tmp_path, max_epochs=1)
    parts = [loader(4), loader(10)]
    train(parts, ckpt_path=tmp_path / "3.ckpt", max_epochs=1)
    # Batch 3 of the short one is the second of its second round.
    assert [len(part.dataset.asked) for part in parts] == [2 + 2, 4]


def test_another_batch_size_of_a_part_is_said(tmp_path: Path) -> None:
    train([loader(4), loader(12)], tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="batch") as said:
        train([loader(4), loader(12, batch_size=3)], ckpt_path=tmp_path / "1.ckpt", max_epochs=1)
    assert (
        "The batch size of training loader 1 was 2 and is 3: this epoch goes on at the same number of "
        "batches, and so at another row."
    ) in [str(warning.message) for warning in said]


class Evaluated(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = -1) -> None:
        rows = [part if part is None else part[0].tolist() for part in batch]
        self.calls.append((rows, batch_idx, dataloader_idx))
        self.log("sum", float(batch_idx), reduce_fx="sum")


@pytest.mark.parametrize(
    ("mode", "limit", "batches", "rounds"),
    [
        ("min_size", 1.0, [1, 3], 1),
        ("max_size", 1.0, [1, 3], 3),
        ("max_size_cycle", 2, [1, 2], 2),
        ("max_size", 2, [1, 2], 2),
    ],
)
def test_validation_side_by_side(mode: Any, limit: Any, batches: list[int], rounds: int) -> None:
    run, model = trainer(limit_val_batches=limit), Evaluated()
    parts = [loader(2, shuffle=False), loader(6, 10, shuffle=False)]
    assert run.validate(model, CombinedLoader(parts, mode), verbose=False) == [{"sum": sum(range(rounds))}]
    assert run.num_val_batches == batches
    again = [0.0, 1.0] if mode == "max_size_cycle" else None
    expected = [([again if index else [0.0, 1.0], [10.0 + 2 * index, 11.0 + 2 * index]], index, -1)
                for index in range(rounds)]  # fmt: skip
    assert model.calls == expected


def test_prediction_side_by_side_is_refused() -> None:
    class Predicted(Noisy):
        def predict_step(self, batch: Any) -> Any:
            return batch

    with pytest.raises(pl.ConfigError) as refused:
        trainer().predict(Predicted(), CombinedLoader([loader(2)], "min_size"))
    assert str(refused.value) == (
        'trainer.predict cannot run over a CombinedLoader(mode="min_size"): its batches hold those of several '
        'loaders. Take mode="sequential", or give the loaders as a list.'
    )


def test_nested_loaders_are_validated_in_turn() -> None:
    class Numbers(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = -1) -> None:
            self.calls.append((batch[0].tolist(), batch_idx, dataloader_idx))

    model, run = Numbers(), trainer()
    parts = {"x": [loader(2, shuffle=False), loader(2, 4, shuffle=False)], "y": loader(2, 8, shuffle=False)}
    assert run.validate(model, parts, verbose=False) == [{}, {}, {}]
    assert model.calls == [([0.0, 1.0], 0, 0), ([4.0, 5.0], 0, 1), ([8.0, 9.0], 0, 2)]
    assert run.evaluation_loop is not None
    assert run.evaluation_loop.loaders is parts
