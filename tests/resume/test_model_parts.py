"""All that a model may be made of goes on, bit for bit, from every batch and epoch: buffers, norms, metrics."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torchmetrics import classification, wrappers

import holdfast as pl
from holdfast.checkpoint.load import load
from holdfast.errors import ConfigError

from .harness import first_difference
from .places import FEATURES, Small, assert_resumes_everywhere, fit, rows

OLD_WEIGHT_NORM = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"
)


def half(files: list[Path]) -> list[Path]:
    """Every second place."""
    return files[::2]


def follow(target: nn.Module, net: nn.Module) -> None:
    """Move parameters and buffers of one net towards those of another."""
    pairs = zip([*target.parameters(), *target.buffers()], [*net.parameters(), *net.buffers()], strict=True)
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.lerp_(theirs, 0.1) if mine.is_floating_point() else mine.copy_(theirs)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 1))


class Momentum(Small):
    """A target network with BatchNorm, which follows after each batch."""

    make_net = staticmethod(normed)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0], batch[1] + 0.5 * self.target(batch[0])))

    def on_train_batch_end(self, *args: Any) -> None:
        follow(self.target, self.net)


class Encoder(pl.Callback):
    """The same, in a callback that saves it."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.net = copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        follow(self.net, pl_module.net)
        with torch.no_grad():
            pl_module.net[3].bias.add_(self.net[3].bias, alpha=0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])


class Settings(Small):
    """The settings of layers follow a schedule; they are in no state_dict."""

    make_net = staticmethod(normed)  # type: ignore[assignment]

    def on_train_epoch_start(self) -> None:
        self.net[1].momentum = 0.5 / (1 + self.current_epoch)
        self.net[2].p = 0.1 * (1 + self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.net[1].momentum = None


class Tied(Small):
    def make_net(self) -> nn.Module:
        first, second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second, nn.Linear(FEATURES, 1))


class Lazy(Small):
    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))


class Centred(Small):
    """A buffer that is not persistent, and that training changes; ``how`` it does."""

    how = "in place"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "center", None if self.how == "from nothing" else torch.zeros(1), persistent=False
        )
        self.register_buffer("mask", torch.ones(200), persistent=False)

    def loss(self, batch: Any) -> Tensor:
        center = torch.zeros(1) if self.center is None else self.center
        loss = super().loss((batch[0], batch[1] + center.mean() * self.mask[0]))
        if self.how == "in place":
            self.center.lerp_(loss.detach(), 0.3)
        elif self.how == "through data":
            self.center.data.mul_(0.5).add_(loss.detach())
        else:
            self.center = torch.cat([center, loss.detach()[None]])
        return loss


class Replaced(Centred):
    how = "replaced"


class ThroughData(Centred):
    how = "through data"


class FromNothing(Centred):
    how = "from nothing"


class Growing(Small):
    """Persistent buffers: one that grows, one that is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(1))
        self.register_buffer("center", None)

    def loss(self, batch: Any) -> Tensor:
        center = 0 if self.center is None else self.center.sum()
        loss = super().loss((batch[0], batch[1] + self.history.mean() + center))
        self.history = torch.cat([self.history, loss.detach()[None]])
        self.center = loss.detach().expand(3).clone()
        return loss


class Extra(Small):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def loss(self, batch: Any) -> Tensor:
        self.seen += 1
        return super().loss(batch) / self.seen

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Noisy(Small):
    """A dropout mask that stays for an epoch, and a generator of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3)
        self.register_buffer("mask", torch.ones(FEATURES))

    def on_train_epoch_start(self) -> None:
        self.mask = (torch.rand(FEATURES) > 0.3).float()

    def loss(self, batch: Any) -> Tensor:
        noise = 0.1 * torch.randn(batch[0].shape, generator=self.own)
        return super().loss((batch[0] * self.mask + noise, batch[1]))


PARTS = [Momentum, Settings, Tied, Lazy, Centred, Replaced, ThroughData, FromNothing, Growing, Extra, Noisy]


@pytest.mark.parametrize("make", PARTS)
def test_parts(make: Any, tmp_path: Path) -> None:
    assert_resumes_everywhere(tmp_path, make, choose=half, max_epochs=3 if make is Settings else 2)


@pytest.mark.parametrize("make", [Settings, Replaced, FromNothing, Growing, Extra])
def test_a_resume_of_a_resume(make: Any, tmp_path: Path) -> None:
    """What was restored is in the next file too."""
    whole, _, saver = fit(tmp_path / "whole", make, save=True, max_epochs=3)
    first = saver.files[4]  # the first epoch is over
    _, _, saver = fit(tmp_path / "first", make, ckpt_path=first, save=True, max_epochs=3)
    second, _, _ = fit(tmp_path / "second", make, ckpt_path=saver.files[1], max_epochs=3)
    assert first_difference(whole.losses[6:], second.losses) is None
    assert first_difference(dict(whole.named_buffers()), dict(second.named_buffers())) is None
    assert first_difference(dict(whole.state_dict()), dict(second.state_dict())) is None


def test_a_momentum_encoder_in_a_callback(tmp_path: Path) -> None:
    assert_resumes_everywhere(tmp_path, Small, lambda: [Encoder()])


def test_a_momentum_encoder_that_saves_no_state_is_declared(tmp_path: Path) -> None:
    class Forgetful(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.net = copy.deepcopy(pl_module.net)
            self.of_another_kind = nn.Linear(9, 9)

    with pytest.raises(ConfigError) as error:
        fit(tmp_path, Small, lambda: [Forgetful()], exact="require")
    assert str(error.value).splitlines()[1:] == [
        "  Forgetful.net is a copy of the model, or of a part of it, and is in no checkpoint. Give Forgetful "
        "state_dict and load_state_dict."
    ]
    fit(tmp_path, Momentum, lambda: [Encoder()], exact="require")


def test_a_scheduler_that_was_not_returned_is_declared(tmp_path: Path) -> None:
    class Keeps(Small):
        def configure_optimizers(self) -> Any:
            self.mine = torch.optim.SGD(self.parameters(), lr=0.05)
            self.warmup = torch.optim.lr_scheduler.LinearLR(self.mine)
            return self.mine

    class Returns(Keeps):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers()], [
                torch.optim.lr_scheduler.ChainedScheduler([self.warmup], optimizer=self.mine)
            ]

    with pytest.raises(ConfigError) as error:
        fit(tmp_path, Keeps, exact="require")
    assert str(error.value).splitlines()[1:] == [
        "  Keeps.warmup is a LinearLR that configure_optimizers did not return, so its state is in no checkpoint. "
        "Return it, or save it in on_save_checkpoint."
    ]
    fit(tmp_path, Returns, exact="require")


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "the old weight_norm": weight_norm,
    "the old spectral_norm": spectral_norm,
}


@OLD_WEIGHT_NORM
@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged"])
@pytest.mark.parametrize("norm", NORMS)
def test_computed_weights(norm: str, averaged: bool, tmp_path: Path) -> None:
    """Spectral norm's power iteration changes buffers in each forward; the old ones compute in a hook."""

    class Normed(Small):
        def make_net(self) -> nn.Module:
            wrap: Any = NORMS[norm]
            return nn.Sequential(
                wrap(nn.Linear(FEATURES, 5)), nn.Tanh(), nn.Dropout(0.2), wrap(nn.Linear(5, 1))
            )

    def callbacks() -> list[Any]:
        return [pl.callbacks.EMAWeightAveraging(decay=0.7)] if averaged else []

    assert_resumes_everywhere(tmp_path, Normed, callbacks, choose=lambda files: files[1::3])


def test_what_no_training_changes_is_not_in_the_file(tmp_path: Path) -> None:
    """A mask that is not persistent costs nothing; neither does a layer as it was made."""
    _, _, saver = fit(tmp_path, Centred, save=True)
    assert list(load(saver.files[0])["holdfast"]["model"]["buffers"]) == ["center"]
    _, _, saver = fit(tmp_path / "plain", Small, save=True)
    assert "model" not in load(saver.files[0])["holdfast"]


def test_a_buffer_that_grew_is_loaded_as_it_is(tmp_path: Path) -> None:
    model, _, saver = fit(tmp_path, Growing, save=True)
    loaded = Growing.load_from_checkpoint(saver.files[-1])
    assert torch.equal(loaded.history, model.history)
    assert torch.equal(loaded.center, model.center)


def test_an_extra_state_that_cannot_be_stored_does_not_end_the_run(tmp_path: Path) -> None:
    class Unstorable(Small):
        def get_extra_state(self) -> Any:
            return object()

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("there is none")

    with pytest.warns(UserWarning, match="state_dict/_extra_state is not in the checkpoint"):
        whole, _, saver = fit(tmp_path, Unstorable, save=True)
    message = (
        "batch-2.ckpt could not hold the extra state of Unstorable (_extra_state), so it is what __init__ made "
        "it. Have get_extra_state return plain values and tensors."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        resumed, _, _ = fit(tmp_path, Unstorable, ckpt_path=saver.files[1])
    assert whole.losses[2:] == resumed.losses


# -- TorchMetrics --------------------------------------------------------------------------------------------


class Measured(Small):
    """Measures in training, and remembers what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.measure = self.make()

    def make(self) -> Any:
        raise NotImplementedError

    def update(self, loss: Tensor, batch: Any) -> None:
        self.measure.update(loss)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.update(loss.detach(), batch)
        return loss

    def found(self) -> list[Tensor]:
        found = self.measure.compute()
        return list(found.values()) if isinstance(found, dict) else [found]

    def on_train_epoch_end(self) -> None:
        for value in self.found():
            self.remember(value.float().mean())
        self.measure.reset()


class Labels(Measured):
    """Of a classification; the three share their states."""

    def make(self) -> Any:
        return torchmetrics.MetricCollection(
            [classification.BinaryPrecision(), classification.BinaryRecall(), classification.BinaryF1Score()]
        )

    def update(self, loss: Tensor, batch: Any) -> None:
        scores = self.net(batch[0]).detach().sigmoid().squeeze(1)
        self.measure.update(scores, (batch[1] > 0).long().squeeze(1))


class Lists(Labels):
    """States that are lists."""

    def make(self) -> Any:
        return torchmetrics.MetricCollection(
            [classification.BinaryAUROC(), classification.BinaryAveragePrecision()]
        )


class InPlace(Measured):
    """States that are added to in place, shared by two of three."""

    def make(self) -> Any:
        squared = torchmetrics.MeanSquaredError
        return torchmetrics.MetricCollection(
            {"squared": squared(), "root": squared(squared=False), "r2": torchmetrics.R2Score()}
        )

    def update(self, loss: Tensor, batch: Any) -> None:
        self.measure.update(self.net(batch[0]).detach(), batch[1])


class SeenEachBatch(Measured):
    """What is seen of it in each batch, and never reset."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for value in self.found():
            self.remember(value)
        return loss

    def on_train_epoch_end(self) -> None: ...


class Mean(SeenEachBatch):
    def make(self) -> Any:
        return torchmetrics.MeanMetric()


class RunningMean(SeenEachBatch):
    def make(self) -> Any:
        return torchmetrics.RunningMean(3)


class Extremes(SeenEachBatch):
    def make(self) -> Any:
        return wrappers.MinMaxMetric(torchmetrics.MeanMetric())


class Tracked(SeenEachBatch):
    """Gets one metric more in each epoch."""

    def make(self) -> Any:
        return wrappers.MetricTracker(torchmetrics.MeanMetric(), maximize=False)

    def on_train_epoch_start(self) -> None:
        self.measure.increment()

    def found(self) -> list[Tensor]:
        return list(self.measure.compute_all())


class Bootstrapped(SeenEachBatch):
    def make(self) -> Any:
        return wrappers.BootStrapper(torchmetrics.MeanSquaredError(), 3)

    def update(self, loss: Tensor, batch: Any) -> None:
        self.measure.update(self.net(batch[0]).detach(), batch[1])


class Logged(Labels):
    """Logged as objects: on steps and epochs, a collection and one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def update(self, loss: Tensor, batch: Any) -> None:
        super().update(loss, batch)
        self.mean(loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.measure, on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.remember(self.mean.compute())


class InContainers(Small):
    """In a list and a dict, which torch does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.some = [torchmetrics.MeanMetric(), torchmetrics.SumMetric()]
        self.others = {"max": torchmetrics.MaxMetric()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for one in (*self.some, *self.others.values()):
            one(loss.detach())
            self.remember(one.compute())
        self.log("mean", self.some[0], on_step=True, on_epoch=True)
        return loss


METRICS = [Labels, Lists, InPlace, Mean, RunningMean, Extremes, Tracked, Bootstrapped, Logged, InContainers]


@pytest.mark.parametrize("make", METRICS)
def test_metrics(make: Any, tmp_path: Path) -> None:
    assert_resumes_everywhere(tmp_path, make, choose=half)


def test_metrics_in_validation(tmp_path: Path) -> None:
    class Validated(Labels):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.update(torch.zeros(()), batch)
            self.log_dict(self.measure)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Small.training_step(self, batch, batch_idx)

        def on_train_epoch_end(self) -> None: ...

    assert_resumes_everywhere(
        tmp_path,
        Validated,
        lambda: [pl.callbacks.EarlyStopping("BinaryRecall", mode="max", patience=1)],
        val=rows(9, shuffle=False),
        val_check_interval=2,
        max_epochs=6,
    )


def test_a_metric_that_is_no_attribute_is_named(tmp_path: Path) -> None:
    elsewhere = torchmetrics.MeanMetric()

    class Elsewhere(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            elsewhere(loss.detach())
            self.log("far", elsewhere, on_epoch=True)
            return loss

    message = (
        "self.log('far', MeanMetric): the metric is no attribute of the module, so what it has gathered is in no "
        "checkpoint. Make it one, in __init__."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        _, _, saver = fit(tmp_path, Elsewhere, save=True)
    fit(tmp_path, Elsewhere, ckpt_path=saver.files[1])  # goes on, without it
