"""The step of an optimizer, automatic or manual, and its gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from holdfast.errors import ConfigError
from holdfast.training.hooks import bind, is_overridden
from holdfast.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


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
        # Nobody looks between the forward pass and the optimizer's step, so nothing has to be shown there.
        self.plain = (
            self.optimizer is not None
            and self.scaler is None
            and self.context is None
            and self.plain_step
            and self.plain_zero_grad
            and self.plain_backward
            and self.single_evaluation
            and not self.clips
            and not (self.before_zero_grad or self.before_backward or self.after_backward or self.before_step)
        )
        self.has_listeners = bool(bind(trainer, "on_train_batch_end"))
        self.progress = trainer.progress
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
        optimizer = self.optimizer
        if self.plain and divide_by == 1 and optimizer is not None:
            return self._run_plain(optimizer, batch, batch_idx)
        self._batch, self._batch_idx, self._zero, self._step = batch, batch_idx, zero, step
        self.accumulate = divide_by
        if optimizer is None or not step:
            self._closure()
        elif self.plain_step and self.scaler is None:
            if self.single_evaluation:
                self._closure()
                optimizer.step()
            else:
                optimizer.step(self.closure)
            self.progress.global_step += 1
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
            self.progress.global_step += 1
        outputs, self._outputs, self._batch = self._outputs, None, None
        return outputs

    def _run_plain(self, optimizer: Optimizer, batch: Any, batch_idx: int) -> Any:
        """The step without hooks, scaling or accumulation, in as few calls as there can be."""
        self.results.fx = "training_step"
        output = self.training_step(batch, batch_idx) if self.takes_index else self.training_step(batch)
        loss = output if isinstance(output, Tensor) else self._loss_of(output)
        optimizer.zero_grad()
        if loss is not None:
            loss.backward()
        if self.engine.copying:
            self.engine.wait_for_copy()
        optimizer.step()
        self.progress.global_step += 1
        return self._outputs_of(output, loss) if self.has_listeners else None

    def _loss_of(self, output: Any) -> Tensor | None:
        """The loss in what ``training_step`` returned; None, said once, if it returned that."""
        if output is None:
            message = "training_step returned None. If that was on purpose, ignore this."
            warn_once("training_step None", message)
            return None
        try:
            loss: Tensor = output if isinstance(output, Tensor) else output["loss"]
        except (TypeError, KeyError, IndexError):
            raise ConfigError(
                f"{type(self.module).__name__}.training_step must return the loss as a tensor, a dict with "
                f'the key "loss", or None, found {type(output).__name__}.'
            ) from None
        return loss

    @staticmethod
    def _outputs_of(output: Any, loss: Tensor | None) -> dict[str, Any]:
        """What ``on_train_batch_end`` gets: nothing in it holds on to the graph."""
        if loss is None:
            return {}
        if isinstance(output, Tensor):
            return {"loss": loss.detach()}
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}

    def _closure(self) -> Any:
        self._ran = True
        output = self.forward(self._batch, self._batch_idx)
        loss = self._loss_of(output)
        if self.has_listeners:
            self._outputs = self._outputs_of(output, loss)
        if self._zero and self.optimizer is not None:
            self._zero_grad(self.optimizer)
        if loss is not None:
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
