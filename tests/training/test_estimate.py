"""Before the first batch: how large checkpoints will be, whether there is room, and memory for a snapshot."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from holdfast.training import estimate
from tests.training.saved_in_background import Wide, fit
from tests.training.toys import checkpoints

Usage = collections.namedtuple("Usage", ["total", "used", "free"])


class Wider(Wide):
    """Large enough that tensors are most of a file."""

    make: Any = staticmethod(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(512, 512)
        self.tied = self.side.weight
        self.register_buffer("table", torch.zeros(64, 512))

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) + self.side.weight.square().mean() + self.side.bias.square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
        lambda parameters: torch.optim.AdamW(parameters),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        lambda parameters: torch.optim.RMSprop(parameters, momentum=0.9, centered=True),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.Adadelta(parameters),
        lambda parameters: torch.optim.Adamax(parameters),
        lambda parameters: torch.optim.NAdam(parameters),
        lambda parameters: torch.optim.RAdam(parameters),
        lambda parameters: torch.optim.ASGD(parameters),
        lambda parameters: torch.optim.Rprop(parameters),
    ],
)
def test_it_is_near_what_is_written(make: Any, tmp_path: Path) -> None:
    """Before the optimizer has any state, and of weights alone; an average of the weights counts too."""

    class Made(Wider):
        pass

    Made.make = staticmethod(make)
    sizes: dict[bool, int] = {}

    class Asks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            sizes.update({only: estimate.size_bytes(trainer, weights_only=only) for only in (True, False)})

    full = ModelCheckpoint(tmp_path, "full", every_n_train_steps=1)
    weights = ModelCheckpoint(tmp_path, "weights", mode="max", every_n_train_steps=1, save_weights_only=True)
    fit([full, weights], Asks(), EMAWeightAveraging(), module=Made, limit_train_batches=1)
    for only, name in ((False, "full.ckpt"), (True, "weights.ckpt")):
        assert 0.85 < sizes[only] / (tmp_path / name).stat().st_size < 1.05


class TestRoom:
    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        """What the file system says is free."""
        room = {"free": 10_000_000}
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000_000, 0, room["free"]))
        return room

    def test_too_little_is_said_before_the_first_batch(self, tmp_path: Path, free: dict[str, int]) -> None:
        steps = []
        free["free"] = 1000

        class Step(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                steps.append(len(warned))

        saves = [
            ModelCheckpoint(tmp_path, "a", every_n_train_steps=4),
            ModelCheckpoint(tmp_path, "b", mode="max", every_n_train_steps=4, save_weights_only=True),
        ]
        with pytest.warns(UserWarning, match="A checkpoint of this run needs") as warned:
            fit(saves, Step(), limit_train_batches=4)
        needed = 4 * (3 * (2 * 64 * 64 + 4 * 64) + 2 * 64) + 8  # Adam keeps two of each, BatchNorm counts
        assert [str(one.message) for one in warned] == [
            f"A checkpoint of this run needs about {needed:,} bytes, and 1,000 are free in {tmp_path}: the first "
            "save will fail. Make room, or save somewhere else: ModelCheckpoint(dirpath=...)."
        ]
        assert steps == [1] * 4
        assert checkpoints(tmp_path) == ["a.ckpt", "b.ckpt"]

    def test_weights_alone_need_less(self, tmp_path: Path, free: dict[str, int]) -> None:
        free["free"] = 60_000
        fit(ModelCheckpoint(tmp_path, every_n_train_steps=4, save_weights_only=True), limit_train_batches=4)

    @pytest.mark.parametrize("arguments", [{"fast_dev_run": 2}, {"callback": {"save_top_k": 0}}])
    def test_what_is_never_saved_needs_none(
        self, tmp_path: Path, free: dict[str, int], arguments: dict[str, Any]
    ) -> None:
        free["free"] = 0
        how = arguments.pop("callback", {})
        fit(ModelCheckpoint(tmp_path, **how), limit_train_batches=2, **arguments)

    def test_nothing_about_it_fails_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unlike(*_: Any, **__: Any) -> int:
            raise AttributeError("no such thing")

        monkeypatch.setattr(estimate, "size_bytes", unlike)
        assert fit(ModelCheckpoint(tmp_path), limit_train_batches=2).global_step == 2

        def gone(path: str) -> Any:
            raise OSError(5, "Input/output error")

        monkeypatch.undo()
        monkeypatch.setattr(shutil, "disk_usage", gone)
        assert fit(ModelCheckpoint(tmp_path), limit_train_batches=2).global_step == 2


class TestMemory:
    @pytest.mark.parametrize(
        ("arguments", "asked"),
        [
            ({}, True),
            ({"background": False}, False),
            ({"save_top_k": 0}, False),
        ],
    )
    def test_is_made_ready_for_saves_in_the_background(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], asked: bool
    ) -> None:
        asks: list[int] = []

        class Asked(Callback):
            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                monkeypatch.setattr(trainer.engine, "prepare", asks.append)

        fit(ModelCheckpoint(tmp_path, **arguments), Asked(), module=Wider, limit_train_batches=1)
        assert len(asks) == asked
        assert all(3 << 20 < size < 4 << 20 for size in asks)
