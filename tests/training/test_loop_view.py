"""Lightning's counters of epochs and batches, read in every hook of a run and of one that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.toys import Toy, rows, trainer


def asks(pl: Any, seen: list[Any]) -> Any:
    """A callback that notes the counters in each hook."""

    class Asks(pl.Callback):  # type: ignore[misc, name-defined]
        def note(self, where: str, loop: Any) -> None:
            epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
            names = ("ready", "started", "processed", "completed")
            parts = (epochs.current, epochs.total, batches.current, batches.total)
            counts = [[getattr(part, name) for name in names] for part in parts]
            if where == "on_train_epoch_start":
                counts.pop(2)  # Lightning's are still the last epoch's
            seen.append((where, counts, loop.done))

    def noted(where: str) -> Any:
        return lambda self, trainer, *_: self.note(where, trainer.fit_loop)

    hooks = "train_start train_epoch_start train_batch_start before_backward train_batch_end"
    for name in [*hooks.split(), "validation_start", "train_epoch_end", "train_end"]:
        setattr(Asks, f"on_{name}", noted(f"on_{name}"))
    return Asks()


def model_for(pl: Any) -> Any:
    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    return Model()


@pytest.mark.filterwarnings("ignore")
def test_counters_are_lightnings() -> None:
    import lightning.pytorch

    import holdfast

    quiet = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    seen: dict[Any, list[Any]] = {lightning.pytorch: [], holdfast: []}
    for library, notes in seen.items():
        run = library.Trainer(**quiet, max_epochs=2, callbacks=[asks(library, notes)])
        run.fit(model_for(library), rows(8), rows(4))
        loop = run.fit_loop
        notes.append((loop.epoch_loop.batch_progress.current.completed, loop.epoch_progress.total.completed))
    assert len(seen[holdfast]) == 21
    assert seen[holdfast] == seen[lightning.pytorch]


def test_counters_go_on_where_a_run_stopped(tmp_path: Path) -> None:
    import holdfast

    whole: list[Any] = []
    trainer(max_epochs=2, callbacks=[asks(holdfast, whole)]).fit(Toy(), rows())

    class Stops(holdfast.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise KeyError("power cut")

    saves = holdfast.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(KeyError):
        trainer(max_epochs=2, callbacks=[Stops(), saves]).fit(Toy(), rows())
    rest: list[Any] = []
    run = trainer(max_epochs=2, callbacks=[asks(holdfast, rest)])
    run.fit(Toy(), rows(), ckpt_path=tmp_path / "epoch=1-step=4.ckpt")
    assert rest[0][:2] == (
        "on_train_start",
        [[2, 2, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1], [4, 4, 4, 4]],
    )
    assert rest[1:] == whole[-len(rest) + 1 :]
    assert not run.fit_loop.restarting  # type: ignore[union-attr]
