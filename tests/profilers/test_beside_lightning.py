"""The actions that SimpleProfiler records have Lightning's names, each as often as Lightning calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business


def counts(pl: Any, root: Path) -> dict[str, int]:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_train_epoch_end(self) -> None: ...

        def on_before_optimizer_step(self, optimizer: Any) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Watches(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None: ...

        def on_validation_end(self, *args: Any) -> None: ...

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, profiler="simple", callbacks=[Watches()], gradient_clip_val=1.0,
        default_root_dir=root, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.ones(6, 2))
    trainer.fit(Net(), DataLoader(data, batch_size=2), DataLoader(data, batch_size=3))
    return {action: len(seconds) for action, seconds in trainer.profiler.recorded_durations.items()}


def test_names_and_numbers_of_calls(tmp_path: Path) -> None:
    theirs, mine = counts(lightning, tmp_path / "theirs"), counts(holdfast, tmp_path / "mine")
    assert len(mine) > 12
    assert set(mine) <= set(theirs)
    # Where a loader is asked once more at its end, ours counts that too.
    asked = {action for action in mine if action.endswith("_next")}
    assert {action: count for action, count in mine.items() if action not in asked} == {
        action: theirs[action] for action in mine if action not in asked
    }
