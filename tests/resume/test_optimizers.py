"""Every optimizer, scheduler and way to step goes on, bit for bit, from every batch and epoch of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import holdfast as pl
from holdfast.checkpoint.load import load
from holdfast.errors import CheckpointIncompatible, ConfigError

from .optimizers import Decay, Hyperbolic, KeepsHalf, Lookahead, SharpnessAware, Widened, all_gradients
from .places import ByHand, Small, assert_resumes_everywhere, fit, rows


def with_optimizer(configure: Callable[[Any], Any], base: Any = Small) -> Any:
    class Configured(base):
        def configure_optimizers(self) -> Any:
            return configure(self)

    return Configured


def some(every: int) -> Callable[[list[Path]], list[Path]]:
    """Some of the files, for what is the same everywhere."""
    return lambda files: files[1::every]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "Adam, amsgrad": lambda m: optim.Adam(m.parameters(), lr=0.02, amsgrad=True),
    "Adam, foreach": lambda m: optim.Adam(m.parameters(), lr=0.02, foreach=True),
    "Adam, fused": lambda m: optim.Adam(m.parameters(), lr=0.02, fused=True),
    "Adam, named parameters": lambda m: optim.Adam(m.named_parameters(), lr=0.02),
    "Adam, a tensor as rate": lambda m: optim.Adam(m.parameters(), lr=torch.tensor(0.02)),
    "AdamW": lambda m: optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
    "Adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.02, lr_decay=0.1),
    "Adadelta": lambda m: optim.Adadelta(m.parameters()),
    "Adafactor": lambda m: optim.Adafactor(m.parameters(), lr=0.02),
    "Adamax": lambda m: optim.Adamax(m.parameters(), lr=0.02),
    "ASGD": lambda m: optim.ASGD(m.parameters(), lr=0.02, t0=2),
    "NAdam": lambda m: optim.NAdam(m.parameters(), lr=0.02, decoupled_weight_decay=True),
    "RAdam": lambda m: optim.RAdam(m.parameters(), lr=0.02),
    "RMSprop": lambda m: optim.RMSprop(m.parameters(), lr=0.02, centered=True, momentum=0.5),
    "Rprop": lambda m: optim.Rprop(m.parameters(), lr=0.02),
    "SGD, nesterov": lambda m: optim.SGD(m.parameters(), lr=0.02, momentum=0.9, nesterov=True),
    "SGD, a tensor as rate": lambda m: optim.SGD(m.parameters(), lr=torch.tensor(0.02)),
    "SGD, groups with options": lambda m: optim.SGD(
        [
            {"params": list(m.net[0].parameters()), "lr": 0.01, "tags": ["body", {"depth": 1}]},
            {"params": list(m.net[3].parameters()), "momentum": 0.0},
        ],
        lr=0.05,
        momentum=0.9,
    ),
    "LBFGS": lambda m: optim.LBFGS(m.parameters(), lr=0.05, max_iter=3, history_size=2),
    "LBFGS, line search": lambda m: optim.LBFGS(
        m.parameters(), lr=0.5, max_iter=3, history_size=2, line_search_fn="strong_wolfe"
    ),
    "a wrapper": lambda m: Lookahead(optim.SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "two evaluations a step": lambda m: SharpnessAware(m.parameters(), lr=0.05, momentum=0.9),
    "wider than the weights": lambda m: Widened(m.parameters(), lr=0.05),
    "gradients that it does not clear": lambda m: KeepsHalf(m.parameters(), lr=0.02),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda m: optim.Muon([one for one in m.parameters() if one.ndim == 2], lr=0.02)

# (the scheduler, its configuration)
SCHEDULERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "OneCycleLR, with momentum": (
        lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=30),
        {"interval": "step"},
    ),
    "CyclicLR": (lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2), {"interval": "step"}),
    "MultiStepLR, each second step": (
        lambda o: schedulers.MultiStepLR(o, [2, 3, 5], 0.5),
        {"interval": "step", "frequency": 2},
    ),
    "LambdaLR of an object": (lambda o: schedulers.LambdaLR(o, Decay()), {"interval": "step"}),
    "MultiplicativeLR of an object": (
        lambda o: schedulers.MultiplicativeLR(o, Decay()),
        {"interval": "step"},
    ),
    "SequentialLR": (
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 4)], [3]
        ),
        {"interval": "step"},
    ),
    "ChainedScheduler": (
        lambda o: schedulers.ChainedScheduler(
            [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.9)]
        ),
        {"interval": "step"},
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
        {"interval": "step"},
    ),
    "PolynomialLR each epoch": (lambda o: schedulers.PolynomialLR(o, 6), {"interval": "epoch"}),
    "SWALR": (lambda o: SWALR(o, 0.01, 3), {"interval": "step"}),
    "one's own": (Hyperbolic, {"interval": "step"}),
    "one's own, with a metric": (
        Hyperbolic,
        {"interval": "step", "reduce_on_plateau": True, "monitor": "loss_step"},
    ),
    "ReduceLROnPlateau each step": (
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.3),
        {"interval": "step", "monitor": "loss_step"},
    ),
    "ReduceLROnPlateau each epoch": (
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.3, cooldown=1),
        {"monitor": "loss_epoch"},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, tmp_path: Path) -> None:
    assert_resumes_everywhere(tmp_path, with_optimizer(OPTIMIZERS[name]), choose=some(4))


@pytest.mark.parametrize("name", ["wider than the weights", "NAdam", "ASGD", "Adam, amsgrad"])
def test_state_wider_than_weights_in_bfloat16(name: str, tmp_path: Path) -> None:
    assert_resumes_everywhere(
        tmp_path, with_optimizer(OPTIMIZERS[name]), choose=some(4), precision="bf16-true"
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tmp_path: Path) -> None:
    make, configuration = SCHEDULERS[name]

    def configure(module: Any) -> Any:
        optimizer = optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **configuration}}

    assert_resumes_everywhere(tmp_path, with_optimizer(configure), choose=some(2), max_epochs=3)


def test_a_rate_that_is_a_tensor_and_scheduled(tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = optim.Adam(module.parameters(), lr=torch.tensor(0.02))
        return [optimizer], [{"scheduler": schedulers.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    assert_resumes_everywhere(tmp_path, with_optimizer(configure), choose=some(4))


def test_a_rate_that_is_a_tensor_stays_the_users_own(tmp_path: Path) -> None:
    """Who keeps the tensor to change the rate by it changes the rate after a resume too."""

    class Keeps(Small):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.05)
            return optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)

        def on_train_batch_end(self, *args: Any) -> None:
            self.rate.mul_(0.9)

    assert_resumes_everywhere(tmp_path, Keeps, choose=some(4))


def test_a_plateau_whose_value_is_not_always_logged(tmp_path: Path) -> None:
    class Sometimes(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.remember(loss)
            if self.current_epoch:
                self.log("late", loss, on_epoch=True, on_step=False)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = optim.SGD(self.parameters(), lr=0.05)
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return [optimizer], [{"scheduler": plateau, "monitor": "late", "strict": False}]

    with pytest.warns(UserWarning, match="ReduceLROnPlateau watches 'late', which was not logged"):
        assert_resumes_everywhere(tmp_path, Sometimes, choose=some(4), max_epochs=4)


def test_a_scheduler_whose_state_cannot_be_asked_for_is_refused() -> None:
    class Forgetful:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self) -> None: ...

    def configure(module: Any) -> Any:
        optimizer = optim.SGD(module.parameters(), lr=0.05)
        return [optimizer], [Forgetful(optimizer)]

    with pytest.raises(ConfigError) as error:
        fit(Path("."), with_optimizer(configure))
    assert str(error.value) == (
        "configure_optimizers returned a Forgetful as a scheduler, which has no state_dict(): no checkpoint could "
        "hold where it stands. Give it state_dict() and load_state_dict()."
    )


# -- gradients that outlive a batch --------------------------------------------------------------------------


class Bag(Small):
    """Sparse gradients."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(10, 5, sparse=True), nn.Linear(5, 1))

    def loss(self, batch: Any) -> Tensor:
        rows = (batch[0].abs() * 3).long().clamp(max=9)
        return (self.net(rows) - batch[1]).square().mean()


class BagByHand(Bag):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [
            optim.SparseAdam(list(self.net[0].parameters()), lr=0.1),
            optim.Adam(self.net[1].parameters(), lr=0.1),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.remember(loss)
        self.manual_backward(loss / 3)
        if batch_idx % 3 == 2:
            for one in self.optimizers():
                one.step()
                one.zero_grad()


def head_only(module: Any) -> Any:
    """The gradients of the body add up from the first batch on: nobody clears them."""
    return optim.SGD(module.net[3].parameters(), lr=0.5)


class ClipsAll(Small):
    """Clips by the norm of every gradient that there is, as people do."""

    configure_optimizers = head_only

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClipsAllInItsMethod(Small):
    configure_optimizers = head_only

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class LooksBeforeTheyGo(Small):
    """The gradients of the last step are still there in on_before_zero_grad."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if gradients := all_gradients(self):
            with torch.no_grad():
                self.net[3].bias.add_(gradients[0].sum(), alpha=0.1)


class GradientsSeenByACallback(pl.Callback):
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        LooksBeforeTheyGo.on_before_zero_grad(pl_module, optimizer)


class TestGradients:
    @pytest.mark.parametrize("steps", [2, 3])
    def test_of_a_half_window(self, steps: int, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, Small, accumulate_grad_batches=steps)

    def test_of_a_half_window_for_a_closure_that_is_called_again(self, tmp_path: Path) -> None:
        make = with_optimizer(OPTIMIZERS["two evaluations a step"])
        assert_resumes_everywhere(tmp_path, make, accumulate_grad_batches=2)

    def test_of_a_half_window_whose_length_changes_with_the_epoch(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(
            tmp_path,
            Small,
            lambda: [pl.callbacks.GradientAccumulationScheduler({0: 3, 1: 2, 2: 3})],
            max_epochs=3,
        )

    @pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
    def test_scaled_ones_of_a_half_window(self, precision: str, tmp_path: Path) -> None:
        assert_resumes_everywhere(
            tmp_path, Small, accumulate_grad_batches=3, precision=precision, gradient_clip_val=0.1
        )

    def test_sparse_ones(self, tmp_path: Path) -> None:
        make = with_optimizer(lambda m: optim.SGD(m.parameters(), lr=0.1), Bag)
        assert_resumes_everywhere(tmp_path, make, accumulate_grad_batches=3)

    def test_sparse_ones_for_two_optimizers_by_hand(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, BagByHand)

    @pytest.mark.parametrize("make", [ClipsAll, ClipsAllInItsMethod])
    @pytest.mark.parametrize("window", [1, 3])
    def test_that_no_optimizer_holds(self, make: Any, window: int, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, make, choose=some(2), accumulate_grad_batches=window)

    def test_are_left_out_where_nobody_can_see_them(self, tmp_path: Path) -> None:
        """A file is not made larger by what every step clears, or nobody looks at."""

        class Saves(Small):
            configure_optimizers = head_only

        saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=1)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=2, logger=False, callbacks=[saving],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Saves(), rows())
        assert load(tmp_path / "a.ckpt")["holdfast"]["gradients"] is None

    def test_that_a_hook_sees_before_they_are_cleared(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, LooksBeforeTheyGo, choose=some(2))

    def test_that_a_callback_sees_before_they_are_cleared(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, Small, lambda: [GradientsSeenByACallback()], choose=some(2))


# -- by hand -------------------------------------------------------------------------------------------------


class Two(ByHand):
    """Two optimizers, one for each layer."""

    def configure_optimizers(self) -> Any:
        return [optim.Adam(self.net[0].parameters(), lr=0.05), optim.SGD(self.net[3].parameters(), lr=0.05)]


class Adversarial(Two):
    """The second is stepped every third batch; their schedulers by hand, the second's once an epoch."""

    def configure_optimizers(self) -> Any:
        first, second = super().configure_optimizers()
        return [first, second], [
            schedulers.ExponentialLR(first, 0.9),
            schedulers.ReduceLROnPlateau(second, patience=0, threshold=0.5),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for one, due in ((first, True), (second, batch_idx % 3 == 2)):
            if due:
                self.toggle_optimizer(one)
                loss = self.loss(batch)
                self.remember(loss)
                one.zero_grad()
                self.manual_backward(loss)
                one.step()
                self.untoggle_optimizer(one)
        self.lr_schedulers()[0].step()
        self.log("last", loss)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers()[1].step(self.trainer.callback_metrics["last"])


class Closures(Two):
    def configure_optimizers(self) -> Any:
        return [
            optim.LBFGS(self.net[0].parameters(), lr=0.1, max_iter=2, line_search_fn="strong_wolfe"),
            SharpnessAware(self.net[3].parameters(), lr=0.05, momentum=0.9),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for one in self.optimizers():

            def closure(one: Any = one) -> Tensor:
                one.zero_grad()
                loss = self.loss(batch)
                self.remember(loss)
                self.manual_backward(loss)
                return loss

            one.step(closure=closure)


class ToggledHalfWay(Two):
    """What one batch toggles, the next one untoggles."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one = self.optimizers()[(batch_idx // 2) % 2]
        if batch_idx % 2 == 0:
            self.toggle_optimizer(one)
        loss = self.loss(batch)
        self.remember(loss)
        self.manual_backward(loss)
        one.step()
        one.zero_grad()
        if batch_idx % 2 == 1:
            self.untoggle_optimizer(one)


class WindowsByHand(Two):
    """Accumulates where it would not synchronize, unscales and clips before it steps."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch) * (1e6 if batch_idx == 1 else 1)  # overflows once
        self.remember(loss)
        if batch_idx % 3 != 2:
            with self.no_sync():
                self.manual_backward(loss / 3)
            return
        self.manual_backward(loss / 3)
        for one in self.optimizers():
            self.clip_gradients(one, gradient_clip_val=0.5)
            one.step()
            one.zero_grad()


class OwnStep(Small):
    """Warms up, and steps every second batch, in optimizer_step."""

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=0.05)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 6)
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class TestByHand:
    @pytest.mark.parametrize("make", [Adversarial, Closures, ToggledHalfWay, WindowsByHand])
    def test_resumes(self, make: Any, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, make)

    def test_with_a_scaler(self, tmp_path: Path) -> None:
        _, files = assert_resumes_everywhere(tmp_path, WindowsByHand, precision="16-mixed")
        scales = [load(path)["MixedPrecision"]["scale"] for path in files]
        assert len(set(scales)) > 1, "an overflow has changed the scale"

    def test_a_step_of_ones_own(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, OwnStep)

    def test_a_fused_optimizer_with_a_scaler(self, tmp_path: Path) -> None:
        make = with_optimizer(lambda m: optim.Adam(m.parameters(), lr=0.05, fused=True))
        assert_resumes_everywhere(tmp_path, make, choose=some(2), precision="16-mixed")


# -- param groups --------------------------------------------------------------------------------------------


class AddsGroup(Small):
    """Trains the head, and from the second epoch on the body too."""

    def configure_optimizers(self) -> Any:
        self.net[0].requires_grad_(False)
        return optim.SGD(self.net[3].parameters(), lr=0.1, momentum=0.9)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.net[0].parameters()), "lr": 0.03})


class TestParamGroups:
    def test_added_while_training(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(tmp_path, AddsGroup, max_epochs=3)

    def test_added_beside_a_scheduler(self, tmp_path: Path) -> None:
        class Scheduled(AddsGroup):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return [optimizer], [schedulers.ExponentialLR(optimizer, 0.9)]

            def on_train_epoch_start(self) -> None:
                super().on_train_epoch_start()
                if self.current_epoch == 1:
                    self.optimizers().param_groups[-1]["initial_lr"] = 0.03
                    self.lr_schedulers().base_lrs.append(0.03)

        assert_resumes_everywhere(tmp_path, Scheduled, max_epochs=3)

    def test_in_another_order_each_parameter_gets_its_own_state(self, tmp_path: Path) -> None:
        """Such as one that comes out of a set: torch knows parameters by their number alone."""

        def ordered(backwards: bool) -> Any:
            def configure(module: Any) -> Any:
                parameters = list(module.parameters())
                return optim.Adam(parameters[::-1] if backwards else parameters, lr=0.02)

            return with_optimizer(configure)

        whole, trainer, saver = fit(tmp_path / "whole", ordered(False), save=True)
        resumed, again, _ = fit(tmp_path / "on", ordered(True), ckpt_path=saver.files[2])
        assert whole.losses[3:] == resumed.losses
        state = {name: again.optimizers[0].state[one] for name, one in resumed.named_parameters()}
        for name, one in whole.named_parameters():
            assert torch.equal(state[name]["exp_avg"], trainer.optimizers[0].state[one]["exp_avg"])

    def test_of_other_parameters_are_refused(self, tmp_path: Path) -> None:
        """What the run was not started with is the user's change, and is not undone."""
        _, _, saver = fit(tmp_path / "whole", AddsGroup, save=True)
        with pytest.raises(CheckpointIncompatible) as error:
            fit(
                tmp_path / "on",
                with_optimizer(lambda m: optim.SGD(m.net[0].parameters(), lr=0.1)),
                ckpt_path=saver.files[-1],
            )
        assert str(error.value) == (
            f"{saver.files[-1].name}: the state of optimizer 0 does not fit SGD: loaded state dict has a different "
            "number of parameter groups"
        )
