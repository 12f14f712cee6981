"""A run reduced to what `ModelCheckpoint` sees of it, with the real engine and real files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint import catalog, reserved
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.training.checkpoint_stats import CheckpointStats


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


class FakeTrainer:
    """Counters, metrics and the safe point, in the order in which the real loop goes through them."""

    def __init__(self, root: str, *callbacks: ModelCheckpoint, validates: bool = True) -> None:
        self.default_root_dir = root
        self.checkpoint_callbacks = list(callbacks)
        self.loggers: list[Any] = []
        self.strategy = SimpleNamespace(broadcast=lambda value: value, own_checkpoint_io=None)
        self.state = SimpleNamespace(fn="fit")
        self.world_size = 1
        self.is_global_zero = True
        self.sanity_checking = False
        self.fast_dev_run = 0
        self.enable_validation = validates
        self.lightning_module = None
        self.val_check_interval: int | float = 1.0
        self.check_val_every_n_epoch: int | None = 1
        self.current_epoch = 0
        self.global_step = 0
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.metric_versions: dict[str, int] = {}
        self.resumed_from: str | None = None
        self.resumed_automatically = False
        self.weights_save_path: str | None = None
        self.fit_loop = None
        self.preemption = SimpleNamespace(cut_short=False)
        self.engine = CheckpointEngine()
        self.checkpoint_stats = CheckpointStats()
        self.kill_before_commit_of_step: int | None = None
        self.kill_between_names = False
        self.requests: list[ModelCheckpoint] = []

    def request_save(self, callback: ModelCheckpoint) -> None:
        if callback not in self.requests:
            self.requests.append(callback)

    def log(self, **values: float) -> None:
        for name, value in values.items():
            self.callback_metrics[name] = torch.tensor(value)
            self.metric_versions[name] = self.metric_versions.get(name, 0) + 1

    def start(self, resume: str | None = None, *, automatically: bool = False) -> None:
        for callback in self.checkpoint_callbacks:
            callback.setup(self, None, "fit")  # type: ignore[arg-type]
        if resume is not None:
            payload = load(resume)
            self.resumed_from, self.resumed_automatically = resume, automatically
            self.global_step, self.current_epoch = payload["global_step"], payload["epoch"]
            self.callback_metrics, self.metric_versions = payload["metrics"], payload["versions"]
            for callback in self.checkpoint_callbacks:
                callback.on_load_checkpoint(self, None, payload)  # type: ignore[arg-type]
                if callback.state_key in payload["callbacks"]:
                    callback.load_state_dict(payload["callbacks"][callback.state_key])
        for callback in self.checkpoint_callbacks:
            callback.on_train_start(self, None)  # type: ignore[arg-type]

    def batches(self, count: int, **values: float) -> None:
        for _ in range(count):
            self.global_step += 1
            if values:
                self.log(**values)
            for callback in self.checkpoint_callbacks:
                if callback.uses_hook("on_train_batch_end"):
                    callback.on_train_batch_end(self, None, None, None, 0)  # type: ignore[arg-type]
            self.safe_point()

    def validate(self, **values: float) -> None:
        self.log(**values)
        for callback in self.checkpoint_callbacks:
            callback.on_validation_end(self, None)  # type: ignore[arg-type]

    def end_epoch(self) -> None:
        for callback in self.checkpoint_callbacks:
            callback.on_train_epoch_end(self, None)  # type: ignore[arg-type]
        self.safe_point()
        self.current_epoch += 1

    def epoch(self, steps: int = 6, **values: float) -> None:
        self.batches(steps)
        self.validate(**values)
        self.end_epoch()

    def safe_point(self) -> None:
        requests, self.requests = self.requests, []
        planned = [(one, plan) for one in requests if (plan := one.plan_save(self)) is not None]  # type: ignore[arg-type]
        if not planned:
            return
        names = list(dict.fromkeys(name for _, plan in planned for name in plan.names))
        extra: dict[str, Any] = {}
        for _, plan in planned:
            extra.update(plan.summary_extra)
        payload = {
            "global_step": self.global_step,
            # A save at the end of an epoch goes on with the next.
            "epoch": self.current_epoch + 1,
            "metrics": dict(self.callback_metrics),
            "versions": dict(self.metric_versions),
            "callbacks": {one.state_key: one.state_dict() for one in self.checkpoint_callbacks},
        }
        killed = self.kill_before_commit_of_step == self.global_step
        if killed and self.kill_between_names:
            del names[1:]
        summary = {"step": self.global_step, "epoch": self.current_epoch, "metrics": {}, **extra}
        try:
            report = self.engine.save(payload, names[0], names=names[1:], summary=summary)
        except BaseException:
            for one, plan in planned:
                one.rolled_back(self, plan)  # type: ignore[arg-type]
            raise
        if killed:
            for _, plan in planned:
                reserved.give_up(plan.names)  # the end of a process does that
            raise Killed
        for one, plan in planned:
            one.committed(self, plan, report)  # type: ignore[arg-type]


def files(directory: str | os.PathLike[str]) -> list[str]:
    """The names in a directory, sorted; none if there is no directory."""
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def newest(directory: str | os.PathLike[str]) -> str:
    """The newest whole checkpoint, as ``ckpt_path="auto"`` would pick it."""
    return os.path.abspath(catalog.scan(directory)[0].path)


def steps_of(directory: str | os.PathLike[str]) -> dict[str, int]:
    """The global step that each file was saved at, by name."""
    return {name: load(os.path.join(directory, name))["global_step"] for name in files(directory)}


def comparable(state: Mapping[str, Any], root: str) -> dict[str, Any]:
    """A callback's state without the root directory and the run's id, which differ from run to run."""

    def strip(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(root, "")
        if isinstance(value, torch.Tensor):
            return repr(value.item())
        if isinstance(value, dict):
            return {strip(key): strip(item) for key, item in value.items()}
        return value

    return {key: strip(value) for key, value in state.items() if key != "run"}
