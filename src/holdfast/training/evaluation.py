"""Validation, test and prediction: one loop, which leaves the training it interrupts as it found it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.training.data import BatchStream, flatten_loaders
from holdfast.training.hooks import bind, call
from holdfast.training.progress import RunningStage
from holdfast.training.results import Entry, Results
from holdfast.training.transfer import make_transfer

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

# Stage -> (prefix of the hooks, name of the step)
_NAMES = {
    RunningStage.SANITY_CHECKING: ("validation", "validation_step"),
    RunningStage.VALIDATING: ("validation", "validation_step"),
    RunningStage.TESTING: ("test", "test_step"),
    RunningStage.PREDICTING: ("predict", "predict_step"),
}


def count_batches(length: int | None, limit: int | float, argument: str) -> int | float:
    """Batches that a loader of ``length`` gives under a limit; infinite where the loader cannot tell.

    Raises:
        ConfigError: a fraction is asked of a loader without a length, or leaves no batch at all.
    """
    if limit == 0:
        return 0
    if isinstance(limit, int):
        return limit if length is None else min(limit, length)
    if length is None:
        if limit == 1.0:
            return float("inf")
        raise ConfigError(
            f"Trainer({argument}={limit}): the data has no length to take a fraction of. Give a number."
        )
    count = int(length * limit)
    if count == 0 and length > 0:
        raise ConfigError(
            f"Trainer({argument}={limit}) leaves 0 of {length} batches. "
            f"The least that keeps one is {1 / length:.3g}."
        )
    return count


def arguments_for(step: Callable[..., Any], many_loaders: bool) -> Callable[[Any, int, int], tuple[Any, ...]]:
    """How to call a step that may leave out ``batch_idx`` or ``dataloader_idx``."""
    parameters = inspect.signature(step).parameters
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    count = 3 if variadic else len(parameters)
    if many_loaders and count >= 3:
        return lambda batch, index, loader: (batch, index, loader)
    if count >= 2:
        return lambda batch, index, loader: (batch, index)
    return lambda batch, index, loader: (batch,)


class EvaluationLoop:
    """Runs a stage over all of its loaders.

    Args:
        trainer: The trainer.
        stage: Which stage.
        loaders: One loader or several.
        limit: The trainer's limit for this stage, and the argument's name for messages.
    """

    def __init__(
        self, trainer: Trainer, stage: RunningStage, loaders: Any, limit: tuple[int | float, str]
    ) -> None:
        self.trainer = trainer
        self.stage = stage
        self.prefix, self.step_name = _NAMES[stage]
        self.streams = [
            BatchStream(loader, stage=self.prefix, index=i, seed=trainer.seed, rank=trainer.global_rank)
            for i, loader in enumerate(flatten_loaders(loaders))
        ]
        self._longest = 0
        self.batches = [count_batches(stream.length(), limit[0], limit[1]) for stream in self.streams]

    def run(self, number: int, max_batches: int | float = float("inf"), keep_outputs: bool = False) -> Any:
        """Evaluate once; returns one dict of metrics per loader, or with ``keep_outputs`` the steps' outputs.

        Args:
            number: The number of this run of the stage, part of every batch's seed.
            max_batches: A further limit per loader.
            keep_outputs: Collect what the steps return.
        """
        trainer, module, prefix = self.trainer, self.trainer.lightning_module, self.prefix
        results = Results(training=False)
        previous_stage, previous_results = trainer.state.stage, module._results
        trainer.state.stage = self.stage
        trainer.metrics.evaluation = module._results = results
        modes = trainer.training_modes = {child: child.training for child in module.modules()}
        no_grad = torch.inference_mode if trainer.inference_mode else torch.no_grad
        outputs: list[list[Any]] = []
        self._longest = 0
        logged: dict[str, Tensor] = {}
        try:
            call(trainer, f"on_{prefix}_model_eval", only="module")
            with no_grad():
                call(trainer, f"on_{prefix}_start")
                call(trainer, f"on_{prefix}_epoch_start")
                for index in range(len(self.streams)):
                    outputs.append(self._run_loader(results, index, number, max_batches, keep_outputs))
                results.dataloader_idx = None
                results.batch = None
                results.epoch_ended = True
                call(trainer, f"on_{prefix}_epoch_end")
                if self.stage is RunningStage.SANITY_CHECKING:
                    trainer.metrics.callback.update(results.callback_metrics())
                elif prefix != "predict":
                    logged = trainer.metrics.publish(results)
                    trainer.log_to_loggers(logged, trainer.progress.batches_that_stepped)
                call(trainer, f"on_{prefix}_end")
            if self.stage is RunningStage.VALIDATING:
                trainer.progress.validation_batches += self._longest
        finally:
            values = outputs if keep_outputs else self._per_loader(results)
            results.reset()
            trainer.metrics.evaluation = None
            module._results = previous_results
            trainer.state.stage = previous_stage
            trainer.training_modes = None
            for child, mode in modes.items():
                child.training = mode
        if prefix != "predict":
            call(trainer, f"on_{prefix}_model_train", only="module")
        return values

    def close(self) -> None:
        """Stop the loaders' worker processes."""
        for stream in self.streams:
            stream.close()

    def _run_loader(
        self, results: Results, index: int, number: int, max_batches: int | float, keep: bool
    ) -> list[Any]:
        trainer, prefix = self.trainer, self.prefix
        many = len(self.streams) > 1
        results.dataloader_idx = index if many else None
        step = getattr(trainer.lightning_module, self.step_name)
        arguments = arguments_for(step, many)
        batch_start, batch_end = f"on_{prefix}_batch_start", f"on_{prefix}_batch_end"
        starts, ends = bind(trainer, batch_start), bind(trainer, batch_end)
        transfer, context = make_transfer(trainer), trainer.precision_plugin.context
        limit = min(self.batches[index], max_batches)
        kept: list[Any] = []
        if limit <= 0:
            return kept
        counts_steps = self.stage is RunningStage.VALIDATING and trainer.state.fn == "fit"
        for batch_idx, batch in enumerate(self.streams[index].start(number)):
            if transfer is not None:
                batch = transfer(batch, index)
            results.batch, results.batch_size = batch, None
            results.fx = batch_start
            for hook in starts:
                hook(batch, batch_idx, index)
            results.fx = self.step_name
            if context is None:
                output = step(*arguments(batch, batch_idx, index))
            else:
                with context:
                    output = step(*arguments(batch, batch_idx, index))
            results.fx = batch_end
            for hook in ends:
                hook(output, batch, batch_idx, index)
            if keep:
                kept.append(output)
            self._log_step(results, batch_idx, counts_steps)
            self._longest = max(self._longest, batch_idx + 1)
            if batch_idx + 1 >= limit:
                break
        results.fx = None
        return kept

    def _log_step(self, results: Results, batch_idx: int, counts_steps: bool) -> None:
        if not results.entries or self.stage is RunningStage.SANITY_CHECKING:
            return
        current = results.dataloader_idx
        metrics = results.step_metrics(lambda entry: entry.logger and entry.loader == current)
        if metrics:
            self.trainer.metrics.logged.update(metrics)
            before = self.trainer.progress.validation_batches if counts_steps else 0
            self.trainer.log_to_loggers(metrics, before + batch_idx, with_epoch=False)

    def _per_loader(self, results: Results) -> list[dict[str, float]]:
        """The epoch's metrics as numbers, one dict per loader; what belongs to no loader is in each."""
        per_loader: list[dict[str, float]] = [{} for _ in self.streams] or [{}]
        for index, values in enumerate(per_loader):
            found = results.epoch_metrics(partial(_belongs, index))
            values.update({name: value.item() for name, value in found.items()})
        return per_loader


def _belongs(loader: int, entry: Entry) -> bool:
    return entry.loader is None or entry.loader == loader
