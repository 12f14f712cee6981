"""Optimizers, schedulers and training by hand, as `feature_plans` names them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, optim
from torch.optim import lr_scheduler as s

from .feature_data import Plan


class Rate:
    """A scheduler of one's own, which torch knows nothing of."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer, self.turns = optimizer, 0

    def turn(self) -> None:
        self.turns += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.02 / (1 + self.turns % 4)

    def state_dict(self) -> dict[str, Any]:
        return {"turns": self.turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns = state["turns"]


def configured(module: Any) -> Any:
    """What ``configure_optimizers`` returns."""
    plan: Plan = module.plan
    if plan["manual"]:
        first = optim.Adam(module.backbone.parameters(), lr=0.02)
        second = optim.SGD(module.head.parameters(), lr=0.02, momentum=0.9)
        if plan["scheduler"] is None:
            return [first, second]
        return [first, second], [s.StepLR(first, 2, 0.7), s.ExponentialLR(second, 0.9)]
    params: Any = [p for p in module.parameters() if p.requires_grad]
    if plan["optimizer"] == "two groups":
        groups: Any = [
            {"params": list(module.backbone.parameters()), "lr": 0.01},
            {"params": list(module.head.parameters())},
        ]
        return scheduled(plan, optim.SGD(groups, lr=0.02, momentum=0.9))
    return scheduled(plan, optimizer(plan["optimizer"], params))


def optimizer(kind: str, params: Any) -> optim.Optimizer:
    kinds: dict[str, Any] = {
        "sgd": lambda: optim.SGD(params, lr=0.02, momentum=0.9),
        "adam": lambda: optim.Adam(params, lr=0.02),
        "adam fused": lambda: optim.Adam(params, lr=0.02, fused=True),
        "adamw": lambda: optim.AdamW(params, lr=0.02, weight_decay=0.1, amsgrad=True),
        "nadam": lambda: optim.NAdam(params, lr=0.02),
        "radam": lambda: optim.RAdam(params, lr=0.02),
        "adagrad": lambda: optim.Adagrad(params, lr=0.02),
        "rmsprop": lambda: optim.RMSprop(params, lr=0.005, momentum=0.5, centered=True),
        "asgd": lambda: optim.ASGD(params, lr=0.02, t0=3),
        "rprop": lambda: optim.Rprop(params, lr=0.005),
        "lbfgs": lambda: optim.LBFGS(params, lr=0.05, max_iter=3, history_size=3),
        "lbfgs wolfe": lambda: optim.LBFGS(params, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
    }
    made: optim.Optimizer = kinds[kind]()
    return made


def scheduled(plan: Plan, one: optim.Optimizer) -> Any:
    """The optimizer with the plan's scheduler."""
    kind = plan["scheduler"]
    if kind is None:
        return one
    if kind == "two":
        return [one], [
            {"scheduler": s.ExponentialLR(one, 0.9), "interval": "step"},
            {"scheduler": s.StepLR(one, 1, 0.7), "interval": "epoch"},
        ]
    each_step = {"interval": "step"}
    momentum = {"cycle_momentum": "momentum" in one.defaults or "betas" in one.defaults}
    kinds: dict[str, Any] = {
        "onecycle": lambda: {"scheduler": s.OneCycleLR(one, 0.1, total_steps=200, **momentum), **each_step},
        "cyclic": lambda: {"scheduler": s.CyclicLR(one, 0.001, 0.1, 2, cycle_momentum=False), **each_step},
        "step": lambda: {"scheduler": s.StepLR(one, 1, 0.5)},
        "multistep": lambda: {"scheduler": s.MultiStepLR(one, [1, 3, 4, 8], 0.6), **each_step},
        "plateau": lambda: {
            "scheduler": s.ReduceLROnPlateau(one, patience=0, threshold=0.5),
            "monitor": "loss_epoch",
        },
        "plateau step": lambda: {
            "scheduler": s.ReduceLROnPlateau(one, patience=0, threshold=0.5),
            "monitor": "loss_step",
            "interval": "step",
            "frequency": 2,
        },
        "plateau val": lambda: {
            "scheduler": s.ReduceLROnPlateau(one, patience=0, threshold=0.5, cooldown=1),
            "monitor": "val_loss",
            "strict": False,
        },
        "cosine": lambda: {
            "scheduler": s.CosineAnnealingWarmRestarts(one, 3),
            "interval": "step",
            "name": "cosine",
        },
        "lambda": lambda: {
            "scheduler": s.LambdaLR(one, [lambda n: 0.9**n] * len(one.param_groups)),
            "interval": "step",
        },
        "frequency": lambda: {"scheduler": s.ExponentialLR(one, 0.8), "interval": "step", "frequency": 2},
        "sequential": lambda: {
            "scheduler": s.SequentialLR(one, [s.ConstantLR(one, 0.5, 2), s.ExponentialLR(one, 0.9)], [3]),
            "interval": "step",
        },
        "chained": lambda: {
            "scheduler": s.ChainedScheduler([s.ConstantLR(one, 0.3, 3), s.PolynomialLR(one, 9)]),
            "interval": "step",
        },
        "own": lambda: {"scheduler": Rate(one), "interval": "step"},
    }
    return {"optimizer": one, "lr_scheduler": kinds[kind]()}


def by_hand(module: Any, loss: Tensor, pairs: Any, batch_idx: int) -> Tensor:
    """A training step without automatic optimization."""
    first, second = module.optimizers()
    kind = module.plan["manual"]
    if kind == "window":
        module.manual_backward(loss / 2)
        if batch_idx % 2:
            for one in (first, second):
                module.clip_gradients(one, gradient_clip_val=0.1)
                one.step()
                one.zero_grad()
    elif kind == "closures":
        for one, pair in ((first, pairs[0]), (second, pairs[-1])):

            def closure(one: Any = one, pair: Any = pair) -> Tensor:
                one.zero_grad()
                again: Tensor = module.loss(*pair)[0]
                module.manual_backward(again)
                return again

            one.step(closure=closure)
    else:
        if batch_idx % 2 == 0:
            if kind == "toggled":
                module.toggle_optimizer(first)
                loss = module.loss(*pairs[0])[0]
            first.zero_grad()
            module.manual_backward(loss)
            first.step()
            if kind == "toggled":
                module.untoggle_optimizer(first)
        second.zero_grad()
        module.manual_backward(module.loss(*pairs[-1])[0])
        second.step()
    schedulers = module.lr_schedulers()
    if schedulers is not None and batch_idx % 2 == 1:
        for one in schedulers if isinstance(schedulers, list) else [schedulers]:
            one.step()
    return loss
