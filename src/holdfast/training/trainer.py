"""`Trainer`: runs a module over data, saves and resumes. Names and arguments are PyTorch Lightning's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from holdfast.callbacks.base import Callback, Checkpoint, SavePlan
from holdfast.callbacks.early_stopping import EarlyStopping
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.errors import ConfigError
from holdfast.strategies.single import SingleDeviceStrategy, choose_device
from holdfast.training import configuration, state
from holdfast.training.datamodule import LightningDataModule
from holdfast.training.evaluation import EvaluationLoop
from holdfast.training.hooks import call, is_overridden
from holdfast.training.hparams import HyperparametersMixin
from holdfast.training.loops import FitLoop
from holdfast.training.metrics import MetricStore, Results
from holdfast.training.module import LightningModule
from holdfast.training.optimization import LightningOptimizer, LRSchedulerConfig, read_configuration
from holdfast.training.precision import make_precision
from holdfast.training.progress import Progress, RunningStage, TrainerFn, TrainerState, TrainerStatus
from holdfast.training.resume import Resolved, resolve
from holdfast.training.run_view import RunView
from holdfast.utilities.rank_zero import rank_zero_info, warn_once

T = TypeVar("T")

_STAGES = {
    TrainerFn.VALIDATING: (RunningStage.VALIDATING, "val", "validation_step"),
    TrainerFn.TESTING: (RunningStage.TESTING, "test", "test_step"),
    TrainerFn.PREDICTING: (RunningStage.PREDICTING, "predict", "predict_step"),
}


class Trainer(RunView):
    """Trains, validates, tests and predicts; saves by itself, and goes on exactly where a run was killed.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
        strategy: "auto": one process on one device.
        devices: 1 or "auto"; or a list with one GPU's index.
        num_nodes: 1.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        logger: A logger or several; True for a CSVLogger, False for none.
        callbacks: A callback or several.
        fast_dev_run: Run this many batches (True: 1) of everything once, and save and log nothing.
        max_epochs: Epochs to train; -1 for no end. Default 1000 where max_steps says nothing either.
        min_epochs: Epochs before which nothing stops early.
        max_steps: Optimizer steps to train; -1 for no end.
        min_steps: Optimizer steps before which nothing stops early.
        limit_train_batches: Training batches in an epoch: a count, or a fraction up to 1.0.
        limit_val_batches: Likewise for validation.
        limit_test_batches: Likewise for the test.
        limit_predict_batches: Likewise for prediction.
        val_check_interval: Validate after this many batches (int) or this fraction of an epoch.
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
        detect_anomaly: Sets `torch.autograd.set_detect_anomaly` for fit.
        enable_autolog_hparams: Send hyperparameters to the loggers when a run starts.
        default_root_dir: Where logs and checkpoints go; the working directory when None.

    Raises:
        ConfigError: an argument does not exist or cannot work; the message names the fix.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | SingleDeviceStrategy = "auto",
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
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        val_check_interval: int | float | None = None,
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
        detect_anomaly: bool = False,
        enable_autolog_hparams: bool = True,
        default_root_dir: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = [name for name in Trainer.__init__.__annotations__ if name not in ("unknown", "return")]
            configuration.refuse_unknown(unknown, known)
        check = configuration.check_count
        self.fast_dev_run = int(fast_dev_run)
        if self.fast_dev_run:
            limit_train_batches = limit_val_batches = limit_test_batches = limit_predict_batches = self.fast_dev_run
            max_steps, max_epochs, num_sanity_val_steps = self.fast_dev_run, 1, 0
            val_check_interval, check_val_every_n_epoch = 1.0, 1
        self.default_root_dir = configuration.root_directory(default_root_dir)
        self.max_epochs = check("max_epochs", max_epochs, least=-1)
        self.max_steps = check("max_steps", max_steps, least=-1)
        if self.max_epochs is None and self.max_steps == -1:
            self.max_epochs = 1000
            warn_once("max_epochs", "Trainer(max_epochs=...) was not given; training stops after 1000 epochs.")
        self.min_epochs = check("min_epochs", min_epochs, least=0)
        self.min_steps = check("min_steps", min_steps, least=0)
        self.limit_train_batches = configuration.check_limit("limit_train_batches", limit_train_batches)
        self.limit_val_batches = configuration.check_limit("limit_val_batches", limit_val_batches)
        self.limit_test_batches = configuration.check_limit("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = configuration.check_limit("limit_predict_batches", limit_predict_batches)
        self.val_check_interval = configuration.check_limit("val_check_interval", val_check_interval)
        self.check_val_every_n_epoch = check("check_val_every_n_epoch", check_val_every_n_epoch, least=1)
        if self.check_val_every_n_epoch is None and isinstance(self.val_check_interval, float):
            raise ConfigError(
                "Trainer(check_val_every_n_epoch=None) counts batches across epochs: give val_check_interval as an int."
            )
        self.num_sanity_val_steps = 2 if num_sanity_val_steps is None else check(
            "num_sanity_val_steps", num_sanity_val_steps, least=-1
        )
        self.log_every_n_steps = 50 if log_every_n_steps is None else max(
            1, check("log_every_n_steps", log_every_n_steps, least=0)
        )
        self.accumulate_grad_batches = check("accumulate_grad_batches", accumulate_grad_batches, least=1)
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ConfigError(
                f"Trainer(gradient_clip_algorithm={gradient_clip_algorithm!r}): expected 'norm' or 'value'."
            )
        self.inference_mode = inference_mode
        self.detect_anomaly = detect_anomaly
        self._log_hyperparameters = enable_autolog_hparams
        if num_nodes != 1:
            raise ConfigError(f"Trainer(num_nodes={num_nodes!r}): one machine is what there is so far.")
        if isinstance(strategy, str):
            if strategy not in ("auto", "single_device"):
                raise ConfigError(f"Trainer(strategy={strategy!r}): 'auto' is what there is so far.")
            strategy = SingleDeviceStrategy(choose_device(accelerator, devices))
        self.strategy = strategy
        self.precision_plugin = make_precision(precision, strategy.root_device)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        if benchmark is not None:
            torch.backends.cudnn.benchmark = benchmark
        self.loggers = configuration.make_loggers(logger, self.default_root_dir, self.fast_dev_run)
        self.callbacks = configuration.make_callbacks(
            callbacks,
            checkpointing=enable_checkpointing,
            progress_bar=enable_progress_bar,
            summary=enable_model_summary,
            fast_dev_run=self.fast_dev_run,
        )
        self.engine = CheckpointEngine()
        self.state = TrainerState()
        self.progress = Progress()
        self.metrics = MetricStore()
        self.should_stop = False
        self.batch_idx = 0
        self.seed = torch.initial_seed()
        self.optimizers: list[Any] = []
        self.wrapped_optimizers: list[LightningOptimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.datamodule: Any = None
        self.fit_loop: FitLoop | None = None
        self.predictions: Any = None
        self.ckpt_path: str | None = None
        """The checkpoint that the current or last run was given, resolved to a path."""
        self.resumed_from: str | None = None
        """The checkpoint that the fit went on from; never deleted."""
        self.continues_version = False
        """Whether the fit writes on in the logs of the run that it goes on from."""
        self.save_requests: list[Checkpoint] = []
        self._module: LightningModule | None = None
        self._evaluation: EvaluationLoop | None = None

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
            ckpt_path: What to go on from: a path, "last", "best", or "auto": the newest verified checkpoint of
                this run root, in whose directory and logs the run then goes on, or a fresh start if there is none.
            weights_only: Accepted for Lightning's sake: opening a checkpoint never runs code.

        Raises:
            ConfigError: the module lacks what training needs.
            CheckpointError: the checkpoint cannot be gone on from; nothing was trained or changed on disk.
        """
        if not isinstance(model, LightningModule):
            raise ConfigError(f"trainer.fit(model): expected a holdfast.LightningModule, found {type(model).__name__}.")
        if isinstance(train_dataloaders, LightningDataModule):
            datamodule, train_dataloaders = train_dataloaders, None
        self._guarded(TrainerFn.FITTING, self._fit, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

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
        results: list[dict[str, float]] = self._guarded(
            TrainerFn.VALIDATING, self._evaluate, TrainerFn.VALIDATING, model, dataloaders, datamodule, ckpt_path, verbose
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
        results: list[dict[str, float]] = self._guarded(
            TrainerFn.TESTING, self._evaluate, TrainerFn.TESTING, model, dataloaders, datamodule, ckpt_path, verbose
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
        """Return what ``predict_step`` returns for every batch: a list, or one per loader if there are several."""
        keep = return_predictions is not False
        return self._guarded(
            TrainerFn.PREDICTING,
            self._evaluate,
            TrainerFn.PREDICTING,
            model,
            dataloaders,
            datamodule,
            ckpt_path,
            False,
            keep,
        )

    def save_checkpoint(
        self, filepath: str | os.PathLike[str], weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Save the run as it is now; when this returns, the file is durable under its name.

        Inside a hook the rest of that hook's batch is missing from it, so the file is marked inexact: a run goes
        on from it, but not bit-identical to one that never stopped. ModelCheckpoint saves where it is exact.

        Args:
            filepath: The file's final name; directories are made.
            weights_only: Leave out what only training needs.
            storage_options: Not supported.

        Raises:
            StorageError: the disk refused; a file that was there before is untouched.
        """
        if storage_options is not None:
            raise ConfigError("trainer.save_checkpoint(storage_options=...) is not supported. Leave it out.")
        if self._module is None:
            raise ConfigError("trainer.save_checkpoint(path): there is no model yet. Call fit, validate or test first.")
        inside = self.state.status is TrainerStatus.RUNNING
        self._save([os.path.abspath(os.fspath(filepath))], bool(weights_only), exact=not inside, extra={})

    # -- requests and the safe point -------------------------------------------------------------------------

    def request_save(self, callback: Checkpoint) -> None:
        """Ask for a save at the next safe point; the loop then asks ``callback`` for its plan."""
        if callback not in self.save_requests:
            self.save_requests.append(callback)

    def safe_point(self, exact: bool = True) -> None:
        """Carry out what was requested. All plans are made first, so that each file holds the state after all of them."""
        requests, self.save_requests = self.save_requests, []
        planned: list[tuple[Checkpoint, SavePlan]] = []
        try:
            for callback in requests:
                plan = callback.plan_save(self)
                if plan is not None:
                    planned.append((callback, plan))
            for weights_only in (False, True):
                group = [(callback, plan) for callback, plan in planned if plan.weights_only is weights_only]
                if not group:
                    continue
                names = list(dict.fromkeys(name for _, plan in group for name in plan.names))
                extra: dict[str, Any] = {}
                for _, plan in group:
                    extra.update(plan.summary_extra)
                report = self._save(names, weights_only, exact=exact, extra=extra)
                for callback, plan in group:
                    planned.remove((callback, plan))
                    callback.committed(self, plan, report)
        finally:
            for callback, plan in planned:
                callback.rolled_back(self, plan)

    def _save(self, names: list[str], weights_only: bool, *, exact: bool, extra: dict[str, Any]) -> Any:
        payload = state.capture(self, weights_only=weights_only, exact=exact)
        metrics = {name: value.item() for name, value in self.callback_metrics.items()}
        summary = {
            "step": self.global_step,
            "epoch": self.current_epoch,
            "metrics": metrics,
            "exact": exact and not weights_only,
            "kind": "weights" if weights_only else "full",
            **extra,
        }
        report = self.engine.save(payload, names[0], names=names[1:], summary=summary)
        for where, reason in report.omissions:
            warn_once(("omitted", where), f"{where} is not in the checkpoint: {reason}")
        return report

    # -- running ---------------------------------------------------------------------------------------------

    @property
    def results(self) -> Results:
        """What ``self.log`` writes into now."""
        return self.metrics.train if self.metrics.evaluation is None else self.metrics.evaluation

    def log_to_loggers(self, metrics: dict[str, Tensor], step: int, with_epoch: bool = True) -> None:
        """Send values to every logger; reading them waits for the device."""
        if not self.loggers or not metrics:
            return
        values: dict[str, float] = {name: value.item() for name, value in metrics.items()}
        if with_epoch:
            values.setdefault("epoch", self.current_epoch)
        for logger in self.loggers:
            logger.log_metrics(values, step=max(step, 0))

    def call_epoch_end(self) -> None:
        """``on_train_epoch_end``: callbacks, the module, and last those callbacks that judge what these logged."""
        results = self.results
        results.fx = "on_train_epoch_end"
        judges = [c for c in self.callbacks if isinstance(c, (Checkpoint, EarlyStopping))]
        for callback in self.callbacks:
            if callback not in judges and callback.uses_hook("on_train_epoch_end"):
                callback.on_train_epoch_end(self, self.lightning_module)
        call(self, "on_train_epoch_end", only="module")
        for callback in judges:
            if callback.uses_hook("on_train_epoch_end"):
                callback.on_train_epoch_end(self, self.lightning_module)
        results.fx = None

    def _guarded(self, fn: TrainerFn, run: Callable[..., T], *args: Any) -> T:
        """Run one of the four requests; whatever happens, callbacks hear of it and loggers are closed."""
        self.state.fn, self.state.status = fn, TrainerStatus.RUNNING
        self.should_stop = False
        self.save_requests.clear()
        try:
            result = run(*args)
        except BaseException as error:
            self.state.status = TrainerStatus.INTERRUPTED
            if self._module is not None:
                self._tell_of(error)
            raise
        else:
            self.state.status = TrainerStatus.FINISHED
            return result
        finally:
            self.state.stage = None
            if self._module is not None:
                self._module._results = None

    def _tell_of(self, error: BaseException) -> None:
        for callback in self.callbacks:
            callback.on_exception(self, self.lightning_module, error)
        if self.datamodule is not None:
            self.datamodule.on_exception(error)
        if self.save_requests:
            # Wherever it happened, it was not at a safe point.
            self.safe_point(exact=False)
        for logger in self.loggers:
            logger.finalize("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def _attach(self, model: LightningModule, datamodule: Any) -> None:
        self._module = model
        model.trainer = self
        model._results = self.metrics.train
        self.datamodule = datamodule
        if datamodule is not None:
            datamodule.trainer = self
        own = model.configure_callbacks()
        own = [own] if isinstance(own, Callback) else list(own or [])
        if own:
            replaced = {type(callback) for callback in own}
            kept = [callback for callback in self.callbacks if type(callback) not in replaced]
            self.callbacks = configuration.ordered(kept + own)

    def _setup(self, stage: str) -> None:
        """What every request begins with, up to the model being on its device."""
        model, datamodule = self.lightning_module, self.datamodule
        for owner in (datamodule, model):
            if is_overridden("prepare_data", owner):
                owner.prepare_data()
        if datamodule is not None:
            datamodule.setup(stage=stage)
        call(self, "setup", stage, only="callbacks")
        model.setup(stage=stage)
        if is_overridden("configure_model", model):
            model.configure_model()

    def _teardown(self, stage: str) -> None:
        if self.datamodule is not None:
            self.datamodule.teardown(stage=stage)
        call(self, "teardown", stage, only="callbacks")
        self.lightning_module.teardown(stage=stage)

    def _loader(self, kind: str, given: Any) -> Any:
        """The loader given to the call, else the datamodule's, else the module's; None if nobody has one."""
        if given is not None:
            return given
        hook = f"{kind}_dataloader"
        for owner in (self.datamodule, self.lightning_module):
            if is_overridden(hook, owner):
                return getattr(owner, hook)()
        return None

    def _has_loader(self, kind: str, given: Any) -> bool:
        hook = f"{kind}_dataloader"
        return given is not None or any(is_overridden(hook, owner) for owner in (self.datamodule, self._module))

    def _fit(
        self, model: LightningModule, train: Any, val: Any, datamodule: Any, ckpt_path: str | os.PathLike[str] | None
    ) -> None:
        self._attach(model, datamodule)
        self._check_fit(model, train)
        self.fit_loop = self._evaluation = None
        self.enable_validation = (
            bool(self.limit_val_batches) and is_overridden("validation_step", model) and self._has_loader("val", val)
        )
        resolved = resolve(self, ckpt_path, for_fit=True)
        self._continue_in(resolved, auto=ckpt_path == "auto")
        self._setup("fit")
        source = "" if resolved is None else os.path.basename(resolved.path)
        if resolved is not None:
            state.restore_model(self, resolved.payload, source)
        model.to(self.strategy.root_device)
        run = None if resolved is None else resolved.payload["holdfast"]
        self.fit_loop = FitLoop(self, lambda: self._train_loader(train), lambda: self._loader("val", val), run)
        self._configure_optimizers(model)
        if resolved is not None:
            state.restore_training(self, resolved.payload, source)
            state.describe_resume(self, resolved.payload, resolved.path, resolved.skipped)
            # What was read is in place now; the optimizers' copy is not kept a second time.
            resolved.payload.clear()
        self._send_hyperparameters()
        with self._autograd():
            call(self, "on_fit_start")
            self.fit_loop.sanity_check()
            self.fit_loop.run()
            call(self, "on_fit_end")
        self.engine.wait()
        for logger in self.loggers:
            logger.finalize("success")
        self._teardown("fit")

    def _autograd(self) -> AbstractContextManager[Any]:
        return torch.autograd.set_detect_anomaly(True) if self.detect_anomaly else nullcontext()

    def _check_fit(self, model: LightningModule, train: Any) -> None:
        name = type(model).__name__
        for hook, what in (("training_step", "computes the loss"), ("configure_optimizers", "returns the optimizer")):
            if not is_overridden(hook, model):
                raise ConfigError(f"{name} has no {hook}. trainer.fit needs it: define {hook}, which {what}.")
        if not self._has_loader("train", train):
            raise ConfigError(
                f"There is no training data: give trainer.fit(model, train_dataloaders=...), a datamodule, or define "
                f"{name}.train_dataloader."
            )
        if not model.automatic_optimization and (self.gradient_clip_val or self.accumulate_grad_batches != 1):
            raise ConfigError(
                "Trainer(gradient_clip_val=, accumulate_grad_batches=) have no effect with manual optimization. "
                "Leave them out; clip with self.clip_gradients and accumulate in training_step."
            )

    def _train_loader(self, given: Any) -> Any:
        loader = self._loader("train", given)
        if isinstance(loader, dict) or (isinstance(loader, (list, tuple)) and _all_loaders(loader)):
            raise ConfigError("Several training loaders at once are not supported yet. Combine them in one dataset.")
        if loader is None or not isinstance(loader, Iterable):
            raise ConfigError(f"train_dataloader: expected a loader that can be iterated, found {type(loader).__name__}.")
        return loader

    def _continue_in(self, resolved: Resolved | None, *, auto: bool) -> None:
        """Point loggers at the version that the checkpoint came from, before anything is written."""
        self.resumed_from = self.ckpt_path = None
        self.continues_version = False
        if resolved is None:
            return
        self.resumed_from = self.ckpt_path = os.path.abspath(resolved.path)
        if not auto:
            return
        saved_states = resolved.payload["holdfast"].get("loggers", [])
        for logger, saved in zip(self.loggers, saved_states, strict=False):
            version = saved["state"].get("version") if resolved.version is None else resolved.version
            if version is not None:
                logger.resume_in(version)
                self.continues_version = True

    def _configure_optimizers(self, model: LightningModule) -> None:
        self.optimizers, self.lr_scheduler_configs = read_configuration(
            model.configure_optimizers(), automatic=model.automatic_optimization
        )
        self.wrapped_optimizers = [LightningOptimizer(optimizer, self) for optimizer in self.optimizers]

    @property
    def optimization(self) -> Any:
        """The running fit's optimization, automatic or manual."""
        if self.fit_loop is None:
            raise RuntimeError("Optimizers step during fit only.")
        return self.fit_loop.optimization

    def _send_hyperparameters(self) -> None:
        if not self.loggers or not self._log_hyperparameters:
            return
        values: dict[str, Any] = {}
        for owner in (self.datamodule, self._module):
            if isinstance(owner, HyperparametersMixin) and owner._log_hyperparams:
                values.update(owner.hparams_initial)
        for logger in self.loggers:
            if values:
                logger.log_hyperparams(values)
            logger.save()

    def _evaluate(
        self,
        fn: TrainerFn,
        model: LightningModule | None,
        dataloaders: Any,
        datamodule: Any,
        ckpt_path: str | os.PathLike[str] | None,
        verbose: bool,
        keep_outputs: bool = False,
    ) -> Any:
        stage, kind, step = _STAGES[fn]
        if isinstance(dataloaders, LightningDataModule):
            datamodule, dataloaders = dataloaders, None
        if model is None:
            if self._module is None:
                raise ConfigError(f"trainer.{fn}() without a model works after fit only. Give it one.")
            model = self._module
            datamodule = self.datamodule if datamodule is None and dataloaders is None else datamodule
            if ckpt_path is None and getattr(self.checkpoint_callback, "best_model_path", ""):
                ckpt_path = "best"
        self._attach(model, datamodule)
        if not is_overridden(step, model) and not (fn is TrainerFn.PREDICTING and is_overridden("forward", model)):
            raise ConfigError(f"{type(model).__name__} has no {step}. trainer.{fn} needs it.")
        if not self._has_loader(kind, dataloaders):
            raise ConfigError(
                f"There is no data for trainer.{fn}: give dataloaders=, a datamodule, or define "
                f"{type(model).__name__}.{kind}_dataloader."
            )
        resolved = resolve(self, ckpt_path, for_fit=False)
        self.ckpt_path = None if resolved is None else os.path.abspath(resolved.path)
        self._setup(str(fn))
        if resolved is not None:
            state.restore_model(self, resolved.payload, os.path.basename(resolved.path))
            rank_zero_info(f"weights from {os.path.relpath(resolved.path)}")
        model.to(self.strategy.root_device)
        limits = {"val": self.limit_val_batches, "test": self.limit_test_batches, "predict": self.limit_predict_batches}
        self._send_hyperparameters()
        self.state.stage = stage
        loop = EvaluationLoop(self, stage, self._loader(kind, dataloaders), (limits[kind], f"limit_{kind}_batches"))
        self._evaluation = loop
        results = loop.run(0, keep_outputs=keep_outputs)
        for logger in self.loggers:
            logger.save()
        self._teardown(str(fn))
        if fn is TrainerFn.PREDICTING:
            self.predictions = results if not keep_outputs or len(results) != 1 else results[0]
            return self.predictions if keep_outputs else None
        if verbose and self.is_global_zero:
            from holdfast.training.results_table import show

            show(str(fn), results)
        return results


def _all_loaders(loaders: Iterable[Any]) -> bool:
    return all(isinstance(loader, torch.utils.data.DataLoader) for loader in loaders)
