"""Which tensors a snapshot may still read while the next batch runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.callbacks import Callback, LambdaCallback, StochasticWeightAveraging
from holdfast.training import late
from holdfast.training.progress import BATCH, END
from tests.checkpoint.moments import LastMoment
from tests.training.saved_in_background import WIDTH, Wide, assert_same_tensors, batches, every_step, fit
from tests.training.toys import trainer


class Mixed(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.capped = nn.Embedding(8, 4, max_norm=1.0)
        self.bag = nn.EmbeddingBag(8, 4, max_norm=1.0)
        self.free = nn.Embedding(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.apart = nn.Parameter(torch.ones(3))

    def loss(self, batch: Any) -> Any:
        index = torch.arange(4).view(1, 4)
        return super().loss(batch) + sum(part(index).mean() for part in (self.capped, self.bag, self.free))

    def configure_optimizers(self) -> Any:
        mine = [parameter for name, parameter in self.named_parameters() if name != "apart"]
        return torch.optim.Adam(mine, lr=1e-3)


def run(module: Any, *callbacks: Any) -> Any:
    made = trainer(callbacks=list(callbacks), max_epochs=1, limit_train_batches=2, enable_checkpointing=False)
    made.fit(module, batches())
    made.progress.stage = BATCH
    return made


def names(made: Any) -> set[str]:
    """The parameters that are late, and the number of state tensors that are."""
    found = {id(one) for one in late.tensors(made)}
    return {name for name, parameter in made.lightning_module.named_parameters() if id(parameter) in found}


def test_what_an_optimizer_trains_and_its_state() -> None:
    made = run(Mixed())
    late_ones = late.tensors(made)
    assert names(made) == {
        *(f"net.{part}.{kind}" for part in (0, 1, 3) for kind in ("weight", "bias")),
        "free.weight",
    }
    state = [value for one in made.optimizers[0].state.values() for value in one.values()]
    assert {id(one) for one in state} <= {id(one) for one in late_ones}
    assert len(late_ones) == 7 + len(state)


def test_not_where_an_optimizer_exchanges_weights_by_itself() -> None:
    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    class Free(Wide):
        def configure_optimizers(self) -> Any:
            return ScheduleFree(self.parameters(), lr=0.1, momentum=0.9)

    assert late.tensors(run(Free())) == []


def test_not_at_an_epochs_end_where_the_next_begins_with_somebodys_hook() -> None:
    class Begins(Wide):
        def on_train_epoch_start(self) -> None: ...

    ours = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    somebodys = LambdaCallback(on_train_batch_end=lambda *_: None)
    for module, callbacks, some in (
        (Begins(), [], False),
        (Wide(), [ours], True),
        (Wide(), [somebodys], True),
    ):
        made = run(module, *callbacks)
        assert late.tensors(made)
        made.progress.stage = END
        assert bool(late.tensors(made)) is some

    class Own(LambdaCallback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None: ...

    made = run(Wide(), Own())
    made.progress.stage = END
    assert late.tensors(made) == []


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad", "on_before_backward"])
def test_not_where_somebodys_hook_comes_before_backward(hook: str) -> None:
    def nothing(*_: Any) -> None: ...

    assert late.tensors(run(type("Own", (Wide,), {hook: nothing})())) == []
    assert late.tensors(run(Wide(), type("Own", (Callback,), {hook: nothing})())) == []
    assert late.tensors(run(Wide(), LambdaCallback(**{hook: nothing}))) == []


def test_what_somebody_changes_by_the_back_door_before_backward_is_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clipping that finds nothing to clip at first, and then only a few values."""

    class Clips(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step >= 3:
                pl_module.net[0].weight.data[WIDTH // 3, :3] = 0.5

    LastMoment(monkeypatch)
    for background in (True, False):
        fit(every_step(tmp_path / str(background), background=background), Clips())
    for path in sorted((tmp_path / "True").iterdir()):
        assert_same_tensors(path, tmp_path / "False" / path.name)


@pytest.mark.filterwarnings("ignore:state_dict/net.0.weight was changed:UserWarning")
def test_saves_that_validation_follows_earn_no_trust_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before validation nothing has happened yet to a weight that each forward pass changes."""

    class Writes(Wide):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net[0].weight.data[WIDTH // 3, :3] += 0.5
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def val_dataloader(self) -> Any:
            return batches(1)

    LastMoment(monkeypatch)
    for background in (True, False):
        saves = [
            every_step(tmp_path / str(background), background=background, every_n_train_steps=every)
            for every in (2, 7)
        ]
        fit(saves, module=Writes, val_check_interval=2, max_epochs=2)
    assert len(list((tmp_path / "True").iterdir())) == 10
    for path in sorted((tmp_path / "True").iterdir()):
        assert_same_tensors(path, tmp_path / "False" / path.name)
