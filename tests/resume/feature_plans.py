"""What a run may be made of, by name, and which of it can live together."""

from __future__ import annotations

import random
from typing import Any

from .feature_data import Plan

# The first of each is the default; a failure is shrunk towards it.
CHOICES: dict[str, list[Any]] = {
    "rows": [12, 9, 13, 17, 21],
    "batch_size": [4, 3, 2],
    "shuffle": [False, True],
    "drop_last": [False, True],
    "draws": [False, True],
    "workers": [0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
    "own_generator": [False, True],
    "data": [
        "one",
        "one",
        "one",
        "lazy sampler",
        "stateful sampler",
        "iterable",
        "sized iterable",
        "stateful loader",
        "list",
        "min_size",
        "max_size",
        "max_size_cycle",
        "cycle with iterable",
        "nested",
    ],
    "module_data": ["loaders", "datamodule", "module"],
    "reload": [0, 0, 1, 2],
    "overfit": [0, 0, 0, 2, 0.5],
    "limit_train": [None, None, None, 2, 0.7],
    "epochs": [2, 3, 4, 1],
    "val": [
        None,
        "one",
        "drawing",
        "two",
        "sequential",
        "min_size",
        "max_size_cycle",
        "iterable",
        "shuffled",
    ],
    "val_interval": [1.0, 1.0, 0.5, 2, "always", "never"],
    "val_every": [1, 1, 2, None],
    "limit_val": [1.0, 1.0, 1, 0.5],
    "sanity": [0, 2, -1],
    "net": ["linear", "dropout", "batchnorm", "both"],
    "optimizer": ["sgd", "adam", "adamw", "lbfgs", "two groups"],
    "manual": [False, False, "two", "toggled", "window"],
    "scheduler": [
        None,
        "onecycle",
        "step",
        "plateau",
        "plateau step",
        "cosine",
        "lambda",
        "frequency",
        "two",
        "sequential",
    ],
    "accumulate": [1, 1, 2, 3, "scheduled"],
    "clip": [None, 0.05, "value"],
    "precision": [
        "32-true",
        "32-true",
        "32-true",
        "16-mixed",
        "bf16-mixed",
        "16-true",
        "bf16-true",
        "64-true",
    ],
    "metrics": [False, True],
    "average": [None, None, "swa", "swa early", "mean", "ema", "ema epochs", "ema late", "mean no buffers"],
    "finetuning": [None, None, None, 0, 1, 2],
    "monitor": [None, None, "step", "epoch", "all"],
    "timer": [False, True],
    "lambda": [False, True],
    "early": [None, None, "train", "val", "threshold"],
    "stop_at": [None, None, None, 2, 4],
    "min_steps": [None, None, 3],
    "lr_callback": [False, False, True],
    "target": [False, False, True],
    "state_callback": [False, True],
    "on_exception": [False, True],
    "saves": [
        ["step1"],
        ["default"],
        ["step2"],
        ["epoch_topk"],
        ["val_topk", "step1"],
        ["all"],
        ["last"],
        ["time"],
        ["default", "val_topk"],
        ["step_topk"],
        ["step3_last", "epoch2"],
        ["max_topk", "last"],
        ["exc", "step2"],
        ["weights", "step2"],
        ["weights2", "step2"],
        ["weights2", "step1"],
        ["max_topk", "epoch2", "step2"],
        ["named", "default"],
        ["epoch_train_end"],
        ["overwrite"],
        ["step2", "step2_dir"],
    ],
    "io": [None, None, None, None, "own", "async", "torch", "async own"],
    "strategy": [None, None, None, "subclass", "overridden"],
    "loggers": ["csv", "both", "tensorboard", "both reversed", "none", "prefix"],
    "log_every": [1, 2, 3],
    "max_time": [None, None, "00:09:00:00"],
    "max_steps": [-1, -1, -1, 5, 7],
    "hyper": [False, True],
    "log_odd": [False, False, True],
    "stop_kind": ["error", "interrupt", "kill", "kill"],
    "stops": [1, 1, 2, 3],
    "path": [False, False, False, True],
}


def draw(seed: int) -> Plan:
    """The plan of this number."""
    chance = random.Random(seed)
    # A sparse plan finds what a dense one hides behind its first failure, and the other way round.
    share = chance.choice([0.15, 0.3, 0.6, 1.0])
    plan = {
        name: chance.choice(values) if chance.random() < share else values[0]
        for name, values in CHOICES.items()
    }
    plan["saves"] = chance.choice(CHOICES["saves"])
    plan["stop_kind"] = chance.choice(CHOICES["stop_kind"])
    plan["places"] = [chance.random() for _ in range(3)]
    return fitted(plan)


_ENDLESS = ("iterable", "sized iterable", "stateful loader", "cycle with iterable")
_SWA = ("swa", "swa early")


def fitted(plan: Plan) -> Plan:
    """The plan without what cannot live together."""
    plan = dict(plan)
    _fit_optimization(plan)
    _fit_data(plan)
    if plan["val"] is None:
        plan["saves"] = [kind for kind in plan["saves"] if kind != "val_topk"]
        plan["early"] = "train" if plan["early"] == "val" else plan["early"]
    if plan["loggers"] == "none":
        plan["monitor"] = None
    if plan["net"] in ("batchnorm", "both"):
        plan["drop_last"] = True  # it cannot train on a last batch of one row
    return plan


def _fit_optimization(plan: Plan) -> None:
    if plan["manual"]:
        plan.update(accumulate=1, clip=None, finetuning=None, optimizer="sgd")
        if plan["manual"] == "toggled":
            plan["precision"] = "32-true"
        if plan["average"] in _SWA:
            plan["average"] = None
    elif plan["optimizer"] == "lbfgs":
        plan.update(accumulate=1, clip=None, finetuning=None, precision="32-true", scheduler=None)
    if plan["average"] in _SWA and (plan["optimizer"] == "two groups" or plan["scheduler"] == "two"):
        plan["average"] = None
    if plan["precision"] == "16-true":
        plan["net"] = {"both": "dropout", "batchnorm": "linear"}.get(plan["net"], plan["net"])
    if plan["finetuning"] is not None:
        # It adds a param group, and of torch's schedulers only these go on with one group more.
        plan["scheduler"] = plan["scheduler"] if plan["scheduler"] in ("step", "frequency") else None
        plan["optimizer"] = "sgd" if plan["optimizer"] == "two groups" else plan["optimizer"]
        plan["average"] = None if plan["average"] in _SWA else plan["average"]
        plan["target"] = False


def _fit_data(plan: Plan) -> None:
    if plan["data"] in _ENDLESS:
        plan["workers"] = 0
        plan["limit_train"], plan["overfit"] = plan["limit_train"] and 2, plan["overfit"] and 2
    if plan["data"] == "stateful loader":
        # In an epoch that is cut short, such a loader has not said that it is over.
        plan.update(limit_train=None, overfit=0)
    elif plan["data"] == "min_size":
        plan["limit_train"] = plan["limit_train"] and 2  # a part of one batch is none
    if plan["overfit"]:
        plan["limit_train"] = None
        if plan["val"] == "iterable" or "min_size" in (plan["data"], plan["val"]):
            plan["overfit"] = 2  # a half of one batch, or of no known number, is none
    if plan["val"] == "iterable":
        plan["limit_val"] = 1
    if plan["val"] is None:
        plan.update(val_interval=1.0, val_every=1)
    elif (plan["val_every"] is None and isinstance(plan["val_interval"], float)) or (
        plan["data"] in _ENDLESS and plan["val_interval"] == 0.5
    ):
        plan["val_interval"] = 2
    shortened = plan["limit_train"] or plan["overfit"] or plan["data"] == "min_size"
    if plan["val_interval"] == 2 and plan["val_every"] is not None and shortened:
        plan["val_interval"] = 1  # there may be no second batch in an epoch
