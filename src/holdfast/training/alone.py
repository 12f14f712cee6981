"""A request to a trainer with one process, in a script that several processes run: rank 0 runs it alone.

The others do not run it a second time, into the same files. They are told how it ended when they are needed
again, and go on as if they had run it; the weights of the model they get with the next request that all of
them take part in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from holdfast.errors import ConfigError, RankFailed
from holdfast.strategies.launch import launcher, line_to_rank_zero
from holdfast.training.progress import TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

T = TypeVar("T")

_PATHS = ("dirpath", "best_model_path", "best_model_score", "last_model_path")


@dataclass
class Outcome:
    """How a request ended, in plain values.

    Attributes:
        fn: what was asked of the trainer.
        value: what it returned; of predictions only those that came after the first request of all.
        error: what it raised, in words, or "".
        metrics: the trainer's.
        progress: its epoch and its step.
        files: of each checkpoint callback, what it has saved.
    """

    fn: str
    value: Any = None
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    progress: tuple[int, int] = (0, 0)
    files: list[dict[str, Any]] = field(default_factory=list)


def alone(trainer: Trainer, fn: TrainerFn, run: Callable[[], T]) -> T:
    """Run a request, or in a process that rank 0 has started hear what came of it there.

    Raises:
        RankFailed: it failed there.
    """
    if trainer.world_size > 1 or launcher.busy:
        return run()
    line = line_to_rank_zero()
    if line is not None and line.state != "busy":
        taken: T = _take(trainer, fn, line.outcome())
        return taken
    if line is not None:
        return run()
    try:
        value = run()
    except Exception as error:
        launcher.outcomes.append(Outcome(str(fn), error=f"{type(error).__name__}: {error}"))
        raise
    launcher.outcomes.append(_told(trainer, fn, value))
    return value


def _told(trainer: Trainer, fn: TrainerFn, value: Any) -> Outcome:
    kept = value if fn is not TrainerFn.PREDICTING or launcher.children else None
    logged = trainer.callback_metrics.items()
    metrics = {name: float(one) for name, one in logged if one.numel() == 1 and not one.is_complex()}
    files = [{name: getattr(one, name, None) for name in _PATHS} for one in trainer.checkpoint_callbacks]
    progress = trainer.progress.epoch, trainer.progress.global_step
    return Outcome(str(fn), kept, metrics=metrics, progress=progress, files=files)


def _take(trainer: Trainer, fn: TrainerFn, outcome: Outcome) -> Any:
    if outcome.fn != str(fn):
        raise RankFailed(
            f"rank 0 has run trainer.{outcome.fn} where this process, which was started to run the same "
            f"script, runs trainer.{fn}.",
            rank=0,
        )
    if outcome.error:
        raise RankFailed(f"trainer.{fn} has failed on rank 0, which ran it alone: {outcome.error}", rank=0)
    if fn is TrainerFn.PREDICTING and outcome.value is None and trainer.fast_dev_run is False:
        raise ConfigError(
            "trainer.predict of a trainer with one process came before the first request with several, and "
            "its predictions are not handed to the others. Predict after that request, or with all processes."
        )
    trainer.state.status = TrainerStatus.FINISHED
    trainer.progress.epoch, trainer.progress.global_step = outcome.progress
    shown = trainer.callback_metrics
    for name, value in outcome.metrics.items():
        shown[name] = torch.tensor(value)
    for callback, saved in zip(trainer.checkpoint_callbacks, outcome.files, strict=True):
        for name, path in saved.items():
            if hasattr(callback, name):
                setattr(callback, name, path)
    return outcome.value
