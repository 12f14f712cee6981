"""The read-only face of a trainer: what modules, callbacks and loggers ask it about the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.callbacks.base import Checkpoint
from holdfast.callbacks.early_stopping import EarlyStopping
from holdfast.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from holdfast.callbacks.progress_bar import ProgressBar
from holdfast.training.progress import Progress, RunningStage, TrainerFn, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from holdfast.callbacks.base import Callback
    from holdfast.loggers.base import Logger
    from holdfast.strategies.base import Strategy
    from holdfast.training.evaluation import EvaluationLoop
    from holdfast.training.loops import FitLoop
    from holdfast.training.metrics import MetricStore
    from holdfast.training.module import LightningModule
    from holdfast.training.precision import Precision
    from holdfast.training.preemption import Preemption


class RunView:
    """Properties over the state that `Trainer` keeps; asking changes nothing about the run."""

    callbacks: list[Callback]
    default_root_dir: str
    fit_loop: FitLoop | None
    loggers: list[Logger]
    max_epochs: int | None
    max_steps: int
    metrics: MetricStore
    num_sanity_val_steps: int | float
    precision_plugin: Precision
    preemption: Preemption
    progress: Progress
    state: TrainerState
    strategy: Strategy
    accumulate_grad_batches: int
    batch_idx: int
    evaluation_loop: EvaluationLoop | None
    evaluation_loops: dict[str, EvaluationLoop]
    log_dir_of_rank_zero: str | None = None
    model: LightningModule | None

    # -- the model -------------------------------------------------------------------------------------------

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the current or last run; None before the first."""
        return self.model  # type: ignore[return-value]

    # -- position --------------------------------------------------------------------------------------------

    @property
    def current_epoch(self) -> int:
        """The epoch that is running, from 0; after fit the number of epochs done."""
        return self.progress.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps done, of all optimizers."""
        return self.progress.global_step

    @property
    def num_training_batches(self) -> int | float:
        """Training batches in an epoch; infinite before the loader is there, or where it cannot tell."""
        return float("inf") if self.fit_loop is None else self.fit_loop.batches

    @property
    def num_val_batches(self) -> list[int | float]:
        """Validation batches of each loader."""
        return self._batches_of("validation")

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Validation batches of each loader in the sanity check."""
        loop = None if self.fit_loop is None else self.fit_loop.validation
        return [] if loop is None else [min(count, self.num_sanity_val_steps) for count in loop.batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Test batches of each loader."""
        return self._batches_of("test")

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Prediction batches of each loader."""
        return self._batches_of("predict")

    def _batches_of(self, prefix: str) -> list[int | float]:
        loop = self._loop_of(prefix)
        return [] if loop is None else list(loop.batches)

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch that is running, or ran last, is the epoch's last."""
        return self.batch_idx + 1 >= self.num_training_batches

    @property
    def val_check_batch(self) -> int | float | None:
        """Training batches between two validation runs; None before the loader is there."""
        return None if self.fit_loop is None else self.fit_loop.validation_interval

    @property
    def train_dataloader(self) -> Any:
        """The training loader, as the user made it."""
        stream = None if self.fit_loop is None else self.fit_loop.stream
        return None if stream is None else stream.loader

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or the collection of them, as it was given."""
        return self._loaders_of("validation")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader, or the collection of them, as it was given."""
        return self._loaders_of("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loader, or the collection of them, as it was given."""
        return self._loaders_of("predict")

    def _loaders_of(self, prefix: str) -> Any:
        loop = self._loop_of(prefix)
        return None if loop is None else loop.loaders

    @property
    def validate_loop(self) -> EvaluationLoop | None:
        """The loop of validation, inside fit or by itself; None before the first."""
        return self._loop_of("validation")

    @property
    def test_loop(self) -> EvaluationLoop | None:
        """The loop of the last test, or None."""
        return self._loop_of("test")

    @property
    def predict_loop(self) -> EvaluationLoop | None:
        """The loop of the last prediction, or None; it has the predictions and, for writers, their rows."""
        return self._loop_of("predict")

    def _loop_of(self, prefix: str) -> EvaluationLoop | None:
        own = self.evaluation_loops.get(prefix)
        if prefix != "validation" or self.fit_loop is None or self.state.fn is TrainerFn.VALIDATING:
            return own
        return self.fit_loop.validation or own

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole fit, from the limits and the data's length; may be infinite."""
        loop = self.fit_loop
        if loop is None:
            raise RuntimeError("trainer.estimated_stepping_batches is known during fit only.")
        loop.setup_data()
        steps = float("inf") if self.max_steps == -1 else self.max_steps
        if self.max_epochs in (None, -1):
            return steps
        if loop.batches == float("inf"):
            return steps
        schedule = next(
            (one for one in self.callbacks if isinstance(one, GradientAccumulationScheduler)), None
        )
        factors = (
            self.accumulate_grad_batches if schedule is None else schedule.get_accumulate_grad_batches(epoch)
            for epoch in range(int(self.max_epochs or 0))
        )
        return min(steps, sum(-(-int(loop.batches) // factor) for factor in factors))

    # -- metrics ---------------------------------------------------------------------------------------------

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Every logged value under every name it goes by, the newest of each."""
        return self.metrics.callback_metrics()

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What the loggers got last, and on top of it what they would get of this step."""
        return self.metrics.logged_metrics()

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """Values logged with ``prog_bar=True``; reading them waits for the device."""
        return self.metrics.bar_metrics()

    @property
    def metric_versions(self) -> dict[str, int]:
        """For each name in `callback_metrics` a number that changes whenever the value is a new one."""
        return self.metrics.versions()

    # -- parts -----------------------------------------------------------------------------------------------

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None; what is assigned is the only one from then on."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def loggers_here(self) -> list[Logger]:
        """The loggers that this rank writes to: all of them on rank 0, none elsewhere."""
        return self.loggers if self.is_global_zero else []

    @property
    def log_dir(self) -> str | None:
        """The first logger's directory of this version, or else its ``save_dir``; without one the root.

        Every rank has rank 0's once a run has begun.
        """
        if self.log_dir_of_rank_zero is not None:
            return self.log_dir_of_rank_zero
        return self.default_root_dir if self.logger is None else self.logger.log_dir or self.logger.save_dir

    @property
    def scaler(self) -> Any:
        """The gradient scaler, or None."""
        return self.precision_plugin.scaler

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """The callbacks that save."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first of them that keeps track of its files, or else the first, or None."""
        found = self.checkpoint_callbacks
        return next((one for one in found if hasattr(one, "best_model_path")), found[0] if found else None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """The callbacks that stop early."""
        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first of them, or None."""
        found = self.early_stopping_callbacks
        return found[0] if found else None

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, or None."""
        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    # -- who and where ---------------------------------------------------------------------------------------

    @property
    def global_rank(self) -> int:
        """Rank of this process in the job."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """Rank of this machine in the job."""
        return self.strategy.node_rank

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return self.strategy.world_size

    @property
    def accelerator(self) -> Any:
        """The kind of device that the run computes on."""
        return self.strategy.accelerator

    @property
    def num_devices(self) -> int:
        """Devices on this machine that the job uses."""
        return len(self.strategy.parallel_devices)

    @property
    def num_nodes(self) -> int:
        """Machines in the job."""
        return int(getattr(self.strategy, "num_nodes", 1))

    @property
    def is_global_zero(self) -> bool:
        """True on rank 0."""
        return self.global_rank == 0

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices on this machine."""
        device: torch.device = self.strategy.root_device
        return [device.index or 0]

    @property
    def precision(self) -> str:
        """The precision in today's spelling."""
        return self.precision_plugin.precision

    # -- what it does now ------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Training batches are running."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Validation is running, inside fit or by itself."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """The test is running."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Prediction is running."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """The few validation batches before training are running."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Validation or the test is running."""
        return self.validating or self.testing or self.sanity_checking

    @property
    def interrupted(self) -> bool:
        """The last run ended with an exception."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """SIGTERM, or another of ``Trainer(stop_signals=...)``, came in the current or last fit."""
        return self.preemption.stop_received

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once per job, above the progress bar if there is one."""
        if self.is_global_zero:
            bar = self.progress_bar_callback
            (print if bar is None else bar.print)(*args, **kwargs)
