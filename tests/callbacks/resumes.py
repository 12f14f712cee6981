"""Go on from every checkpoint that a run can leave, and compare the end with that of the run itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import holdfast as pl
from holdfast.callbacks import Checkpoint, SavePlan
from tests.training.toys import trainer


class AfterEverything(Checkpoint):
    """Saves after each batch, inside of accumulation windows too, and after each epoch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.moment = ""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.moment = f"batch {trainer.progress.total_batches}"
        trainer.request_save(self)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.moment = f"epoch {trainer.current_epoch}"
        trainer.request_save(self)

    def plan_save(self, trainer: Any) -> SavePlan:
        return SavePlan(names=(str(self.directory / f"{self.moment}.ckpt"),))


def end_of(run: pl.Trainer) -> dict[str, Any]:
    """All that has to be bit-identical: weights, what trains, optimizers, rates, counters."""
    module = run.lightning_module
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "trains": {name: p.requires_grad for name, p in module.named_parameters()},
        "optimizers": [
            torch.utils._pytree.tree_map(
                lambda one: one.tolist() if isinstance(one, torch.Tensor) else one, optimizer.state_dict()
            )
            for optimizer in run.optimizers
        ],
        "counters": (run.global_step, run.current_epoch),
    }


def resume_everywhere(
    root: Path,
    make_module: Callable[[], pl.LightningModule],
    make_callbacks: Callable[[], list[Any]],
    make_data: Callable[[], DataLoader[Any]],
    **arguments: Any,
) -> list[pl.Trainer]:
    """Check the ends of runs that go on after each batch and each epoch; return these runs' trainers."""

    def fit(place: str, ckpt_path: Path | None) -> pl.Trainer:
        run = trainer(callbacks=[*make_callbacks(), AfterEverything(root / place)], **arguments)
        torch.manual_seed(3)
        run.fit(make_module(), make_data(), ckpt_path=ckpt_path)
        return run

    straight = fit("straight", None)
    files = sorted((root / "straight").iterdir())
    assert len(files) == straight.progress.total_batches + straight.current_epoch
    resumed = []
    for path in files:
        run = fit(f"from {path.stem}", path)
        assert end_of(run) == end_of(straight), path.stem
        resumed.append(run)
    return resumed
