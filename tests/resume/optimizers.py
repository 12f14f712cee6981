"""Optimizers and schedulers of a user's own, as they are found in the wild."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class Widened(Optimizer):
    """Keeps the weights in float32 beside those that it trains, and a counter in int64."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["wide"] = parameter.float().clone()
                    state["seen"] = [torch.zeros(2, dtype=torch.int64), {"twice": torch.tensor(2**24 + 1)}]
                state["seen"][0] += 2**24 + 1  # more than a float32 can tell apart
                state["wide"] -= group["lr"] * parameter.grad.float()
                parameter.copy_(state["wide"])
        return loss


class SharpnessAware(Optimizer):
    """Goes uphill, evaluates again there, goes back and steps: the closure is called twice."""

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = SGD(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        parameters = [one for group in self.param_groups for one in group["params"]]
        with torch.no_grad():
            norm = torch.stack([one.grad.norm() for one in parameters]).norm()
            for one in parameters:
                self.state[one]["before"] = one.clone()
                one.add_(one.grad, alpha=0.05 / float(norm))
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for one in parameters:
                one.copy_(self.state[one]["before"])
        self.base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"uphill": super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["uphill"])
        self.base.load_state_dict(state["base"])
        self.param_groups = self.base.param_groups


class Lookahead(Optimizer):
    """Wraps an optimizer without calling Optimizer.__init__, as third-party wrappers do."""

    def __init__(self, base: Optimizer, every: int = 3) -> None:
        self.base, self.every, self.steps = base, every, 0
        self.defaults = base.defaults
        self.slow = [one.detach().clone() for group in base.param_groups for one in group["params"]]

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.base.step(closure)
        self.steps += 1
        fast = [one for group in self.param_groups for one in group["params"]]
        if self.steps % self.every == 0:
            with torch.no_grad():
                for slow, one in zip(self.slow, fast, strict=True):
                    one.copy_(slow.lerp_(one, 0.5))
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "steps": self.steps, "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        self.steps = state["steps"]
        self.slow = [one.clone() for one in state["slow"]]


class KeepsHalf(SGD):
    """Clears no gradient: it halves them, so that each step depends on all before it."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    one.grad.mul_(0.5)


class Hyperbolic:
    """A scheduler that knows nothing of torch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self, metric: Any = None) -> None:
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Decay:
    """What a LambdaLR may be given instead of a function: an object with a state."""

    def __init__(self) -> None:
        self.calls = 0
        self.factors: list[float] = []

    def __call__(self, step: int) -> float:
        self.calls += 1
        self.factors = [*self.factors[-2:], 0.97**self.calls]
        return sum(self.factors) / len(self.factors)


def all_gradients(module: torch.nn.Module) -> list[Tensor]:
    return [one.grad for one in module.parameters() if one.grad is not None]
