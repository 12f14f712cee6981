"""A model and runs for the tests of averaging: written for holdfast and Lightning alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.checkpoint.load import load
from tests.resume.harness import SaveEverywhere, first_difference, without_incidentals
from tests.resume.tape import Tape


def loader(rows: int = 12, *, shuffle: bool = False) -> DataLoader[Any]:
    """Batches of 4 rows ``(features (3,), their sum)``."""
    inputs = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4, shuffle=shuffle)


def model_class(pl: Any) -> Any:
    """A regression on top of ``pl.LightningModule``."""

    class Regression(pl.LightningModule):
        def __init__(self, norm: bool = True, dropout: float = 0.0, scheduler: str = "") -> None:
            super().__init__()
            self.save_hyperparameters()
            middle = nn.BatchNorm1d(4) if norm else nn.Identity()
            self.net = nn.Sequential(nn.Linear(3, 4), middle, nn.Dropout(dropout), nn.Linear(4, 1))
            self.validated: list[Tensor] = []
            self.rates: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated.append(self.net[0].weight.detach().clone())
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            if not self.hparams.scheduler:
                return optimizer
            schedulers = torch.optim.lr_scheduler
            if self.hparams.scheduler == "plateau":
                plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=10)
                return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}
            if self.hparams.scheduler == "step":
                each = schedulers.StepLR(optimizer, 1, 0.98)
                return [optimizer], [{"scheduler": each, "interval": "step"}]
            return [optimizer], [schedulers.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]

    return Regression


Regression = model_class(holdfast)


def make_trainer(pl: Any, callbacks: list[Any], **arguments: Any) -> Any:
    """A quiet trainer of ``pl``."""
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "callbacks": callbacks,
            "enable_checkpointing": any("Checkpoint" in type(one).__name__ for one in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **arguments,
        }
    )


def fit(
    callback: Any,
    points: Path | None = None,
    ckpt_path: Path | None = None,
    model: Any = None,
    val: Any = None,
    **arguments: Any,
) -> tuple[Any, dict[str, Any], SaveEverywhere]:
    """Train a `Regression` with ``callback``, saving at every safe point if ``points`` is a directory.

    Returns:
        The model after training, the checkpoint that `save_checkpoint` gives then, and what saved.
    """
    holdfast.seed_everything(3, verbose=False)
    if model is None:
        model = Regression(dropout=0.3)
    if ckpt_path is not None:
        torch.rand(5)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(1)
    saver = SaveEverywhere(points, Tape())
    trainer = holdfast.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "callbacks": [callback, saver],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
    )
    trainer.fit(model, loader(shuffle=True), loader(8) if val is None else val, ckpt_path=ckpt_path)
    final = Path("final.ckpt").absolute()
    trainer.save_checkpoint(final)
    return model, without_incidentals(load(final), final.parent), saver


def assert_resumes_everywhere(make: Any, root: Path, **arguments: Any) -> None:
    """From every safe point, a run goes on to the same model and the same final checkpoint."""
    model, payload, saver = fit(make(), root / "points", **arguments)
    assert set(saver.kinds.values()) == {"batch", "validation", "epoch"}
    for number, path in saver.files.items():
        resumed, again, _ = fit(make(), None, path, **arguments)
        where = f"resumed from file {number} ({saver.kinds[number]})"
        assert first_difference(model.state_dict(), resumed.state_dict()) is None, where
        assert (found := first_difference(payload, again)) is None, f"{where}: {found}"
        done = len(resumed.validated)
        assert first_difference(model.validated[len(model.validated) - done :], resumed.validated) is None, (
            where
        )
