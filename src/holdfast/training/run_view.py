"""The read-only face of a trainer: what modules, callbacks and loggers ask it about the run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.callbacks.base import Checkpoint
from holdfast.callbacks.early_stopping import EarlyStopping
from holdfast.callbacks.progress_bar import ProgressBar
from holdfast.training.progress import Progress, RunningStage, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from holdfast.callbacks.base import Callback
    from holdfast.loggers.base import Logger
    from holdfast.strategies.base import Strategy
    from holdfast.training.evaluation import EvaluationLoop
    from holdfast.training.loops import FitLoop
    from holdfast.training.metrics import MetricStore
    from holdfast.training.module import LightningModule
    from holdfast.training.precision import Precision


class RunView:
    """Properties over the state that `Trainer` keeps; none of them changes anything."""

    callbacks: list[Callback]
    default_root_dir: str
    fit_loop: FitLoop | None
    loggers: list[Logger]
    max_epochs: int | None
    max_steps: int
    metrics: MetricStore
    num_sanity_val_steps: int
    precision_plugin: Precision
    progress: Progress
    state: TrainerState
    strategy: Strategy
    accumulate_grad_batches: int
    evaluation_loop: EvaluationLoop | None
    model: LightningModule | None

    # -- the model -------------------------------------------------------------------------------------------

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the current or last run."""
        if self.model is None:
            raise RuntimeError("This trainer has not run anything yet, so it has no module.")
        return self.model

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
        loop = (
            self.fit_loop.validation
            if self.fit_loop is not None and self.evaluation_loop is None
            else self.evaluation_loop
        )
        return [] if loop is None or loop.prefix != "validation" else list(loop.batches)

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Validation batches of each loader in the sanity check."""
        limit = float("inf") if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
        return [min(count, limit) for count in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Test batches of each loader."""
        return self._batches_of("test")

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Prediction batches of each loader."""
        return self._batches_of("predict")

    def _batches_of(self, prefix: str) -> list[int | float]:
        loop = self.evaluation_loop
        return list(loop.batches) if loop is not None and loop.prefix == prefix else []

    @property
    def train_dataloader(self) -> Any:
        """The training loader, as the user made it."""
        stream = None if self.fit_loop is None else self.fit_loop.stream
        return None if stream is None else stream.loader

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or the list of them."""
        return self._loaders_of("validation")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader, or the list of them."""
        return self._loaders_of("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loader, or the list of them."""
        return self._loaders_of("predict")

    def _loaders_of(self, prefix: str) -> Any:
        loops = [self.evaluation_loop, None if self.fit_loop is None else self.fit_loop.validation]
        for loop in loops:
            if loop is not None and loop.prefix == prefix:
                loaders = [stream.loader for stream in loop.streams]
                return loaders[0] if len(loaders) == 1 else loaders
        return None

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
        accumulate = self.accumulate_grad_batches
        per_epoch = loop.batches if loop.batches == float("inf") else -(-int(loop.batches) // accumulate)
        return min(steps, per_epoch * int(self.max_epochs or 0))

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
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        """The first logger's directory of this version; without a logger the root directory."""
        return self.default_root_dir if self.logger is None else self.logger.log_dir

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """The callbacks that save."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first of them, or None."""
        found = self.checkpoint_callbacks
        return found[0] if found else None

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
        return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return self.strategy.world_size

    @property
    def num_devices(self) -> int:
        """Devices on this machine that the job uses."""
        return 1

    @property
    def num_nodes(self) -> int:
        """Machines in the job."""
        return 1

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
