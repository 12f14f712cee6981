"""`Trainer`: runs a module over data, saves and resumes. Names and arguments are PyTorch Lightning's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from holdfast.callbacks.base import Callback, Checkpoint
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.errors import ConfigError
from holdfast.profilers.choose import choose_profiler
from holdfast.strategies.choose import choose_strategy
from holdfast.training import configuration, run
from holdfast.training.checkpoint_stats import CheckpointStats
from holdfast.training.datamodule import LightningDataModule
from holdfast.training.evaluation import EvaluationLoop
from holdfast.training.in_flight import InFlight
from holdfast.training.loops import FitLoop
from holdfast.training.metrics import MetricStore
from holdfast.training.module import LightningModule
from holdfast.training.optimization import AutomaticOptimization, ManualOptimization
from holdfast.training.optimizer import LightningOptimizer
from holdfast.training.plugins import environment_of, sort_plugins
from holdfast.training.preemption import Preemption
from holdfast.training.progress import Progress, TrainerFn, TrainerState, TrainerStatus
from holdfast.training.requirements import as_module
from holdfast.training.results import Results
from holdfast.training.run_view import RunView
from holdfast.training.saving import carry_out_requests, save_now
from holdfast.training.spellings import takes_old_spellings
from holdfast.training.validation_schedule import check_interval
from holdfast.utilities.rank_zero import warn_once
from holdfast.utilities.types import LRSchedulerConfig


class Trainer(RunView):
    """Trains, validates, tests and predicts; saves by itself, and goes on exactly where a run was killed.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
        strategy: "auto", "ddp", "fsdp", or a Strategy; "auto" is one process where one device is asked for.
        devices: How many of this machine's, each with a process of its own; "auto", or a list of GPUs'
            indices.
        num_nodes: Machines that train together.
        precision: "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true" or "64-true".
        logger: A logger or several; True for a CSVLogger, False for none.
        callbacks: A callback or several.
        fast_dev_run: Run this many batches (True: 1) of everything once, and save and log nothing.
        max_epochs: Epochs to train; -1 for no end. Default 1000 where max_steps says nothing either.
        min_epochs: Epochs before which nothing stops early.
        max_steps: Optimizer steps to train; -1 for no end.
        min_steps: Optimizer steps before which nothing stops early.
        max_time: Stop after this time: "DD:HH:MM:SS", a timedelta, or a dict of its arguments.
        limit_train_batches: Training batches in an epoch: a count, or a fraction up to 1.0.
        limit_val_batches: Likewise for validation.
        limit_test_batches: Likewise for the test.
        limit_predict_batches: Likewise for prediction.
        overfit_batches: Train and validate on this many batches (or this fraction), always the same ones.
        val_check_interval: Validate after this many batches (int), this fraction of an epoch, or this time.
        check_val_every_n_epoch: Validate in every n-th epoch; None counts batches across epochs.
        num_sanity_val_steps: Validation batches before training; -1 for all.
        log_every_n_steps: Steps between rows of step values in the loggers.
        enable_checkpointing: Add a ModelCheckpoint where callbacks has none (default yes).
        enable_progress_bar: Show progress (default yes).
        enable_model_summary: Show the model's size when fit starts (default yes).
        accumulate_grad_batches: Batches whose gradients make up one optimizer step.
        gradient_clip_val: Clip gradients to this; None does not clip.
        gradient_clip_algorithm: "norm" or "value".
        deterministic: True makes torch use deterministic algorithms or raise, "warn" warns instead.
        benchmark: Sets ``torch.backends.cudnn.benchmark``.
        inference_mode: Evaluate under `torch.inference_mode` rather than `torch.no_grad`.
        use_distributed_sampler: Give each process its part of every global batch; no to leave loaders alone.
        profiler: "simple", "advanced", "pytorch", or a Profiler: what takes how long.
        detect_anomaly: Sets `torch.autograd.set_detect_anomaly` for fit.
        barebones: Leave out all that costs time besides the steps, to see what these cost.
        plugins: A CheckpointIO of your own, a precision, a cluster environment; or a list of them.
        sync_batchnorm: Have BatchNorm layers use the statistics of the global batch.
        reload_dataloaders_every_n_epochs: Ask for new loaders after this many epochs; 0 for never.
        default_root_dir: Where logs and checkpoints go; the working directory when None.
        enable_autolog_hparams: Send hyperparameters to the loggers when a run starts.
        model_registry: None: there is none.
        exact: What to do about all that keeps a resumed run from being the run that never stopped: "warn"
            says it once, before the first batch; "require" refuses such a run.
        stop_signals: Signals at which fit saves at its next safe point and exits with code 143; () for none.

    Raises:
        ArgumentError: an argument does not exist or has the wrong type; the message names the fix.
        ConfigError: an argument, or a combination of them, cannot work.
    """

    resume_from_checkpoint: str | os.PathLike[str] | None
    """What ``fit`` goes on from where it is not told: the spelling of 1.x."""
    weights_save_path: str | None
    """Where checkpoint callbacks without a directory save: the spelling of 1.x."""

    @takes_old_spellings
    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        precision: Any = None,
        logger: Any = None,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Any = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        exact: str = "warn",
        stop_signals: Sequence[int | str] = ("SIGTERM",),
    ) -> None:
        check = configuration.check_count
        configuration.check_registry(model_registry)
        self.barebones = barebones
        if barebones:
            configuration.check_barebones(
                logger=logger, enable_checkpointing=enable_checkpointing,
                enable_progress_bar=enable_progress_bar, enable_model_summary=enable_model_summary,
                fast_dev_run=fast_dev_run, num_sanity_val_steps=num_sanity_val_steps,
                log_every_n_steps=log_every_n_steps, detect_anomaly=detect_anomaly, profiler=profiler,
            )  # fmt: skip
            logger = enable_checkpointing = enable_progress_bar = enable_model_summary = False
            num_sanity_val_steps = log_every_n_steps = 0
        trial = configuration.check_fast_dev_run(fast_dev_run)
        self.fast_dev_run: int | bool = fast_dev_run if isinstance(fast_dev_run, bool) else trial
        self.overfit_batches = configuration.check_limit("overfit_batches", overfit_batches)
        if self.overfit_batches:
            limit_train_batches = limit_val_batches = self.overfit_batches
        if trial:
            limit_train_batches = limit_val_batches = limit_test_batches = limit_predict_batches = trial
            max_steps, max_epochs, num_sanity_val_steps = trial, 1, 0
            val_check_interval, check_val_every_n_epoch = 1.0, 1
        self.default_root_dir = configuration.root_directory(default_root_dir)
        self.max_epochs = check("max_epochs", max_epochs, least=-1)
        self.max_steps = check("max_steps", -1 if max_steps is None else max_steps, least=-1)
        if self.max_epochs is None and self.max_steps == -1 and max_time is None:
            self.max_epochs = 1000
            warn_once(
                "max_epochs", "Trainer(max_epochs=...) was not given; training stops after 1000 epochs."
            )
        self.min_epochs = check("min_epochs", min_epochs, least=0)
        self.min_steps = check("min_steps", min_steps, least=0)
        self.limit_train_batches = configuration.check_limit("limit_train_batches", limit_train_batches)
        self.limit_val_batches = configuration.check_limit("limit_val_batches", limit_val_batches)
        self.limit_test_batches = configuration.check_limit("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = configuration.check_limit("limit_predict_batches", limit_predict_batches)
        self.check_val_every_n_epoch = check("check_val_every_n_epoch", check_val_every_n_epoch, least=1)
        self.val_check_interval = check_interval(val_check_interval, self.check_val_every_n_epoch)
        if num_sanity_val_steps is None:
            num_sanity_val_steps = 2
        sanity: int = check("num_sanity_val_steps", num_sanity_val_steps, least=-1)
        self.num_sanity_val_steps: int | float = float("inf") if sanity == -1 else sanity
        self.log_every_n_steps = (
            50 if log_every_n_steps is None else check("log_every_n_steps", log_every_n_steps, least=0)
        )
        self.reload_dataloaders_every_n_epochs = check(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, least=0
        )
        self.accumulate_grad_batches = check("accumulate_grad_batches", accumulate_grad_batches, least=1)
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        configuration.check_clipping(gradient_clip_val, gradient_clip_algorithm)
        self.inference_mode = inference_mode
        self.detect_anomaly = detect_anomaly
        self.enable_autolog_hparams = enable_autolog_hparams
        self.use_distributed_sampler = use_distributed_sampler
        self.sync_batchnorm = sync_batchnorm
        environment = environment_of(plugins)
        self.strategy = choose_strategy(strategy, accelerator, devices, num_nodes, environment)
        self.precision_plugin, self.cluster_environment = sort_plugins(
            plugins, precision, self.strategy.root_device, self.strategy
        )
        self.profiler = choose_profiler(profiler)
        configuration.set_deterministic(deterministic)
        if benchmark is not None:
            torch.backends.cudnn.benchmark = benchmark
        self.loggers = configuration.make_loggers(logger, self.default_root_dir, self.fast_dev_run)
        self.callbacks = configuration.make_callbacks(
            callbacks,
            checkpointing=enable_checkpointing,
            progress_bar=enable_progress_bar,
            summary=enable_model_summary,
            fast_dev_run=self.fast_dev_run,
            max_time=max_time,
        )
        self.exact = configuration.check_exact(exact)
        self.preemption = Preemption(stop_signals)
        self.engine = CheckpointEngine()
        self.state = TrainerState()
        self.progress = Progress()
        self.metrics = MetricStore()
        self.should_stop = False
        self.enable_validation = False
        """Whether this fit validates."""
        self.batch_idx = 0
        self.seed = torch.initial_seed()
        """What the seeds of batches and of validation derive from: torch's seed when fit began."""
        self.optimizers: list[Any] = []
        self.wrapped_optimizers: list[LightningOptimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.datamodule: Any = None
        self.fit_loop: FitLoop | None = None
        self.predictions: Any = None
        self.ckpt_path: str | os.PathLike[str] | None = None
        """The checkpoint that the current or last run was given; for "best", "last" and "auto" its path."""
        self.resumed_from: str | None = None
        """The checkpoint that the fit went on from."""
        self.resumed_automatically = False
        """Whether "auto" or "last" chose it: then it is the run's to replace, else it is never deleted."""
        self.finalized_loggers: list[Any] = []
        self.continued_loggers: list[Any] = []
        """The loggers that write on in the logs of the run that the fit goes on from."""
        self.save_requests: list[Checkpoint] = []
        self.saves_in_flight: list[InFlight] = []
        """Saves that go on in the background, and the callbacks that have yet to be told of their end."""
        self.checkpoint_stats = CheckpointStats()
        """What the saves of the current or last fit cost."""
        self.training_modes: dict[Any, bool] | None = None
        """While an evaluation runs: each module's mode outside of it."""
        self.broke_off = False
        """Whether the last fit ended with an exception, wherever that was."""
        self.model: LightningModule | None = None
        """The module of the current or last run."""
        self.evaluation_loop: EvaluationLoop | None = None
        """The loop of the last validation, test or prediction outside of fit; none since a fit began."""
        self.evaluation_loops: dict[str, EvaluationLoop] = {}
        """Of these, the last of each kind."""

    # -- what the user calls ---------------------------------------------------------------------------------

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train.

        Args:
            model: The module.
            train_dataloaders: The training loader, or a datamodule.
            val_dataloaders: The validation loader or loaders.
            datamodule: Where the loaders come from otherwise; without one, the module's own hooks.
            ckpt_path: What to go on from: a path, "last", "best", or "auto": the newest verified checkpoint
                of this run root, in whose directory and logs the run then goes on, or a fresh start if there
                is none.
            weights_only: Accepted for Lightning's sake: opening a checkpoint never runs code.

        Raises:
            ConfigError: the module lacks what training needs.
            CheckpointError: the checkpoint cannot be gone on from; nothing was trained or changed on disk.
        """
        model = as_module("fit", model)
        if isinstance(train_dataloaders, LightningDataModule):
            datamodule, train_dataloaders = train_dataloaders, None
        configuration.check_one_source("fit", datamodule, train_dataloaders, val_dataloaders)
        ckpt_path = self.resume_from_checkpoint if ckpt_path is None else ckpt_path
        run.guarded(
            self,
            TrainerFn.FITTING,
            lambda: run.fit(self, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path),
        )

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run validation once and return its metrics, one dict per loader.

        Without a model, the last fit's with its best weights, if a callback saved any.
        """
        results: list[dict[str, float]] = self._evaluate(
            TrainerFn.VALIDATING, model, dataloaders, datamodule, ckpt_path, verbose=verbose
        )
        return results

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run the test once and return its metrics, one dict per loader; otherwise like `validate`."""
        results: list[dict[str, float]] = self._evaluate(
            TrainerFn.TESTING, model, dataloaders, datamodule, ckpt_path, verbose=verbose
        )
        return results

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Return what ``predict_step`` returns for every batch; with several loaders a list of lists."""
        keep = return_predictions is not False
        return self._evaluate(
            TrainerFn.PREDICTING, model, dataloaders, datamodule, ckpt_path, keep_outputs=keep
        )

    def _evaluate(
        self, fn: TrainerFn, model: Any, dataloaders: Any, datamodule: Any, ckpt_path: Any, **options: bool
    ) -> Any:
        if isinstance(dataloaders, LightningDataModule):
            datamodule, dataloaders = dataloaders, None
        if model is not None:
            model = as_module(str(fn), model)
        configuration.check_one_source(str(fn), datamodule, dataloaders)
        return run.guarded(
            self, fn, lambda: run.evaluate(self, fn, model, dataloaders, datamodule, ckpt_path, **options)
        )

    def save_checkpoint(
        self, filepath: str | os.PathLike[str], weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Save the run as it is now; when this returns, the file is durable under its name.

        Inside a hook the rest of that hook's batch is missing from it, so the file is marked inexact: a run
        goes on from it, but not bit-identical to one that never stopped. ModelCheckpoint saves where it is
        exact.

        Args:
            filepath: The file's final name; directories are made.
            weights_only: Leave out what only training needs.
            storage_options: Handed to a CheckpointIO of your own; holdfast's engine takes none.

        Raises:
            StorageError: the disk refused; a file that was there before is untouched.
        """
        if self.model is None:
            raise ConfigError(
                "trainer.save_checkpoint(path): there is no model yet. Call fit, validate or test first."
            )
        inside = self.state.status is TrainerStatus.RUNNING or self.broke_off or self.progress.cut_short
        only = bool(weights_only)
        save_now(self, filepath, weights_only=only, exact=not inside, storage_options=storage_options)

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """A context in which a module is built on the run's device and in its number format right away.

        Args:
            empty_init: Leave weights uninitialised, because they are going to be loaded.
        """
        with self.strategy.tensor_init_context(empty_init), self.precision_plugin.module_init_context():
            yield

    # -- requests and the safe point -------------------------------------------------------------------------

    def request_save(self, callback: Checkpoint) -> None:
        """Ask for a save at the next safe point; the loop then asks ``callback`` for its plan."""
        if callback not in self.save_requests:
            self.save_requests.append(callback)

    def safe_point(self, exact: bool = True) -> None:
        """Carry out what was requested; called by the loop, after all hooks of a batch or an epoch.

        Raises:
            Preempted: a signal has asked the run to stop, and what it has trained is saved.
        """
        carry_out_requests(self, exact=exact and not self.preemption.cut_short)
        if exact:
            self.preemption.after_saves(self)

    # -- running ---------------------------------------------------------------------------------------------

    @property
    def results(self) -> Results:
        """What ``self.log`` writes into now."""
        return self.metrics.train if self.metrics.evaluation is None else self.metrics.evaluation

    def log_to_loggers(self, metrics: dict[str, Tensor], step: int, with_epoch: bool = True) -> None:
        """Send values to every logger; reading them waits for the device.

        A value called "step" says where on the loggers' axis the others belong.
        """
        if not metrics or not self.loggers or not self.is_global_zero:
            return
        values: dict[str, float] = {name: value.item() for name, value in metrics.items()}
        own_step = values.pop("step", None)
        if own_step is not None:
            step = int(own_step)
        elif with_epoch:
            values.setdefault("epoch", self.current_epoch)
        if not values:
            return
        for logger in self.loggers:
            logger.log_metrics(values, step=max(step, 0))
            if not type(logger).save.__module__.startswith("holdfast."):
                # One of the user's may write in save alone. Ours know themselves when to.
                logger.save()

    @property
    def optimization(self) -> AutomaticOptimization | ManualOptimization:
        """The running fit's optimization, automatic or manual."""
        if self.fit_loop is None:
            raise RuntimeError("Optimizers step during fit only.")
        return self.fit_loop.optimization
