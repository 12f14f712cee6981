"""Optimizers and schedulers: reading what the user configured, and the step itself, automatic or manual."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from holdfast.errors import ConfigError
from holdfast.training.hooks import bind, is_overridden
from holdfast.utilities.rank_zero import rank_zero_warn, warn_once

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


@dataclass
class LRSchedulerConfig:
    """A scheduler and when it steps."""

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


def read_configuration(
    configured: Any, *, automatic: bool
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Turn what ``configure_optimizers`` returned, in any documented form, into optimizers and schedulers.

    Raises:
        ConfigError: it has none of these forms, or automatic optimization got several optimizers.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[Any] = []
    plateau_monitor: Any = None
    if configured is None:
        rank_zero_warn("configure_optimizers returned None: this run will train nothing.")
    elif isinstance(configured, Optimizer):
        optimizers = [configured]
    elif isinstance(configured, dict):
        optimizers, schedulers = _read_dicts([configured])
        plateau_monitor = configured.get("monitor")
    elif (
        isinstance(configured, (list, tuple))
        and len(configured) == 2
        and all(isinstance(part, (list, tuple)) for part in configured)
    ):
        optimizers, schedulers = list(configured[0]), list(configured[1])
    elif (
        isinstance(configured, (list, tuple)) and configured and all(isinstance(c, dict) for c in configured)
    ):
        optimizers, schedulers = _read_dicts(configured)
    elif isinstance(configured, (list, tuple)):
        optimizers = list(configured)
    else:
        optimizers = [configured]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                "configure_optimizers must return an optimizer, a list of them, two lists (optimizers and "
                'schedulers), a dict {"optimizer": ..., "lr_scheduler": ...} or a list of such dicts, '
                f"found {type(optimizer).__name__} where an optimizer belongs."
            )
    if automatic and len(optimizers) > 1:
        raise ConfigError(
            f"configure_optimizers returned {len(optimizers)} optimizers. With more than one, set "
            "self.automatic_optimization = False in __init__ and step them in training_step."
        )
    return optimizers, [_read_scheduler(scheduler, automatic, plateau_monitor) for scheduler in schedulers]


def _read_dicts(configured: Sequence[dict[str, Any]]) -> tuple[list[Optimizer], list[Any]]:
    unknown = {key for entry in configured for key in entry} - {
        "optimizer",
        "lr_scheduler",
        "monitor",
        "frequency",
    }
    if unknown:
        rank_zero_warn(f"configure_optimizers: the keys {sorted(unknown)} have no meaning and are ignored.")
    if any("optimizer" not in entry for entry in configured):
        raise ConfigError('configure_optimizers returned a dict without the key "optimizer".')
    return [e["optimizer"] for e in configured], [
        e["lr_scheduler"] for e in configured if e.get("lr_scheduler")
    ]


def _read_scheduler(given: Any, automatic: bool, monitor: str | None) -> LRSchedulerConfig:
    if isinstance(given, LRSchedulerConfig):
        return given
    if not isinstance(given, dict):
        given = {"scheduler": given, "monitor": monitor}
    fields = LRSchedulerConfig.__dataclass_fields__
    unknown = sorted(set(given) - set(fields))
    if unknown:
        rank_zero_warn(f"A scheduler's configuration has keys without a meaning, ignored: {unknown}.")
    if "scheduler" not in given:
        raise ConfigError('A scheduler\'s configuration has no key "scheduler".')
    config = LRSchedulerConfig(**{key: value for key, value in given.items() if key in fields})
    config.reduce_on_plateau = config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)
    if config.interval not in ("step", "epoch"):
        raise ConfigError(f'A scheduler\'s "interval" must be "step" or "epoch", found {config.interval!r}.')
    if automatic and config.reduce_on_plateau and config.monitor is None:
        raise ConfigError(
            'ReduceLROnPlateau needs the name of the value that it watches: return {"optimizer": ..., '
            '"lr_scheduler": {"scheduler": ..., "monitor": "val_loss"}} from configure_optimizers.'
        )
    return config


def clip_gradients(optimizer: Any, value: float | None, algorithm: str | None) -> None:
    """Clip the gradients of an optimizer's parameters; see `LightningModule.clip_gradients`."""
    if not value:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if algorithm in (None, "norm"):
        torch.nn.utils.clip_grad_norm_(parameters, value)
    elif algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, value)
    else:
        raise ConfigError(f"gradient_clip_algorithm must be 'norm' or 'value', found {algorithm!r}.")


def step_schedulers(trainer: Trainer, interval: str, *, plateau: bool) -> None:
    """Step the schedulers of this interval that are due; plateau ones are stepped apart, with their metric.

    Raises:
        ConfigError: a plateau scheduler's monitored value was not logged.
    """
    index = trainer.batch_idx if interval == "step" else trainer.current_epoch
    for config in trainer.lr_scheduler_configs:
        if (
            config.interval != interval
            or config.reduce_on_plateau is not plateau
            or (index + 1) % config.frequency
        ):
            continue
        metric = None
        if config.reduce_on_plateau:
            available = trainer.callback_metrics
            metric = available.get(config.monitor or "")
            if metric is None:
                message = (
                    f"ReduceLROnPlateau watches {config.monitor!r}, which was not logged. "
                    f"Logged so far: {sorted(available)}."
                )
                if config.strict:
                    raise ConfigError(
                        message + ' Log it, or set "strict": False in the scheduler\'s configuration.'
                    )
                warn_once(("plateau", config.monitor), message)
                continue
        trainer.lightning_module.lr_scheduler_step(config.scheduler, metric)


class LightningOptimizer:
    """An optimizer whose ``step`` counts towards ``trainer.global_step`` and follows the precision.

    Everything else is the wrapped optimizer's.
    """

    def __init__(self, optimizer: Optimizer, trainer: Trainer) -> None:
        self._optimizer = optimizer
        self._trainer = trainer

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer: gradients unscaled, hooks called, the step counted."""
        return self._trainer.optimization.step_optimizer(self._optimizer, closure, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad(*args, **kwargs)

    def toggle_model(self, sync_grad: bool = True) -> Any:
        """A context in which only this optimizer's parameters require gradients."""
        return self._trainer.lightning_module.toggled_optimizer(self._optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)


class Optimization:
    """What automatic and manual optimization share; made once when a fit starts."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.engine = trainer.engine
        self.context = trainer.precision_plugin.context
        self.scaler = trainer.precision_plugin.scaler
        self.before_backward = bind(trainer, "on_before_backward")
        self.after_backward = bind(trainer, "on_after_backward")
        self.before_step = bind(trainer, "on_before_optimizer_step")
        self.plain_backward = not is_overridden("backward", self.module)
        self.training_step = self.module.training_step
        parameters = inspect.signature(self.training_step).parameters
        self.takes_index = "batch_idx" in parameters or len(parameters) > 1
        self.results = trainer.metrics.train

    def forward(self, batch: Any, batch_idx: int) -> Any:
        """``training_step`` under the precision's context."""
        self.results.fx = "training_step"
        if self.context is None:
            return self.training_step(batch, batch_idx) if self.takes_index else self.training_step(batch)
        with self.context:
            return self.training_step(batch, batch_idx) if self.takes_index else self.training_step(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward with its hooks. What copies weights in the background is awaited here, before anybody's
        hook can change them: it has had the whole forward and backward to overlap with.
        """
        results = self.results
        before = results.fx
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self.before_backward:
            results.fx = "on_before_backward"
            for hook in self.before_backward:
                hook(loss)
        if self.plain_backward:
            loss.backward(*args, **kwargs)
        else:
            results.fx = "backward"
            self.module.backward(loss, *args, **kwargs)
        if self.engine.copying:
            self.engine.wait_for_copy()
        if self.after_backward:
            results.fx = "on_after_backward"
            for hook in self.after_backward:
                hook()
        results.fx = before

    def prepare_step(self, optimizer: Optimizer) -> None:
        """The hooks between backward and the optimizer's step."""
        if self.before_step:
            before, self.results.fx = self.results.fx, "on_before_optimizer_step"
            for hook in self.before_step:
                hook(optimizer)
            self.results.fx = before


class AutomaticOptimization(Optimization):
    """The whole step, as `Trainer` does it for modules with ``automatic_optimization = True``."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.optimizer = trainer.optimizers[0] if trainer.optimizers else None
        self.before_zero_grad = bind(trainer, "on_before_zero_grad")
        self.plain_zero_grad = not is_overridden("optimizer_zero_grad", self.module)
        self.plain_step = not is_overridden("optimizer_step", self.module)
        # torch's own optimizers, but for LBFGS, call a closure once and before anything else, so it can be
        # called outside as well. Handed over, it would run behind the optimizer's pre-step hooks.
        self.single_evaluation = type(self.optimizer).__module__.startswith(
            "torch.optim."
        ) and not isinstance(self.optimizer, torch.optim.LBFGS)
        self.clips = is_overridden("configure_gradient_clipping", self.module) or bool(
            trainer.gradient_clip_val
        )
        self.accumulate = trainer.accumulate_grad_batches
        # One closure for the whole fit; what changes from batch to batch is set on this object.
        self.closure: Callable[[], Any] = self._closure
        self._batch: Any = None
        self._batch_idx = 0
        self._zero = self._step = False
        self._ran = False
        self._outputs: Any = None

    def run(self, batch: Any, batch_idx: int, *, zero: bool, step: bool, divide_by: int) -> Any:
        """Train on one batch; returns what ``on_train_batch_end`` gets as outputs.

        Args:
            batch: The batch, on the device.
            batch_idx: Its index in the epoch.
            zero: The batch begins an accumulation window.
            step: The batch ends one.
            divide_by: Batches in a full window: the loss is divided by it.
        """
        self._batch, self._batch_idx, self._zero, self._step = batch, batch_idx, zero, step
        self.accumulate = divide_by
        optimizer = self.optimizer
        if optimizer is None or not step:
            self._closure()
        elif self.plain_step and self.scaler is None:
            if self.single_evaluation:
                self._closure()
                optimizer.step()
            else:
                optimizer.step(self.closure)
            self.trainer.progress.global_step += 1
        else:
            self._ran = False
            self.results.fx = "optimizer_step"
            wrapped = self.trainer.wrapped_optimizers[0]
            self.module.optimizer_step(self.trainer.current_epoch, batch_idx, wrapped, self.closure)
            if not self._ran:
                raise ConfigError(
                    f"{type(self.module).__name__}.optimizer_step did not run optimizer_closure, so "
                    f"nothing was trained. Pass it on: optimizer.step(closure=optimizer_closure)."
                )
            self.trainer.progress.global_step += 1
        outputs, self._outputs, self._batch = self._outputs, None, None
        return outputs

    def _closure(self) -> Any:
        self._ran = True
        output = self.forward(self._batch, self._batch_idx)
        if isinstance(output, Tensor) or output is None:
            loss = output
            self._outputs = {} if loss is None else {"loss": loss.detach()}
        else:
            try:
                loss = output["loss"]
            except (TypeError, KeyError, IndexError):
                raise ConfigError(
                    f"{type(self.module).__name__}.training_step must return the loss as a tensor, a dict "
                    f"with the "
                    f'key "loss", or None, found {type(output).__name__}.'
                ) from None
            self._outputs = {**output, "loss": loss.detach()}
        if self._zero and self.optimizer is not None:
            self._zero_grad(self.optimizer)
        if loss is None:
            warn_once(
                "training_step None", "training_step returned None. If that was on purpose, ignore this."
            )
        else:
            self.backward(loss if self.accumulate == 1 else loss / self.accumulate)
        if (
            self._step
            and self.scaler is None
            and self.optimizer is not None
            and (self.before_step or self.clips)
        ):
            self._prepare(self.optimizer)
        return loss

    def _zero_grad(self, optimizer: Optimizer) -> None:
        if self.before_zero_grad:
            self.results.fx = "on_before_zero_grad"
            for hook in self.before_zero_grad:
                hook(optimizer)
        if self.plain_zero_grad:
            optimizer.zero_grad()
        else:
            self.results.fx = "optimizer_zero_grad"
            self.module.optimizer_zero_grad(self.trainer.current_epoch, self._batch_idx, optimizer)

    def _prepare(self, optimizer: Optimizer) -> None:
        self.prepare_step(optimizer)
        if self.clips:
            self.results.fx = "configure_gradient_clipping"
            self.module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )

    def step_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Step; with a scaler the closure runs first and the gradients are unscaled."""
        if self.scaler is None:
            return optimizer.step(self.closure if closure is None else closure, **kwargs)
        loss = (self.closure if closure is None else closure)()
        if loss is None:
            return None
        self.scaler.unscale_(optimizer)
        self._prepare(optimizer)
        result = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return result


class ManualOptimization(Optimization):
    """Runs ``training_step`` and leaves the rest to it; steps are counted by the wrapped optimizers."""

    def run(self, batch: Any, batch_idx: int, *, zero: bool, step: bool, divide_by: int) -> Any:
        """Train on one batch, like `AutomaticOptimization.run`; there are no windows here."""
        if self.engine.copying:
            self.engine.wait_for_copy()
        output = self.forward(batch, batch_idx)
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        return {} if output is None else output

    def step_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Step one optimizer and count it."""
        # Steps called from training_step compute in full precision, whatever the forward around them does.
        outside = (
            nullcontext() if self.context is None else torch.autocast(self.context.device, enabled=False)
        )
        with outside:
            if self.scaler is None:
                self.prepare_step(optimizer)
                result = optimizer.step(**kwargs) if closure is None else optimizer.step(closure, **kwargs)
            else:
                if closure is not None:
                    closure()
                self.prepare_step(optimizer)
                result = self.scaler.step(optimizer, **kwargs)
                self.scaler.update()
        self.trainer.progress.global_step += 1
        return result


def make_optimization(trainer: Trainer) -> AutomaticOptimization | ManualOptimization:
    """The kind of optimization that the module asks for."""
    return (AutomaticOptimization if trainer.lightning_module.automatic_optimization else ManualOptimization)(
        trainer
    )
