"""Where a run is: counters that go into the checkpoint, and what the trainer is doing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class TrainerFn(str, Enum):
    """What the user asked the trainer to do."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    def __str__(self) -> str:
        return self.value


class RunningStage(str, Enum):
    """What the trainer is doing at this moment."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    def __str__(self) -> str:
        return self.value

    @property
    def evaluating(self) -> bool:
        """Validation, also the few batches before training, or the test."""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """What the names of its loaders begin with: "train", "val", "test" or "predict"."""
        validates = self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING)
        return "val" if validates else self.value


class TrainerStatus(str, Enum):
    """How far along the request is."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    def __str__(self) -> str:
        return self.value


@dataclass
class TrainerState:
    """What the trainer was asked, what it does now, and whether it is done."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """The last request ran to its end."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """The last request is over, one way or the other."""
        return self.status in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


# The point of an epoch that a checkpoint was taken at; a resumed run goes on right behind it.
START = "start"  # of the epoch: nothing of it is done
BATCH = "batch"  # after a batch and all its hooks, before the validation that may follow it
VALIDATED = "validated"  # after the batch's validation and schedulers, where there were any
END = "end"  # after all hooks and schedulers of the epoch


@dataclass
class Progress:
    """The position of a fit; with `rng.capture` and the data's state, all that a resumed run starts from."""

    epoch: int = 0
    """The epoch that is running, or about to."""
    batch: int = 0
    """Batches of it that are done."""
    stage: str = START
    global_step: int = 0
    """Optimizer steps, of all optimizers."""
    batches_that_stepped: int = 0
    """Batches that ended with an optimizer's step: the step number that loggers see."""
    total_batches: int = 0
    """Batches over all epochs."""
    samples: int = 0
    """Rows of the current epoch that the done batches held, of the whole job, as far as batch sizes tell."""
    validations: int = 0
    """Validation runs."""
    validation_batches: int = 0
    """Validation batches of a loader over all runs: the step number of what is logged for each of them."""
    full_epoch: bool = True
    """Whether the epoch that ended saw all its batches; false when it was stopped early."""
    cut_short: bool = False
    """Whether it was a limit that ended it early: a run with a higher one has its other batches before it."""
    should_stop: bool = False
    """Whether somebody, such as EarlyStopping, had told the run to stop."""
    loaders: dict[str, Any] = field(default_factory=dict)
    """With reload_dataloaders_every_n_epochs: when each loader was asked for, and with which generators."""
    since_validation_s: float = 0.0
    """With a time as val_check_interval: how much of it is over."""
    limits: list[int | None] = field(default_factory=lambda: [None, None])
    """``max_epochs`` and ``max_steps`` then: a run that resumes with other ones is meant to train on."""

    @property
    def log_step(self) -> int:
        """The step number under which loggers have what belongs to the batch that ran last."""
        return self.batches_that_stepped - (self.stage != BATCH)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; names that this version does not know are ignored."""
        for name in self.__dataclass_fields__:
            if name in state:
                setattr(self, name, state[name])

    def lightning_loops(self, optimizer_steps: int, batches_in_epoch: int) -> dict[str, Any]:
        """The position as Lightning 2 keeps it under "loops", so that it can go on from our file."""
        ended = self.stage == END
        epochs_begun = self.epoch + (0 if self.stage == START else 1)
        batches = dict.fromkeys(("ready", "started", "processed", "completed"), self.batch)
        total = dict.fromkeys(("ready", "started", "processed", "completed"), self.total_batches)
        epoch = {
            "ready": epochs_begun,
            "started": epochs_begun,
            "processed": epochs_begun if ended else self.epoch,
            "completed": self.epoch,
        }
        steps = {"ready": optimizer_steps, "completed": optimizer_steps}
        zeros = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        none = {"ready": 0, "completed": 0}
        zero_grads = {"ready": self.batch, "started": self.batch, "completed": self.batch}

        def evaluation() -> dict[str, Any]:
            return {
                "state_dict": {},
                "batch_progress": {"total": dict(zeros), "current": dict(zeros), "is_last_batch": False},
            }

        predict = {"state_dict": {}, "batch_progress": {"total": dict(zeros), "current": dict(zeros)}}
        return {
            "fit_loop": {
                "state_dict": {},
                "epoch_progress": {"total": dict(epoch), "current": dict(epoch)},
                "epoch_loop.state_dict": {"_batches_that_stepped": self.batches_that_stepped},
                "epoch_loop.batch_progress": {
                    "total": total,
                    "current": batches,
                    "is_last_batch": ended or self.batch == batches_in_epoch,
                },
                "epoch_loop.scheduler_progress": {"total": dict(none), "current": dict(none)},
                "epoch_loop.automatic_optimization.state_dict": {},
                "epoch_loop.automatic_optimization.optim_progress": {
                    "optimizer": {
                        "step": {"total": dict(steps), "current": dict(steps)},
                        "zero_grad": {"total": dict(zero_grads), "current": dict(zero_grads)},
                    }
                },
                "epoch_loop.manual_optimization.state_dict": {},
                "epoch_loop.manual_optimization.optim_step_progress": {
                    "total": dict(steps),
                    "current": dict(steps),
                },
                "epoch_loop.val_loop.state_dict": {},
                "epoch_loop.val_loop.batch_progress": evaluation()["batch_progress"],
            },
            "validate_loop": evaluation(),
            "test_loop": evaluation(),
            "predict_loop": predict,
        }
