"""The step, automatic or manual: forward, backward and the optimizer, with the hooks in between."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from holdfast.errors import ConfigError
from holdfast.strategies.base import Strategy
from holdfast.training.hooks import bind, bind_step, profiled
from holdfast.training.optimizer import LightningOptimizer
from holdfast.training.precision import MixedPrecision
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class Optimization:
    """What automatic and manual optimization share; made once when a fit starts.

    All that a module, a strategy, a precision or a profiler adds to the step is looked up here, so that a
    step that nobody adds anything to runs nothing else.
    """

    backward: Callable[..., Any]
    """Backward with its hooks: `run_backward`, or the strategy's, which leads there."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.engine = trainer.engine
        self.precision = trainer.precision_plugin
        self.scaler = self.precision.scaler
        self.training_step, self.context = bind_step(trainer, "training_step")
        parameters = inspect.signature(self.module.training_step).parameters
        self.takes_index = "batch_idx" in parameters or len(parameters) > 1
        self.before_backward = bind(trainer, "on_before_backward")
        self.after_backward = bind(trainer, "on_after_backward")
        self.before_step = bind(trainer, "on_before_optimizer_step")
        self.plain_backward = not is_overridden("backward", self.module)
        self.results = trainer.metrics.train
        strategy = trainer.strategy
        name = f"[Strategy]{type(strategy).__name__}"
        self.backward = run = profiled(trainer, f"{name}.backward", self.run_backward)
        self.adds_to_backward = run != self.run_backward
        if is_overridden("backward", strategy):
            of_strategy = profiled(trainer, f"{name}.backward", strategy.backward)
            self.backward = lambda loss, *args, **kwargs: of_strategy(loss, self._stepping(), *args, **kwargs)
            self.adds_to_backward = True
        self.strategy_step = strategy.optimizer_step if is_overridden("optimizer_step", strategy) else None
        self.adds_to_step = self.strategy_step is not None or is_overridden("optimizer_step", self.precision)

    def _stepping(self) -> Optimizer | None:
        """The optimizer that a backward is for, as far as that is known."""
        return None

    def forward(self, batch: Any, batch_idx: int) -> Any:
        """``training_step`` under the precision's context."""
        self.results.fx = "training_step"
        if self.context is None:
            return self.training_step(batch, batch_idx) if self.takes_index else self.training_step(batch)
        with self.context:
            return self.training_step(batch, batch_idx) if self.takes_index else self.training_step(batch)

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
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
            try:
                loss.backward(*args, **kwargs)
            except RuntimeError as error:
                self.explain(loss, error)
                raise
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

    def explain(self, loss: Tensor, error: RuntimeError) -> None:
        """Raise an error that says more than torch's, where this is the loss's own fault.

        Raises:
            RuntimeError: nothing that needs a gradient had a part in the loss.
        """
        if not loss.requires_grad:
            raise RuntimeError(
                f"The loss of {type(self.module).__name__}.training_step does not require grad and does not "
                f"have a grad_fn: no parameter that is trained had a part in it. Was it detached, computed "
                f"under no_grad, or is everything frozen?"
            ) from error

    def prepare_step(self, optimizer: Optimizer) -> None:
        """The hooks between backward and the optimizer's step."""
        if self.before_step:
            before, self.results.fx = self.results.fx, "on_before_optimizer_step"
            for hook in self.before_step:
                hook(optimizer)
            self.results.fx = before

    def step_through(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Step an optimizer the way the strategy or the precision does it."""
        if self.strategy_step is not None:
            return self.strategy_step(optimizer, closure, self.module, **kwargs)
        return self.precision.optimizer_step(optimizer, self.module, closure, **kwargs)

    def clip_gradients(
        self,
        optimizer: Optimizer | LightningOptimizer,
        value: float | None = None,
        algorithm: str | None = None,
    ) -> None:
        """Clip an optimizer's gradients; what is None is the trainer's. See `LightningModule.clip_gradients`.

        Raises:
            ConfigError: the trainer was given something else, or the algorithm is none.
        """
        given = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        for name, here, there in zip(
            ("gradient_clip_val", "gradient_clip_algorithm"), (value, algorithm), given, strict=True
        ):
            if here is not None and there is not None and here != there:
                raise ConfigError(
                    f"Trainer({name}={_plain(there)!r}) and clip_gradients({name}={_plain(here)!r}) "
                    "contradict each other. Leave one of them out."
                )
        if isinstance(optimizer, LightningOptimizer):
            # The scaler knows the one inside.
            optimizer = optimizer.optimizer
        value = given[0] if value is None else value
        algorithm = given[1] if algorithm is None else algorithm
        self.precision.clip_gradients(optimizer, value, "norm" if algorithm is None else algorithm)


def _plain(value: Any) -> Any:
    return str(value.value) if hasattr(value, "value") else value


class AutomaticOptimization(Optimization):
    """The whole step, as `Trainer` does it for modules with ``automatic_optimization = True``."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.optimizer = trainer.optimizers[0] if trainer.optimizers else None
        self.before_zero_grad = bind(trainer, "on_before_zero_grad")
        self._look_up_overrides(trainer)
        # torch's own optimizers, but for LBFGS, call a closure once and before anything else, so it can be
        # called outside as well. Handed over, it would run behind the optimizer's pre-step hooks.
        self.single_evaluation = type(self.optimizer).__module__.startswith(
            "torch.optim."
        ) and not isinstance(self.optimizer, LBFGS)
        self.accumulate = trainer.accumulate_grad_batches
        # Nobody looks between the forward pass and the optimizer's step, so nothing has to be shown there.
        self.plain = (
            self.optimizer is not None
            and self.scaler is None
            and self.context is None
            and self.plain_step
            and self.plain_zero_grad
            and self.plain_backward
            and not self.adds_to_backward
            and self.single_evaluation
            and not self.clips
            and not (self.before_zero_grad or self.before_backward or self.after_backward or self.before_step)
        )
        self.has_listeners = bool(bind(trainer, "on_train_batch_end"))
        self.progress = trainer.progress
        # One closure for the whole fit; what changes from batch to batch is set on this object.
        self.closure: Callable[[], Any] = self._closure
        # And one where no step follows: processes need not agree on these gradients yet.
        self.add_up = self.closure
        self.joins: Callable[[], Any] | None = None
        if trainer.world_size > 1:
            self.add_up = self._closure_apart
            self.joins = partial(trainer.strategy.join_without_loss, counts=self.single_evaluation)
            if not self.single_evaluation:
                self.closure = self._closure_of_all
        self._batch: Any = None
        self._batch_idx = 0
        self._zero = False
        self._ran = False
        self._outputs: Any = None

    def _look_up_overrides(self, trainer: Trainer) -> None:
        """The module's methods that a step calls, and which of them the trainer can do without."""
        module = self.module
        name = f"[LightningModule]{type(module).__name__}"
        self.module_zero_grad = profiled(trainer, f"{name}.optimizer_zero_grad", module.optimizer_zero_grad)
        self.module_step = profiled(trainer, f"{name}.optimizer_step", module.optimizer_step)
        self.module_clipping = profiled(
            trainer, f"{name}.configure_gradient_clipping", module.configure_gradient_clipping
        )
        watched = self.module_step != module.optimizer_step
        self.plain_zero_grad = not watched and not is_overridden("optimizer_zero_grad", module)
        self.plain_step = not (watched or self.adds_to_step) and not is_overridden("optimizer_step", module)
        self.clips = is_overridden("configure_gradient_clipping", module) or bool(trainer.gradient_clip_val)

    def _stepping(self) -> Optimizer | None:
        return self.optimizer

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
        self._batch, self._batch_idx, self._zero = batch, batch_idx, zero
        self.accumulate = divide_by
        if optimizer is None or not step:
            self.add_up()
            if optimizer is None and step:
                # It trains nothing, but max_steps has to end the run all the same.
                self.progress.global_step += 1
        elif self.plain_step and self.scaler is None:
            if self.single_evaluation:
                self._closure()
                self.prepare_step(optimizer)
                optimizer.step()
            else:
                self.precision.optimizer_step(optimizer, self.module, self.closure)
            self.progress.global_step += 1
        else:
            self._ran = False
            self.results.fx = "optimizer_step"
            wrapped = self.trainer.wrapped_optimizers[0]
            self.module_step(self.trainer.current_epoch, batch_idx, wrapped, self.closure)
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
            try:
                loss.backward()
            except RuntimeError as error:
                self.explain(loss, error)
                raise
        elif self.joins is not None:
            self.joins()
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
            loss: Any = output if isinstance(output, Tensor) else output["loss"]
        except (TypeError, KeyError, IndexError):
            loss = None
        if not isinstance(loss, Tensor):
            found = type(output).__name__
            if isinstance(output, dict):
                found = (
                    f'a dict with "loss": {type(loss).__name__}' if "loss" in output else "a dict without it"
                )
            raise ConfigError(
                f"{type(self.module).__name__}.training_step must return the loss as a tensor, a dict with "
                f'the key "loss", or None, found {found}.'
            )
        return loss

    @staticmethod
    def _outputs_of(output: Any, loss: Tensor | None) -> dict[str, Any]:
        """What ``on_train_batch_end`` gets: nothing in it holds on to the graph."""
        if loss is None:
            return {}
        if isinstance(output, Tensor):
            return {"loss": loss.detach()}
        return _detached(output)

    def _closure(self) -> Any:
        self._ran = True
        output = self.forward(self._batch, self._batch_idx)
        loss = self._loss_of(output)
        if loss is not None and self.accumulate != 1:
            loss = loss / self.accumulate
        if self.has_listeners:
            self._outputs = self._outputs_of(output, loss)
            if loss is not None and self.accumulate != 1:
                # As documented by Lightning: hooks get the batch's share of its window.
                self._outputs["loss"] = loss.detach()
        if self._zero and self.optimizer is not None:
            self._zero_grad(self.optimizer)
        if loss is not None:
            self.backward(loss)
        else:
            loss = None if self.joins is None else self.joins()
            if loss is not None and self.scaler is not None:
                self.scaler.scale(loss)
            if self.engine.copying:
                # Its hooks come before the step all the same.
                self.engine.wait_for_copy()
        return loss

    def _closure_apart(self) -> None:
        with self.trainer.strategy.block_backward_sync():
            self._closure()

    def _closure_of_all(self) -> Any:
        """Likewise, for an optimizer that goes by the loss: every process's must go by the same one."""
        loss = self._closure()
        return None if loss is None else self.trainer.strategy.reduce(loss, reduce_op="mean")

    def _zero_grad(self, optimizer: Optimizer) -> None:
        if self.before_zero_grad:
            self.results.fx = "on_before_zero_grad"
            for hook in self.before_zero_grad:
                hook(optimizer)
        if self.plain_zero_grad:
            optimizer.zero_grad()
        else:
            self.results.fx = "optimizer_zero_grad"
            self.module_zero_grad(self.trainer.current_epoch, self._batch_idx, optimizer)

    def prepare_step(self, optimizer: Optimizer) -> None:
        """The hooks between backward and the optimizer's step, and clipping."""
        super().prepare_step(optimizer)
        if self.clips:
            self.results.fx = "configure_gradient_clipping"
            self.module_clipping(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )

    def step_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Step as ``LightningModule.optimizer_step`` asks for; the run counts it."""
        return self.step_through(optimizer, closure, **kwargs)


class ManualOptimization(Optimization):
    """Runs ``training_step`` and leaves the rest to it; steps are counted by the wrapped optimizers."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        strategy = trainer.strategy
        if type(strategy).prepare_backward is not Strategy.prepare_backward:
            run = self.backward

            def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                strategy.prepare_backward(loss)
                run(loss, *args, **kwargs)

            self.backward = backward
            self.step_optimizer = self._step_averaged  # type: ignore[method-assign]

    def run(self, batch: Any, batch_idx: int, *, zero: bool, step: bool, divide_by: int) -> Any:
        """Train on one batch, like `AutomaticOptimization.run`; there are no windows here.

        Raises:
            ConfigError: ``training_step`` returned something that is no output.
        """
        if self.engine.copying:
            self.engine.wait_for_copy()
        output = self.forward(batch, batch_idx)
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if output is None:
            return {}
        if not isinstance(output, dict):
            raise ConfigError(
                f"{type(self.module).__name__}.training_step with manual optimization must return a tensor, "
                f"a dict or None, found {type(output).__name__}."
            )
        return _detached(output)

    def step_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Step one optimizer and count it."""
        # A step computes in full precision, whatever the forward pass around it does; a closure is forward.
        autocasts = isinstance(self.precision, MixedPrecision) and closure is None
        outside: AbstractContextManager[Any] = (
            torch.autocast(self.trainer.strategy.root_device.type, enabled=False)
            if autocasts
            else nullcontext()
        )
        with outside:
            result = self.step_through(optimizer, closure, **kwargs)
        self.trainer.progress.global_step += 1
        return result

    def _step_averaged(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Likewise, where gradients have to be averaged first; says so if they never were."""
        if closure is None and not getattr(self.trainer.strategy, "prepared_backward", True):
            warn_once(
                "manual backward",
                f"{type(self.module).__name__} steps an optimizer before any self.manual_backward(loss). "
                "That is where processes average their gradients; loss.backward() leaves each with its own.",
            )
        return type(self).step_optimizer(self, optimizer, closure, **kwargs)


def _detached(output: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}


def make_optimization(trainer: Trainer) -> AutomaticOptimization | ManualOptimization:
    """The kind of optimization that the module asks for."""
    made = (AutomaticOptimization if trainer.lightning_module.automatic_optimization else ManualOptimization)(
        trainer
    )
    run = profiled(trainer, "run_training_batch", made.run)
    if run != made.run:
        made.run = run  # type: ignore[method-assign]
    return made
