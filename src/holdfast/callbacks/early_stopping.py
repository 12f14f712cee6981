"""Stop a run whose monitored value no longer improves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from holdfast.callbacks import naming, triggers
from holdfast.callbacks.base import Callback
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info, warn_once

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class EarlyStoppingReason(Enum):
    """Why `EarlyStopping` stopped the run."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


@dataclass(frozen=True)
class Verdict:
    """What `judge` made of one value."""

    reason: EarlyStoppingReason
    message: str
    improved: bool
    wait_count: int

    @property
    def stops(self) -> bool:
        """Whether the run has to stop."""
        return self.reason is not EarlyStoppingReason.NOT_STOPPED


def judge(
    current: Tensor,
    best: Tensor,
    wait_count: int,
    *,
    monitor: str,
    mode: str,
    min_delta: float,
    patience: int,
    check_finite: bool,
    stopping_threshold: float | None,
    divergence_threshold: float | None,
) -> Verdict:
    """Decide, from one new value, whether it is an improvement and whether the run stops.

    Args:
        current: The new value, 0-dim. It is compared in its own precision: what equals a threshold when
            rounded to float32 is not better than it.
        best: The best so far; an infinity when there is none.
        wait_count: How many values in a row were no improvement.
        monitor: The value's name, for the message.
        mode: "min" or "max": which end is better.
        min_delta: By how much a value has to be better to be an improvement; below 0, by how much it may be
            worse.
        patience: How many values in a row may be no improvement.
        check_finite: Stop at NaN and infinities.
        stopping_threshold: Stop once the value is better than this.
        divergence_threshold: Stop once the value is worse than this.
    """
    better, worse = (torch.lt, torch.gt) if mode == "min" else (torch.gt, torch.lt)
    sign, against = ("<", ">") if mode == "min" else (">", "<")
    value, record = current.item(), best.item()
    if check_finite and not math.isfinite(value):
        text = f"{monitor} is {value}, not a finite number. The best was {record:.4g}."
        return Verdict(EarlyStoppingReason.NON_FINITE_METRIC, text, False, wait_count)
    if stopping_threshold is not None and better(current, stopping_threshold):
        text = f"{monitor} has reached the goal: {value:.6g} {sign} {stopping_threshold}."
        return Verdict(EarlyStoppingReason.STOPPING_THRESHOLD, text, False, wait_count)
    if divergence_threshold is not None and worse(current, divergence_threshold):
        text = f"{monitor} has diverged: {value:.6g} {against} {divergence_threshold}."
        return Verdict(EarlyStoppingReason.DIVERGENCE_THRESHOLD, text, False, wait_count)
    if better(current + min_delta if mode == "min" else current - min_delta, best):
        gain = "" if math.isinf(record) else f" by {abs(value - record):.4g}"
        text = f"{monitor} improved{gain} to {value:.4g}."
        if not better(current, best):
            text = f"{monitor} went from {record:.4g} to {value:.4g}, which min_delta={min_delta} lets pass."
        return Verdict(EarlyStoppingReason.NOT_STOPPED, text, True, 0)
    wait_count += 1
    if wait_count >= patience:
        times = "once" if wait_count == 1 else f"{wait_count} times in a row"
        text = f"{monitor} did not improve {times}. The best was {record:.4g}."
        return Verdict(EarlyStoppingReason.PATIENCE_EXHAUSTED, text, False, wait_count)
    return Verdict(EarlyStoppingReason.NOT_STOPPED, "", False, wait_count)


class EarlyStopping(Callback):
    """Stop the run when ``monitor`` has not improved ``patience`` times in a row.

    A value counts once for each time that it is judged: when the training epoch ends, or when validation
    ends if it doesn't run exactly once at the end of each epoch. The trainer still honours ``min_epochs``
    and ``min_steps``.

    Ranks: all judge rank 0's value. Log it with ``sync_dist=True``, and it is that of all the data.

    Args:
        monitor: The logged name to go by.
        min_delta: By how much a value has to be better to be an improvement; below 0, by how much it may be
            worse.
        patience: How many judgements in a row may bring no improvement.
        verbose: Say every improvement.
        mode: "min" or "max": which end is better.
        strict: Stop with an error when ``monitor`` was not logged; False judges it when it is there.
        check_finite: Stop when the value is NaN or infinite.
        stopping_threshold: Stop once the value is better than this.
        divergence_threshold: Stop once the value is worse than this.
        check_on_train_epoch_end: Judge when the training epoch ends (True) or when validation ends (False).
        log_rank_zero_only: Accepted for compatibility: messages always come from rank 0 alone, because
            every rank judges the same value.

    Raises:
        ConfigError: ``mode`` is neither "min" nor "max", or ``monitor`` was not logged (with ``strict``).
    """

    mode_dict: ClassVar[dict[str, Any]] = {"min": torch.lt, "max": torch.gt}
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        super().__init__()
        if mode not in self.mode_dict:
            raise ConfigError(f"EarlyStopping(mode={mode!r}) must be 'min' or 'max'.")
        self.monitor = monitor
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None

    @property
    def state_key(self) -> str:
        """Lightning's key: the class with the monitored name and the mode."""
        return f"{type(self).__qualname__}{ {'monitor': self.monitor, 'mode': self.mode}!r}"

    @property
    def monitor_op(self) -> Any:
        """The comparison that makes a value better."""
        return self.mode_dict[self.mode]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the value, if this is where that happens."""
        if self._judges_training_epochs(trainer):
            self._judge(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the value, if this is where that happens."""
        if not self._judges_training_epochs(trainer):
            self._judge(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the best value and why the run was stopped."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, ``patience`` included; old files lack some of it."""
        self.wait_count = int(state_dict.get("wait_count", 0))
        self.stopped_epoch = int(state_dict.get("stopped_epoch", 0))
        self.best_score = torch.as_tensor(state_dict.get("best_score", self.best_score)).detach().clone()
        self.patience = int(state_dict.get("patience", self.patience))
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")

    def _judges_training_epochs(self, trainer: Trainer) -> bool:
        return triggers.saves_on_train_epoch_end(
            self._check_on_train_epoch_end,
            validates=trainer.enable_validation,
            val_check_interval=trainer.val_check_interval,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        )

    def _judge(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        value = self._monitored(trainer)
        if value is None:
            return
        verdict = judge(
            value,
            self.best_score,
            self.wait_count,
            monitor=self.monitor,
            mode=self.mode,
            min_delta=self.min_delta if self.mode == "max" else -self.min_delta,
            patience=self.patience,
            check_finite=self.check_finite,
            stopping_threshold=self.stopping_threshold,
            divergence_threshold=self.divergence_threshold,
        )
        self.wait_count = verdict.wait_count
        if verdict.improved:
            self.best_score = value
            if self.verbose:
                rank_zero_info(verdict.message)
        if trainer.strategy.reduce_boolean_decision(verdict.stops, all=False):
            held_by = _held_by(trainer)
            if not held_by:
                rank_zero_info(f"stopping early: {verdict.message}")
            elif not trainer.should_stop:
                rank_zero_info(f"{verdict.message} The run stops once {held_by} is reached.")
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason = verdict.reason
            self.stopping_reason_message = verdict.message

    def _monitored(self, trainer: Trainer) -> Tensor | None:
        metrics = trainer.callback_metrics
        value = metrics.get(self.monitor)
        if value is not None:
            value = torch.as_tensor(value).detach().cpu().clone().squeeze()
        if trainer.world_size > 1:
            # Ranks that judged values of their own would stop at different times.
            value = trainer.strategy.broadcast(value)
        if value is not None:
            return value
        message = (
            f"EarlyStopping(monitor={self.monitor!r}) has nothing to go by: no such value was logged."
            f"{naming.nearest(self.monitor, metrics)}"
        )
        if self.strict:
            raise ConfigError(message)
        warn_once(("EarlyStopping", self.state_key), message)
        return None


def _held_by(trainer: Trainer) -> str:
    """Name the minimum that keeps the run going all the same; "" if there is none."""
    if trainer.current_epoch + 1 < (trainer.min_epochs or 0):
        return f"min_epochs={trainer.min_epochs}"
    if trainer.global_step < (trainer.min_steps or 0):
        return f"min_steps={trainer.min_steps}"
    return ""
