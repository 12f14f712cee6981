"""Every spelling of precision= computes what Lightning's does: weights, dtypes, what hooks and batches look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import holdfast

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

SPELLINGS = [None, 32, "32", "32-true", "bf16", "bf16-mixed", "16-true", "bf16-true", 64, "64", "64-true"]


def module(pl: Any, seen: list[Any]) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
            self.register_buffer("scale", torch.tensor([2.0]))

        def look(self, where: str, *tensors: Tensor) -> None:
            seen.append((where, [t.dtype for t in tensors], torch.get_default_dtype(), torch.zeros(1).dtype))

        def loss(self, batch: Any) -> Tensor:
            return (self.net(batch["x"][0]) * self.scale).float().square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.look("train", batch["x"][0], batch["y"], self.net[0](batch["x"][0]))
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.look("validate", batch["x"][0], batch["y"], self.net[0](batch["x"][0]))
            return self.loss(batch)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.look("before transfer", batch["x"][0], batch["y"])
            return batch

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.look("batch start", batch["x"][0])

        def on_fit_start(self) -> None:
            self.look("fit start", *self.net.parameters(), self.scale)

        def configure_model(self) -> None:
            self.look("configure_model")

        def configure_optimizers(self) -> Any:
            self.look("configure_optimizers", *self.net.parameters())
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Net()


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.x = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return {"x": [self.x[index]], "y": index}


def run(pl: Any, **arguments: Any) -> tuple[list[Any], dict[str, Tensor], str, str]:
    seen: list[Any] = []
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, **dict.fromkeys(quiet, False), **arguments
    )
    net = module(pl, seen)
    loaders = DataLoader(Rows(), batch_size=8), DataLoader(Rows(), batch_size=12)
    trainer.fit(net, *loaders)
    trainer.validate(net, loaders[1], verbose=False)
    plugin = trainer.precision_plugin
    return seen, net.state_dict(), trainer.precision, type(plugin).__name__


def assert_equal(mine: Any, theirs: Any) -> None:
    assert mine[0] == theirs[0]
    assert mine[2:] == theirs[2:]
    assert list(mine[1]) == list(theirs[1])
    for name, value in mine[1].items():
        assert value.dtype == theirs[1][name].dtype
        assert torch.equal(value, theirs[1][name]), name


@pytest.mark.parametrize("precision", SPELLINGS)
def test_a_spelling(precision: Any) -> None:
    arguments = {} if precision is None else {"precision": precision}
    assert_equal(run(holdfast, **arguments), run(lightning, **arguments))


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.1}], ids=["", "clipped"])
def test_float16_with_a_scaler(clipping: dict[str, Any]) -> None:
    """As a plugin: by name, Lightning takes bfloat16 instead on a CPU."""
    from lightning.pytorch.plugins import MixedPrecision

    import holdfast.plugins

    theirs = run(lightning, plugins=[MixedPrecision("16-mixed", "cpu")], **clipping)
    mine = run(holdfast, plugins=[holdfast.plugins.MixedPrecision("16-mixed", "cpu")], **clipping)
    assert_equal(mine, theirs)
    assert_equal(run(holdfast, precision=16, **clipping), theirs)
