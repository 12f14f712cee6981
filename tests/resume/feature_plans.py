"""What a run may be made of, by name, which of it can live together, and how plans are drawn."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from .feature_data import Plan
from .feature_stops import KINDS, PLACES

# The first of each is the plain default, towards which a failure is made smaller.
CHOICES: dict[str, list[Any]] = {
    # data
    "rows": [12, 9, 13, 17, 21],
    "batch_size": [4, 3, 2],
    "shuffle": [False, True],
    "drop_last": [False, True],
    "draws": [False, True],
    "data": [
        "one",
        "iterable",
        "sized iterable",
        "batches",
        "stateful loader",
        "torchdata",
        "torchdata iterable",
        "own loader",
        "list",
        "min_size",
        "max_size",
        "max_size_cycle",
        "cycle with iterable",
        "nested",
    ],
    "sampler": [
        None,
        "weighted",
        "subset",
        "epoch",
        "lazy",
        "stateful",
        "batches",
        "buckets",
        "lazy batches",
    ],
    "fetch": [None, "at once", "blocks", "subset", "tensors"],
    "collate": [False, True],
    "own_generator": [False, True],
    "workers": [0, 1, 2, 4],
    "other_workers": [None, [0], [2], [1, 0, 2]],  # of the resumed runs, in turn
    "persistent": [False, True],
    "prefetch": [None, 1, 3],
    "context": [None, "spawn"],
    "worker_init": [False, True],
    "module_data": ["loaders", "datamodule", "module"],
    "reload": [0, 1, 2],
    "overfit": [0, 2, 0.5],
    "limit_train": [None, 2, 0.7],
    "epochs": [2, 3, 4, 1],
    # validation
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
    "val_interval": [1.0, 0.5, 2, "always", "never"],
    "val_every": [1, 2, None],
    "val_workers": [0, 1, 2],
    "limit_val": [1.0, 1, 0.5],
    "sanity": [0, 2, -1],
    # module and optimization
    "net": ["linear", "dropout", "batchnorm", "both"],
    "compiled": [False, True],
    "target": [False, True],
    "encoder": [False, True],
    "metrics": [False, True],
    "hyper": [False, True],
    "log_odd": [False, True],
    "optimizer": [
        "sgd",
        "adam",
        "adam fused",
        "adamw",
        "nadam",
        "radam",
        "adagrad",
        "rmsprop",
        "asgd",
        "rprop",
        "lbfgs",
        "lbfgs wolfe",
        "two groups",
    ],
    "manual": [False, "two", "toggled", "window", "closures"],
    "scheduler": [
        None,
        "onecycle",
        "cyclic",
        "step",
        "multistep",
        "plateau",
        "plateau step",
        "plateau val",
        "cosine",
        "lambda",
        "frequency",
        "two",
        "sequential",
        "chained",
        "own",
    ],
    "accumulate": [1, 2, 3, "scheduled"],
    "clip": [None, 0.05, "value"],
    "precision": ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"],
    # callbacks
    "average": [None, "swa", "swa early", "mean", "ema", "ema epochs", "ema late", "mean no buffers"],
    "finetuning": [None, 0, 1, 2],
    "monitor": [None, "step", "epoch", "all"],
    "timer": [False, True],
    "lambda": [False, True],
    "early": [None, "train", "val", "threshold"],
    "stop_at": [None, 2, 4],
    "lr_callback": [False, True],
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
    # the trainer
    "io": [None, "own", "async", "torch", "async own"],
    "strategy": [None, "subclass", "overridden"],
    "loggers": ["csv", "both", "tensorboard", "both reversed", "none", "prefix"],
    "log_every": [1, 2, 3],
    "max_time": [None, "00:09:00:00"],
    "max_steps": [-1, 5, 7],
    "min_steps": [None, 3],
    "exact": ["warn", "require"],
    # how it is stopped, and gone on with
    "stops": [1, 2, 3],
    "stopper_last": [False, True],
    "path": [False, True],
}

# Of one seed: once hypothesis has drawn ten examples, it varies each of them a little, five times. Here the next
# seed finds more.
SETTINGS = settings(
    max_examples=10,
    database=None,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

# What costs time or ends most runs early is drawn less often than the rest: in how many plans of 100, at the
# most, and in a long search.
RARE = {
    "workers": (9, 20),
    "other_workers": (6, 15),
    "val_workers": (5, 12),
    "context": (0, 4),
    "compiled": (0, 4),
    "overfit": (30, 30),
    "limit_train": (30, 30),
    "reload": (30, 30),
    "stop_at": (30, 30),
    "max_steps": (30, 30),
    "average": (60, 60),
    "finetuning": (30, 30),
    "manual": (35, 35),
    "precision": (60, 60),
    "path": (30, 30),
}

# A sparse plan finds what a dense one hides behind its first failure, and the other way round.
SHARES = (15, 30, 60, 90)


class Described(dict[str, Any]):
    """A plan that shows what is not the default: this is how it is told, and pasted as a case."""

    def __repr__(self) -> str:
        return repr(told(self))


def told(plan: Plan) -> Plan:
    """What of a plan is not the default."""
    return {name: value for name, value in plan.items() if value != _DEFAULT[name]}


def plan_of(told: Plan) -> Plan:
    """The whole plan of what is not the default."""
    default = {name: values[0] for name, values in CHOICES.items()}
    ends = {"kinds": ["error"] * 3, "hooks": [None] * 3, "places": [0.5] * 3, "file": 0.0}
    return Described(fitted({**default, **ends, **told}))


@st.composite
def plans(draw: st.DrawFn, *, long: bool = False) -> Plan:
    """Any plan.

    Args:
        draw: Hypothesis's.
        long: Draw also what costs seconds: workers that are spawned, compiled modules.
    """
    share = draw(st.sampled_from(SHARES))
    plan: Plan = {}
    for name, values in CHOICES.items():
        most = RARE.get(name, (100, 100))[long]
        # Both are drawn in any case: as each draw keeps its place, a failure is soon made smaller.
        leaves = draw(st.integers(0, 99)) >= 100 - min(share, most)
        value = draw(st.sampled_from(values))
        plan[name] = value if leaves else values[0]
    plan["saves"] = draw(st.sampled_from(CHOICES["saves"]))
    plan["kinds"] = [draw(st.sampled_from(KINDS)) for _ in range(3)]
    plan["hooks"] = [draw(st.sampled_from((None, *PLACES))) for _ in range(3)]
    plan["places"] = [(draw(st.integers(0, 99)) + 50) % 100 / 100 for _ in range(3)]
    plan["file"] = draw(st.integers(0, 99)) / 100
    return Described(fitted(plan))


_STREAMS = ("iterable", "sized iterable", "batches", "stateful loader", "torchdata iterable")
_ENDLESS = ("iterable", "batches", "stateful loader", "torchdata iterable", "cycle with iterable")
_KNOWS_ITS_POSITION = ("stateful loader", "torchdata", "torchdata iterable")
_SWA = ("swa", "swa early")


def fitted(plan: Plan) -> Plan:
    """The plan without what cannot live together, or has no effect in it."""
    plan = dict(plan)
    _fit_optimization(plan)
    _fit_loader(plan)
    _fit_epochs(plan)
    _fit_stops(plan)
    if plan["val"] is None:
        plan["saves"] = [kind for kind in plan["saves"] if kind != "val_topk"]
        plan["early"] = "train" if plan["early"] == "val" else plan["early"]
    if plan["loggers"] == "none":
        plan["monitor"] = None
    if plan["val_interval"] in ("always", "never"):
        plan["exact"] = "warn"  # it is a time, and refused
    if plan["net"] in ("batchnorm", "both"):
        plan["drop_last"] = True  # it cannot train on a last batch of one row
    if plan["drop_last"] and plan["data"] in (*_STREAMS, "cycle with iterable"):
        plan["workers"] = min(plan["workers"], 2)  # each of four would have less than a batch
    return plan


def _fit_optimization(plan: Plan) -> None:
    if plan["manual"]:
        plan.update(accumulate=1, clip=None, finetuning=None, optimizer="sgd")
        plan["scheduler"] = plan["scheduler"] and "step"
        if plan["manual"] in ("toggled", "closures"):
            plan["precision"] = "32-true"
        if plan["average"] in _SWA:
            plan["average"] = None
    elif plan["optimizer"].startswith("lbfgs"):
        plan.update(accumulate=1, clip=None, finetuning=None, precision="32-true", scheduler=None)
    if plan["own_generator"] and plan["other_workers"]:
        # Workers have drawn ahead in an epoch that ends before anybody could know.
        plan.update(early=None, stop_at=None, max_steps=-1)
    if plan["average"] in _SWA and plan["data"] == "stateful loader":
        # It reads the data once more when training has ended, and this loader counts that.
        plan["average"] = None
    if plan["average"] in _SWA and (plan["optimizer"] == "two groups" or plan["scheduler"] in ("two", "own")):
        plan["average"] = None
    if plan["precision"] == "16-true":
        plan["net"] = {"both": "dropout", "batchnorm": "linear"}.get(plan["net"], plan["net"])
    if plan["finetuning"] is not None:
        # It adds a param group, and of torch's schedulers and optimizers only these go on with one group more.
        plan["scheduler"] = (
            plan["scheduler"] if plan["scheduler"] in ("step", "frequency", "multistep") else None
        )
        plan["optimizer"] = "sgd" if plan["optimizer"] in ("two groups", "adagrad") else plan["optimizer"]
        plan["average"] = None if plan["average"] in _SWA else plan["average"]
        plan["target"] = plan["encoder"] = False
    if plan["scheduler"] == "plateau val" and plan["val"] is None:
        plan["scheduler"] = "plateau"


def _fit_loader(plan: Plan) -> None:
    kind = plan["data"]
    if kind in _STREAMS or kind == "torchdata":
        plan.update(sampler=None, fetch=None)
        if kind != "torchdata":
            plan.update(shuffle=False, own_generator=False, other_workers=None)
    if kind in ("batches", "stateful loader"):
        plan.update(workers=0, drop_last=False, collate=False)
    if kind in ("cycle with iterable", "own loader"):
        plan["other_workers"] = None
    if kind in _STREAMS and plan["workers"]:
        plan["drop_last"] = False  # each of them may have less than a batch
    if kind == "sized iterable":
        plan["workers"] = min(plan["workers"], 1)  # of more, torch cannot tell how many batches they give
    if kind == "torchdata iterable" and plan["workers"]:
        plan.update(draws=False, collate=False)  # its workers' generators are their own affair
    if plan["fetch"] == "blocks":
        plan.update(collate=False, drop_last=False)
        plan["sampler"] = (
            None if plan["sampler"] in ("batches", "buckets", "lazy batches") else plan["sampler"]
        )
    if plan["fetch"] == "tensors":
        plan["draws"] = False
    if plan["sampler"] is not None:
        plan["shuffle"] = False
    if plan["sampler"] == "lazy batches":
        plan["drop_last"] = False
    if plan["context"] == "spawn":
        # Each of them takes seconds to start, and they start anew in every epoch.
        plan.update(data="one", epochs=min(plan["epochs"], 2), val_workers=0)
        plan["workers"] = min(plan["workers"], 2)
        if plan["other_workers"] is not None:
            plan["other_workers"] = [min(one, 2) for one in plan["other_workers"]]
    if not plan["workers"] and not plan["other_workers"]:
        plan.update(prefetch=None, context=None, worker_init=False)
        if not plan["val_workers"]:
            plan["persistent"] = False
    if plan["val"] is None:
        plan["val_workers"] = 0


def _fit_epochs(plan: Plan) -> None:
    if plan["data"] in _ENDLESS:
        plan["limit_train"], plan["overfit"] = plan["limit_train"] and 2, plan["overfit"] and 2
    if plan["data"] == "min_size":
        plan["limit_train"] = plan["limit_train"] and 2  # a part of one batch is none
    if plan["sampler"] == "epoch" or plan["fetch"] == "blocks":
        plan["limit_train"], plan["overfit"] = plan["limit_train"] and 2, plan["overfit"] and 2
    if plan["overfit"]:
        plan["limit_train"] = None
        if plan["val"] == "iterable" or "min_size" in (plan["data"], plan["val"]):
            plan["overfit"] = 2  # a half of one batch, or of no known number, is none
    if plan["val"] == "iterable":
        plan["limit_val"] = 1
    if plan["val"] is None:
        plan.update(val_interval=1.0, val_every=1, limit_val=1.0, sanity=0)
    elif (plan["val_every"] is None and isinstance(plan["val_interval"], float)) or (
        plan["data"] in _ENDLESS and plan["val_interval"] == 0.5
    ):
        plan["val_interval"] = 2
    short = plan["sampler"] == "epoch" or plan["fetch"] == "blocks"
    shortened = plan["limit_train"] or plan["overfit"] or plan["data"] == "min_size" or short
    if plan["val_interval"] == 2 and plan["val_every"] is not None and shortened:
        plan["val_interval"] = 1  # there may be no second batch in an epoch
    if plan["val_interval"] == 0.5 and short:
        plan["val_interval"] = 1.0


def _fit_stops(plan: Plan) -> None:
    count = plan["stops"]
    plan["hooks"] = [
        None if hook and not _reached(plan, hook, number) else hook
        for number, hook in enumerate(plan["hooks"])
    ]
    for name, default in (("kinds", "error"), ("hooks", None), ("places", 0.5)):
        plan[name] = [*plan[name][:count], *[default] * (3 - count)]
    plan["file"] = plan["file"] if plan["path"] else 0.0
    if "time" in plan["kinds"] and plan["max_time"] is None:
        plan["max_time"] = "00:09:00:00"
    if "time" in plan["kinds"]:
        # Who goes on with more time after something else has said to stop means to train on.
        plan["stop_at"] = plan["early"] = None


def _reached(plan: Plan, hook: str, number: int) -> bool:
    """Whether the start of this number comes through the hook, and has done something by then."""
    if hook.startswith("on_validation"):
        return plan["val"] is not None
    if hook.startswith("on_sanity_check"):
        return plan["sanity"] != 0 and number > 0
    return number > 0 or hook not in ("on_fit_start", "on_train_start", "on_load_checkpoint")


_DEFAULT = dict(plan_of({}))
