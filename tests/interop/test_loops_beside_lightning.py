"""The same batches in the same order, counted in the same way: holdfast's loops beside Lightning's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import holdfast
from holdfast.utilities.combined_loader import CombinedLoader

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

if True:  # after the skip
    from lightning.pytorch.utilities.combined_loader import CombinedLoader as TheirCombinedLoader

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Numbers(Dataset[Any]):
    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(self.first + index)


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor(index) for index in range(self.count))


def loader(count: int, first: int = 0, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(count, first), **{"batch_size": 2, "shuffle": True, **arguments})


def stream(count: int) -> DataLoader[Any]:
    return DataLoader(Stream(count), batch_size=2)


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: plain(part) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(part) for part in batch]
    return None if batch is None else batch.tolist()


def recorder(pl: Any, stop_at: int | None) -> Any:
    class Recorder(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.trace: list[Any] = []

        def note(self, *what: Any) -> None:
            self.trace.append((*what, self.trainer.current_epoch, self.trainer.global_step))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.note("train", batch_idx, plain(batch))
            if stop_at is not None and self.trainer.global_step >= stop_at:
                self.trainer.should_stop = True
            return self.layer(torch.ones(1, 1)).sum()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = -1) -> None:
            self.note("validate", batch_idx, plain(batch), dataloader_idx)

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = -1) -> None:
            self.note("test", batch_idx, plain(batch), dataloader_idx)

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = -1) -> Any:
            return plain(batch), batch_idx, dataloader_idx

        def on_validation_model_zero_grad(self) -> None:
            self.note("zero_grad")
            super().on_validation_model_zero_grad()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Recorder()


def outcome(
    pl: Any, verb: str, data: Callable[[Any], tuple[Any, ...]], stop_at: int | None, arguments: dict[str, Any]
) -> Any:
    torch.manual_seed(1)
    module = recorder(pl, stop_at)
    torch.manual_seed(1)
    trainer = pl.Trainer(**QUIET, **arguments)
    combined = TheirCombinedLoader if pl is lightning else CombinedLoader
    results = getattr(trainer, verb)(module, *data(combined))
    counts = (
        trainer.global_step, trainer.current_epoch, trainer.num_training_batches, trainer.should_stop,
        trainer.num_val_batches if module.trace else None, trainer.num_test_batches, trainer.num_predict_batches,
    )  # fmt: skip
    return module.trace, counts, results


def assert_alike(
    verb: str, data: Callable[[Any], tuple[Any, ...]], stop_at: int | None = None, **arguments: Any
) -> None:
    theirs = outcome(lightning, verb, data, stop_at, arguments)
    assert outcome(holdfast, verb, data, stop_at, arguments) == theirs


FITS: dict[str, dict[str, Any]] = {
    "max_steps": {"max_steps": 5},
    "max_steps in the first epoch": {"max_steps": 3, "max_epochs": 1},
    "no end, stopped": {"max_epochs": -1, "stop_at": 6},
    "stopped": {"max_epochs": 3, "stop_at": 1},
    "stopped before min_epochs": {"max_epochs": 5, "min_epochs": 2, "stop_at": 1},
    "stopped before min_steps": {"max_epochs": 5, "min_steps": 6, "stop_at": 1},
    "stopped before both": {"max_epochs": 5, "min_epochs": 2, "min_steps": 10, "stop_at": 1},
    "min_epochs above max_epochs": {"max_epochs": 2, "min_epochs": 5},
    "no training batches": {"max_epochs": 2, "limit_train_batches": 0},
    "no validation batches": {"max_epochs": 2, "limit_val_batches": 0},
    "fast_dev_run": {"fast_dev_run": 3},
    "fast_dev_run above the data": {"fast_dev_run": 9},
    "the whole sanity check": {"max_epochs": 1, "num_sanity_val_steps": -1},
    "a third": {"max_epochs": 2, "val_check_interval": 0.3},
    "every third batch": {"max_epochs": 2, "val_check_interval": 3},
    "every third batch across epochs": {
        "max_epochs": 3, "val_check_interval": 3, "check_val_every_n_epoch": None,
    },
    "every sixth batch across epochs": {
        "max_epochs": 4, "val_check_interval": 6, "check_val_every_n_epoch": None,
    },
    "every second epoch": {"max_epochs": 5, "check_val_every_n_epoch": 2, "val_check_interval": 2},
    "accumulation": {"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 1},
    "accumulation and max_steps": {"max_steps": 3, "accumulate_grad_batches": 3},
    "halves": {"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("arguments", FITS.values(), ids=FITS.keys())
def test_limits_and_intervals(arguments: dict[str, Any]) -> None:
    # In order: validation draws from seeds of its own here, and from the model's there.
    def data(combined: Any) -> tuple[Any, ...]:
        return loader(8, shuffle=False), [loader(4, shuffle=False), loader(3, 50, shuffle=False)]

    assert_alike("fit", data, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"val_check_interval": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"limit_train_batches": 2, "val_check_interval": 0.5},
        {"limit_train_batches": 20},
        {"accumulate_grad_batches": 2},
    ],
)
def test_data_without_a_length(arguments: dict[str, Any]) -> None:
    assert_alike("fit", lambda combined: (stream(6), stream(3)), max_epochs=2, **arguments)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("limit", [None, 2, 0.5])
def test_training_side_by_side(mode: str, limit: Any) -> None:
    assert_alike("fit", side_by_side(mode), max_epochs=3, limit_train_batches=limit)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("limit", [None, 2])
def test_workers_draw_no_other_order(mode: str, limit: Any) -> None:
    """Under Lightning they do where several loaders shuffle: they ask for their rows before the others."""
    arguments = {"max_epochs": 2, "limit_train_batches": limit}
    alone = outcome(holdfast, "fit", side_by_side(mode), None, arguments)
    assert outcome(holdfast, "fit", side_by_side(mode, workers=1), None, arguments) == alone


def side_by_side(mode: str, workers: int = 0) -> Callable[[Any], tuple[Any, ...]]:
    def data(combined: Any) -> tuple[Any, ...]:
        parts = {"a": loader(4, num_workers=workers), "b": loader(10, 100), "c": loader(5, 200)}
        return (combined(parts, mode),)

    return data


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [loader(4), loader(7, 100)],
        lambda: {"x": [loader(2), loader(4, 10)], "y": loader(3, 20)},
        lambda: [loader(4)],
        lambda: [loader(4), stream(7)],
    ],
)
def test_loaders_in_collections(parts: Callable[[], Any]) -> None:
    assert_alike("fit", lambda combined: (parts(),), max_epochs=2)
    for verb in ("validate", "test"):
        assert_alike(verb, lambda combined: (parts(),))
    torch.manual_seed(1)
    assert_alike("predict", lambda combined: (parts(),))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
@pytest.mark.parametrize("limit", [1.0, 2, 0.5])
def test_validation_on_combined_loaders(mode: str, limit: Any) -> None:
    def data(combined: Any) -> tuple[Any, ...]:
        return (combined([loader(4, shuffle=False), loader(9, 100, shuffle=False)], mode),)

    assert_alike("validate", data, limit_val_batches=limit)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_a_combined_loader_by_itself(mode: Any) -> None:
    nests: list[Any] = [
        {"x": [range(2), range(3)], "y": (range(1), {"z": range(4)})}, [[1, 2, 3], (4, 5)], range(3), [], [range(0), range(2)],
    ]  # fmt: skip
    for nest in nests:
        ours, theirs = CombinedLoader(nest, mode), TheirCombinedLoader(nest, mode)
        assert ours.flattened == theirs.flattened
        assert list(ours) == list(theirs)
        assert len(ours) == len(iter(theirs))


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("check", [1, 2])
@pytest.mark.parametrize("sanity", [0, 1])
def test_when_loaders_are_asked_for_anew(every: int, check: int, sanity: int) -> None:
    def asked(pl: Any) -> list[Any]:
        calls: list[Any] = []

        class Asking(type(recorder(pl, None))):  # type: ignore[misc]
            def train_dataloader(self) -> Any:
                calls.append(("train", self.trainer.current_epoch, self.trainer.global_step))
                return loader(4)

            def val_dataloader(self) -> Any:
                calls.append(
                    ("val", self.trainer.current_epoch, self.trainer.global_step, self.trainer.validating)
                )
                return loader(4)

            def on_train_epoch_start(self) -> None:
                calls.append("epoch")

        arguments = {"max_epochs": 6, "check_val_every_n_epoch": check, "num_sanity_val_steps": sanity}
        pl.Trainer(**QUIET, **arguments, reload_dataloaders_every_n_epochs=every).fit(Asking())
        # Without reloads Lightning asks for validation's loader later when it does not validate in epoch 0.
        return calls if every else sorted(call[0] for call in calls if call != "epoch")

    assert asked(holdfast) == asked(lightning)
