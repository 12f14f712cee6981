"""Measure how long the stages of a run take, and stop training when its time is up."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Callback
from holdfast.callbacks.triggers import posted
from holdfast.errors import ConfigError
from holdfast.utilities.durations import parse_duration
from holdfast.utilities.rank_zero import rank_zero_info
from holdfast.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer

_STAGES = ("train", "sanity_check", "validate", "test", "predict")


class Timer(Callback):
    """Measure the time that training, validation and testing take; stop training when its time is up.

    The time of training is counted over all lives of a run: it is in the checkpoint, and a resumed run has
    only what is left. The trainer honours ``min_epochs`` and ``min_steps`` before it stops. Rank 0's clock
    decides. Where training stops, it is saved as ``stopped.ckpt`` beside the other checkpoints, before the
    epoch is cut short: started again with more time, the run goes on exactly from there.

    Args:
        duration: How long training may take: ``"DD:HH:MM:SS"``, a timedelta, or its arguments as a dict;
            None only measures. At 0 nothing is trained.
        interval: Look at the clock after each "step" or after each "epoch".
        verbose: Say when the time is up.

    Raises:
        ConfigError: ``duration`` or ``interval`` is nothing of the kind.
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError(f"Timer(interval={str(interval)!r}) must be 'step' or 'epoch'.")
        self._duration_s = (
            None
            if duration is None
            else parse_duration(duration, f"Timer(duration={duration!r})").total_seconds()
        )
        self._interval = str(interval)
        self._verbose = verbose
        self._started_s: dict[str, float] = {}
        self._ended_s: dict[str, float] = {}
        self._before_s = 0.0
        self._told = False
        self._posted = False

    @property
    def duration_s(self) -> float | None:
        """How long training may take, in seconds; None for as long as it wants."""
        return self._duration_s

    def uses_hook(self, name: str) -> bool:
        """Leave out the hook that does not look at the clock: then a step costs nothing."""
        for hook, interval in (("on_train_batch_end", "step"), ("on_train_epoch_end", "epoch")):
            if name == hook and getattr(type(self), hook) is getattr(Timer, hook):
                return self._duration_s is not None and self._interval == interval
        return super().uses_hook(name)

    # -- what it measured ------------------------------------------------------------------------------------

    def start_time(self, stage: str = "train") -> float | None:
        """When a stage last began, on the monotonic clock in seconds; None if it has not."""
        return self._started_s.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When a stage last ended, on the monotonic clock in seconds; None if it has not."""
        return self._ended_s.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that a stage has taken: training over all lives of the run, others the last time."""
        start, end = self.start_time(stage), self.end_time(stage)
        before = self._before_s if _known(stage) == "train" else 0.0
        if start is None:
            return before
        return (monotonic() if end is None else end) - start + before

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds that are left of the duration; None if there is none."""
        return None if self._duration_s is None else self._duration_s - self.time_elapsed(stage)

    # -- when ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit before this one: its time is not this one's."""
        if stage == "fit":
            self._started_s.pop("train", None)
            self._ended_s.pop("train", None)
            self._before_s = 0.0
            self._told = self._posted = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a run whose time was up before."""
        self._check(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins."""
        self._begin("train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        self._ended_s["train"] = monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation begins."""
        self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is over."""
        self._ended_s["validate"] = monotonic()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test begins."""
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test is over."""
        self._ended_s["test"] = monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock; with several processes rank 0 does, and all stop at one safe point."""
        if trainer.world_size == 1:
            self._check(trainer)
        elif trainer.is_global_zero and not self._posted and self._is_over():
            self._posted = True
            posted(trainer, self)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        self._check(trainer)

    def _begin(self, stage: str) -> None:
        self._started_s[stage] = monotonic()
        self._ended_s.pop(stage, None)

    def _check(self, trainer: Trainer) -> None:
        if self._duration_s is None:
            return
        over = self._is_over()
        if trainer.world_size > 1:
            over = trainer.strategy.broadcast(over)
        if over:
            self.time_is_due(trainer)

    def _is_over(self) -> bool:
        return self._duration_s is not None and self.time_elapsed() >= self._duration_s

    def time_is_due(self, trainer: Trainer) -> None:
        """Stop training: the time is up."""
        assert self._duration_s is not None
        elapsed_s = self.time_elapsed()
        trainer.should_stop = True
        trainer.preemption.time_is_up(trainer)
        if self._verbose and not self._told:
            rank_zero_info(
                f"the time for training is up: {timedelta(seconds=int(elapsed_s))} of "
                f"{timedelta(seconds=int(self._duration_s))}; training stops"
                + (". The time counts over all starts of a run: raise it to go on" if self._before_s else "")
            )
        self._told = True

    # -- over resumes ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds that each stage has taken."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the time that training had taken."""
        self._before_s = float(state_dict.get("time_elapsed", {}).get("train", 0.0))


def _known(stage: str) -> str:
    if str(stage) not in _STAGES:
        raise ConfigError(f"Timer knows no stage {str(stage)!r}: expected one of {', '.join(_STAGES)}.")
    return str(stage)
