"""Optimization by hand and with overridden steps: the same hooks in the same order and the same weights as Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import holdfast

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

HOOKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_start",
    "on_train_batch_end",
)


def rows() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(20, 4, generator=generator)), batch_size=4)


def base(pl: Any, seen: list[Any]) -> Any:
    """A module with two parts that notes which hooks are called, with what kinds of arguments."""

    class Base(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

        def loss(self, batch: Any) -> Tensor:
            return (self.second(self.first(batch[0]).tanh()) - 1).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def note(name: str) -> Callable[..., None]:
        def hook(self: Any, *args: Any) -> None:
            told = [type(a).__name__ for a in args if isinstance(a, torch.optim.Optimizer)]
            seen.append((name, *told))

        return hook

    for name in HOOKS:
        setattr(Base, name, note(name))
    return Base


def gan(pl: Any, seen: list[Any]) -> Any:
    class Gan(base(pl, seen)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.toggle_optimizer(first)
            seen.append([p.requires_grad for p in self.parameters()])
            loss = self.loss(batch)
            first.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(first, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            first.step()
            self.untoggle_optimizer(first)
            with second.toggle_model():
                seen.append([p.requires_grad for p in self.parameters()])
                self.manual_backward(self.loss(batch) / 2)
                if batch_idx % 2:
                    self.clip_gradients(second, gradient_clip_val=0.05, gradient_clip_algorithm="value")
                    second.step()
                    second.zero_grad()
            for scheduler in self.lr_schedulers():
                scheduler.step()
            seen.append((self.global_step, self.trainer.global_step))

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.first.parameters(), lr=0.5)
            second = torch.optim.Adam(self.second.parameters(), lr=0.1)
            return [first, second], [StepLR(first, 2, 0.5), StepLR(second, 2, 0.5)]

    return Gan


def with_closures(pl: Any, seen: list[Any]) -> Any:
    class Closures(base(pl, seen)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for optimizer in self.optimizers():

                def closure(optimizer: Any = optimizer) -> Tensor:
                    seen.append("closure")
                    optimizer.zero_grad()
                    loss = self.loss(batch)
                    self.manual_backward(loss)
                    return loss

                seen.append(round(float(optimizer.step(closure=closure)), 6))
            return {"loss": self.loss(batch), "extra": torch.ones(2)}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append({name: (tuple(value.shape), value.requires_grad) for name, value in outputs.items()})

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.LBFGS(self.first.parameters(), lr=0.1, max_iter=3),
                torch.optim.SGD(self.second.parameters(), lr=0.1),
            ]

    return Closures


def overriding(name: str, method: Any) -> Callable[[Any, list[Any]], Any]:
    def make(pl: Any, seen: list[Any]) -> Any:
        cls = base(pl, seen)

        def overridden(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((name, sorted(kwargs)))
            return method(self, *args, **kwargs)

        return type("Overriding", (cls,), {name: overridden})

    return make


def every_second(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
    if batch_idx % 2 == 0:
        optimizer.step(closure=closure)
    else:
        closure()


def closure_first(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
    closure()
    optimizer.step()


def by_the_inner_one(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
    closure()
    optimizer.optimizer.step()


def warm_up(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
    optimizer.step(closure=closure)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (self.trainer.global_step + 1)


def clip_twice(
    self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
) -> None:
    self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
    self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val)


def sometimes_none(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx == 1 else {"loss": self.loss(batch), "kept": 3}


MODULES: dict[str, tuple[Callable[[Any, list[Any]], Any], dict[str, Any]]] = {
    "two optimizers, toggled, clipped, accumulated, with schedulers": (gan, {}),
    "closures, one of them LBFGS": (with_closures, {}),
    "optimizer_step every second batch": (overriding("optimizer_step", every_second), {}),
    "optimizer_step that calls the closure first": (overriding("optimizer_step", closure_first), {}),
    "optimizer_step by the inner optimizer": (overriding("optimizer_step", by_the_inner_one), {}),
    "optimizer_step that sets the rate": (overriding("optimizer_step", warm_up), {}),
    "optimizer_step with accumulation": (
        overriding("optimizer_step", warm_up),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    "backward": (overriding("backward", lambda self, loss: (2 * loss).backward()), {}),
    "optimizer_zero_grad": (
        overriding(
            "optimizer_zero_grad", lambda self, e, i, optimizer: optimizer.zero_grad(set_to_none=False)
        ),
        {},
    ),
    "configure_gradient_clipping": (
        overriding("configure_gradient_clipping", clip_twice),
        {"gradient_clip_val": 0.05},
    ),
    "configure_gradient_clipping by value": (
        overriding("configure_gradient_clipping", clip_twice),
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ),
    "training_step without a loss now and then": (overriding("training_step", sometimes_none), {}),
}


def run(pl: Any, make: Any, arguments: dict[str, Any]) -> tuple[list[Any], int, list[bytes]]:
    seen: list[Any] = []
    module = make(pl, seen)()
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, **dict.fromkeys(quiet, False), **arguments)
    trainer.fit(module, rows())
    weights = [parameter.detach().numpy().tobytes() for parameter in module.parameters()]
    return seen, trainer.global_step, weights


@pytest.mark.parametrize(("make", "arguments"), MODULES.values(), ids=MODULES.keys())
def test_hooks_steps_and_weights_are_lightnings(make: Any, arguments: dict[str, Any]) -> None:
    theirs, mine = run(lightning, make, arguments), run(holdfast, make, arguments)
    assert len(theirs[0]) > 10
    assert mine == theirs


@pytest.mark.parametrize("package", ["holdfast", "lightning"])
def test_a_wrapped_optimizer_passes_for_the_one_inside(package: str) -> None:
    found: dict[str, Any] = {}
    pl = holdfast if package == "holdfast" else lightning

    class Looks(gan(pl, [])):  # type: ignore[misc]
        def on_train_start(self) -> None:
            first, second = self.optimizers()
            found["is"] = [
                isinstance(first, torch.optim.SGD),
                isinstance(first, torch.optim.Optimizer),
                isinstance(second, torch.optim.Adam),
                isinstance(second, torch.optim.SGD),
                first.__class__.__name__,
            ]
            found["state"] = second.state is second.optimizer.state
            found["groups"] = first.param_groups is first.optimizer.param_groups
            found["defaults"] = first.defaults["lr"]
            found["plain"] = [
                type(optimizer).__name__ for optimizer in self.optimizers(use_pl_optimizer=False)
            ]
            found["schedule"] = StepLR(first, 1).optimizer is first
            found["repr"] = repr(first).split()[0]

    run(pl, lambda *_: Looks, {})
    assert found == {
        "is": [True, True, True, False, "LightningSGD"],
        "state": True,
        "groups": True,
        "defaults": 0.5,
        "plain": ["SGD", "Adam"],
        "schedule": True,
        "repr": "LightningSGD",
    }
