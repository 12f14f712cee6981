"""The states of a trainer, where Lightning's users import them from."""

from __future__ import annotations

from holdfast.training.progress import RunningStage, TrainerFn, TrainerState, TrainerStatus

__all__ = ["RunningStage", "TrainerFn", "TrainerState", "TrainerStatus"]
