"""Compiled or not: the file is the same, and a run goes on from it either way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn, optim

import holdfast as pl
from holdfast.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from holdfast.checkpoint.load import load

from .harness import first_difference
from .places import FEATURES, Small, assert_resumes_everywhere, fit, rows

# Torch's own, from inside of its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch._dynamo.reset()


class Net(nn.Module):
    """A net with a metric in it, a buffer that is not persistent, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 1)
        self.mean = torchmetrics.MeanMetric()
        self.register_buffer("center", torch.zeros(1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(inputs)))) + self.center


class Plain(Small):
    """Freezes in its second epoch, so that names of every kind are in its files."""

    def make_net(self) -> nn.Module:
        return Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.remember(loss)
        inner = getattr(self.net, "_orig_mod", self.net)
        inner.mean.update(loss.detach())
        inner.center.lerp_(loss.detach(), 0.1)
        self.log("mean", inner.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            inner = getattr(self.net, "_orig_mod", self.net)
            inner.first.requires_grad_(False)
            inner.norm.eval()
            inner.norm.momentum = 0.3

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.02)


class Part(Plain):
    """Its net is compiled."""

    def make_net(self) -> nn.Module:
        return torch.compile(Net(), backend="eager")  # type: ignore[return-value]


class InItself(Plain):
    """Its net is compiled by its own method, which wraps nothing."""

    def make_net(self) -> nn.Module:
        net = Net()
        net.compile(backend="aot_eager")
        return net


class Layer(Plain):
    """One layer within the net is compiled."""

    def make_net(self) -> nn.Module:
        net = Net()
        net.norm = torch.compile(net.norm, backend="eager")  # type: ignore[assignment]
        return net


def whole() -> Any:
    return torch.compile(Plain(), backend="eager")


def whole_in_itself() -> Any:
    model = Plain()
    model.compile(backend="eager")
    return model


def both() -> Any:
    return torch.compile(Part(), backend="eager")


COMPILED = {
    "the model": whole,
    "the model, in itself": whole_in_itself,
    "a part": Part,
    "a part, in itself": InItself,
    "a layer": Layer,
    "the model and a part": both,
}
WAYS = {
    "": lambda make: (make, make),
    "on without": lambda make: (make, Plain),
    "on with": lambda make: (Plain, make),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COMPILED)
def test_resumes(name: str, way: str, tmp_path: Path) -> None:
    first, again = WAYS[way](COMPILED[name])
    _, files = assert_resumes_everywhere(
        tmp_path, first, again=again, choose=lambda files: files[1::3], accumulate_grad_batches=3
    )
    assert_plain(load(files[5]))


def assert_plain(payload: Any) -> None:
    """No name in the file tells that anything was compiled."""
    assert payload["state_dict"].keys() == Plain().state_dict().keys()
    assert "_orig_mod" not in repr(payload)


CALLBACKS = {
    "exponential": lambda: EMAWeightAveraging(decay=0.7),
    "stochastic": lambda: StochasticWeightAveraging(0.02, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:The statistics of BatchNorm:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [whole, whole_in_itself, Part])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_averages(callback: str, make: Any, way: str, tmp_path: Path) -> None:
    first, again = WAYS[way](make)
    _, files = assert_resumes_everywhere(
        tmp_path, first, lambda: [CALLBACKS[callback]()], again=again, choose=lambda files: files[1::4]
    )
    assert_plain(load(files[5]))
    for which in ("raw", "averaged"):
        loaded = Part.load_from_checkpoint(files[5], which_weights=which)
        plain = Plain.load_from_checkpoint(files[5], which_weights=which)
        assert first_difference(list(loaded.state_dict().values()), list(plain.state_dict().values())) is None


@pytest.mark.filterwarnings("ignore:.*The statistics of BatchNorm:UserWarning")
def test_statistics_of_an_average_are_those_of_its_own_copy(tmp_path: Path) -> None:
    """A compiled model's copy runs its own weights, not those that it was copied from."""

    class Calls(Plain):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def on_train_epoch_start(self) -> None: ...

    def compiled() -> Any:
        model = Calls()
        model.compile(backend="eager")
        return model

    ends = [fit(tmp_path, make, lambda: [CALLBACKS["stochastic"]()])[0] for make in (Calls, compiled)]
    assert first_difference(*(dict(end.state_dict()) for end in ends)) is None


@pytest.mark.parametrize("way", WAYS)
def test_what_finetuning_adds(way: str, tmp_path: Path) -> None:
    class Tuned(Small):
        def make_net(self) -> nn.Module:
            self.backbone = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5))
            self.head = nn.Linear(5, 1)
            return nn.Identity()

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.05, momentum=0.9)

    class TunedCompiled(Tuned):
        def make_net(self) -> nn.Module:
            made = super().make_net()
            self.backbone = torch.compile(self.backbone, backend="eager")
            return made

    names = {Plain: Tuned, Part: TunedCompiled}
    first, again = (names[one] for one in WAYS[way](Part))
    assert_resumes_everywhere(
        tmp_path, first, lambda: [BackboneFinetuning(1, lambda epoch: 1.5, verbose=False)], again=again,
        choose=lambda files: files[1::3], max_epochs=3,
    )  # fmt: skip


def test_files_of_weights_only(tmp_path: Path) -> None:
    model, trainer, _ = fit(tmp_path, Part)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert_plain(load(tmp_path / "weights.ckpt"))
    for kind in (Plain, Part):
        loaded = kind.load_from_checkpoint(tmp_path / "weights.ckpt")
        assert torch.equal(next(loaded.parameters()), next(model.parameters()))


def test_evaluated_from_a_file(tmp_path: Path) -> None:
    """Validated from a file, a compiled model has the file's weights, and the other way round."""

    class Validates(pl.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    values = []
    for make in (Plain, Part):
        _, trainer, _ = fit(tmp_path / make.__name__, make)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        for net in (Net(), Part().net):
            found = trainer.validate(
                Validates(net), rows(shuffle=False), ckpt_path=tmp_path / "a.ckpt", verbose=False
            )
            values.append(found[0]["val_loss"])
    assert len(set(values)) == 1


@pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business
def test_lightning_opens_what_a_compiled_model_saved(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Theirs(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

    for make in (whole, Part, both):
        model, trainer, _ = fit(tmp_path / make.__name__, make, lambda: [EMAWeightAveraging(decay=0.7)])
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = Theirs.load_from_checkpoint(tmp_path / "a.ckpt")
        assert torch.equal(loaded.net.first.weight, next(iter(model.parameters())))


@pytest.mark.filterwarnings("ignore")
def test_what_lightning_saved_of_a_compiled_part_is_loaded(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Theirs(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(Net(), backend="eager")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optim.Adam(self.parameters(), lr=0.02)

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    theirs = Theirs()
    trainer.fit(theirs, rows())
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    assert "net._orig_mod.first.weight" in load(tmp_path / "theirs.ckpt")["state_dict"]
    for kind in (Plain, Part):
        loaded = kind.load_from_checkpoint(tmp_path / "theirs.ckpt")
        assert torch.equal(next(loaded.parameters()), next(theirs.parameters()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a compiler")
def test_the_default_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)

    class Fast(Small):
        def make_net(self) -> nn.Module:
            return torch.compile(nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1)))  # type: ignore[return-value]

    # All batches of one size, so that there is one thing to compile.
    _, files = assert_resumes_everywhere(
        tmp_path, Fast, data=lambda: rows(12), choose=lambda files: files[1:2], max_epochs=1
    )
    assert "net.0.weight" in load(files[0])["state_dict"]
