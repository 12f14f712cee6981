"""The callback that ends a run in a hook: by an exception, a signal, or because its time is up."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy
import torch

import holdfast as pl
from holdfast.callbacks import Timer
from holdfast.training import preemption


class Stopped(Exception):
    pass


STOP_HOOKS = (
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_train_end",
    "on_fit_end",
    "teardown",
)
PLACES = (*STOP_HOOKS, "training step", "before committed", "committed")

# An exception of one's own; Ctrl-C as an exception; the same from outside, in a process that lives on or in one
# that ends; and time that is up. "sigint" and "sigterm" are sent and are left to the trainer.
KINDS = ["error", "interrupt", "kill"]
if hasattr(preemption, "Preempted"):
    KINDS += ["sigterm", "sigint", "sigterm twice", "sigterm child", "time"]

IN_A_CHILD = ("kill", "sigterm child")


class Stopper(pl.Callback):
    """Counts the hooks, and at number ``at`` ends the run.

    Args:
        at: The number, from 1; None only counts.
        kind: One of `KINDS`.
        where: Count this hook alone; None counts all.
    """

    def __init__(self, at: int | None, kind: str, where: str | None = None) -> None:
        self.at, self.kind, self.where = at, kind, where
        self.count = 0
        self.names: list[str] = []
        """The hooks that were gone through."""
        self.ended_in: str | None = None
        """The hook that ended the run."""

    def passed(self, name: str, trainer: Any) -> None:
        self.names.append(name)
        if self.where is not None and name != self.where:
            return
        self.count += 1
        if self.at is None or not (
            self.count == self.at or (self.kind == "sigterm twice" and self.count == self.at + 1)
        ):
            return
        self.ended_in = name
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind.startswith("sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "sigint":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.kind == "time":
            for callback in trainer.callbacks:
                if isinstance(callback, Timer) and callback.duration_s is not None:
                    callback._duration_s = 0.0
        else:
            raise KeyboardInterrupt if self.kind == "interrupt" else Stopped

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.resumed_from is not None:
            path = trainer.resumed_from
            exact = trainer.strategy.load_checkpoint(path)["holdfast"]["exact"]
            with open(os.path.join(trainer.default_root_dir, "resumed.log"), "a") as log:
                log.write(f"{os.path.relpath(path, trainer.default_root_dir)} {exact}\n")
            # what is not restored shall show
            torch.rand(5), random.random(), numpy.random.rand(3)
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(1.0)
        for callback in trainer.checkpoint_callbacks:
            callback.committed = self.around(callback.committed)
        pl_module.passed = lambda name: self.passed(name, trainer)

    def around(self, committed: Any) -> Any:
        def both(trainer: Any, plan: Any, report: Any) -> None:
            self.passed("before committed", trainer)
            committed(trainer, plan, report)
            self.passed("committed", trainer)

        return both


def _hook(name: str) -> Any:
    def count(self: Stopper, trainer: Any, *rest: Any, **more: Any) -> None:
        self.passed(name, trainer)

    return count


for _name in STOP_HOOKS:
    setattr(Stopper, _name, _hook(_name))
