"""Validation, test and prediction: one loop, which leaves the training it interrupts as it found it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.callbacks.prediction_writer import BasePredictionWriter
from holdfast.errors import ConfigError
from holdfast.training import workers
from holdfast.training.combined import CombinedStream, as_one_loader, make_stream
from holdfast.training.data import BatchStream
from holdfast.training.hooks import bind, bind_step, call, may_log, profiled_items
from holdfast.training.progress import RunningStage
from holdfast.training.results import Entry, Results
from holdfast.training.sharding import job_of
from holdfast.training.sources import processed, with_every_row
from holdfast.training.transfer import make_transfer
from holdfast.utilities.combined_loader import CombinedLoader, combined_length

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

# Stage -> (prefix of the hooks, name of the step)
_NAMES = {
    RunningStage.SANITY_CHECKING: ("validation", "validation_step"),
    RunningStage.VALIDATING: ("validation", "validation_step"),
    RunningStage.TESTING: ("test", "test_step"),
    RunningStage.PREDICTING: ("predict", "predict_step"),
}

# What a profiler calls the fetching of a batch, as Lightning does.
_FETCHES = {
    "validation": "[_EvaluationLoop].val_next",
    "test": "[_EvaluationLoop].test_next",
    "predict": "[_PredictionLoop].predict_next",
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


def fitted(function: Callable[..., Any], leading: int, loader: int | None) -> Callable[..., Any]:
    """A step or hook that may leave out ``batch_idx`` or ``dataloader_idx``, to be called with all before it.

    Args:
        function: The step or hook.
        leading: How many arguments come before ``dataloader_idx``.
        loader: The ``dataloader_idx`` to add; None for the only loader, where just a function that insists on
            one is given 0.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes = len(positional)
    if loader is None and takes > leading and positional[leading].default is inspect.Parameter.empty:
        loader = 0
    if not variadic and takes < leading:
        return lambda *given: function(*given[:takes])
    if loader is None or not (variadic or takes > leading):
        return function
    return lambda *given: function(*given, loader)


class EvaluationLoop:
    """Runs a stage over all of its loaders.

    Args:
        trainer: The trainer.
        stage: Which stage.
        loaders: One loader or several.
        limit: The trainer's limit for this stage, and the argument's name for messages.
        order: The rule by which the run that it is part of has its rows in order; see `sharding.job_of`.

    Raises:
        ConfigError: they are to be predicted on, and combined side by side.
    """

    def __init__(
        self,
        trainer: Trainer,
        stage: RunningStage,
        loaders: Any,
        limit: tuple[int | float, str],
        order: str | None = None,
    ) -> None:
        self.trainer = trainer
        self.stage = stage
        self.prefix, self.step_name = _NAMES[stage]
        if stage is RunningStage.PREDICTING:
            loaders = with_every_row(loaders)
        combined = as_one_loader(processed(trainer, loaders), "sequential")
        self.mode = "sequential"
        self.loaders = combined.iterables if isinstance(combined, CombinedLoader) else combined
        """The loaders as they were given, in their nesting."""
        parts: list[Any] = [combined]
        if isinstance(combined, CombinedLoader):
            self.mode = combined.mode
            if self.mode == "sequential":
                parts = combined.flattened
            elif stage is RunningStage.PREDICTING:
                raise ConfigError(
                    f'trainer.predict cannot run over a CombinedLoader(mode="{self.mode}"): its batches '
                    'hold those of several loaders. Take mode="sequential", or give the loaders as a list.'
                )
        elif combined is None:
            parts = []
        job = job_of(trainer, order)
        self.streams: list[BatchStream | CombinedStream] = [
            make_stream(
                part, stage=self.prefix, index=i, seed=trainer.seed, rank=trainer.global_rank,
                shield=workers.signals_of_the_run(trainer), job=job,
            )
            for i, part in enumerate(parts)
        ]  # fmt: skip
        self._longest = 0
        each = [part for stream in self.streams for part in getattr(stream, "parts", [stream])]
        self.batches = [count_batches(one.length(), limit[0], limit[1]) for one in each]
        """Batches of each loader, as far as the limit lets them through."""
        self.current_batch_indices: list[Any] = []
        """While predicting for a callback that writes: the dataset's rows of the batch."""
        self.epoch_batch_indices: list[list[Any]] = []
        """Likewise: for each loader, the rows of all its batches; empty again when prediction is over."""
        self._outputs: list[list[Any]] = []

    @property
    def predictions(self) -> list[Any]:
        """What the steps returned so far, where it is kept; with several loaders a list for each."""
        return self._outputs[0] if len(self._outputs) == 1 and len(self.streams) == 1 else self._outputs

    @property
    def num_dataloaders(self) -> int:
        """How many loaders there are."""
        return len(self.batches)

    @property
    def max_batches(self) -> list[int | float]:
        """Batches of each loader, as far as the limit lets them through."""
        return self.batches

    @property
    def skip(self) -> bool:
        """Whether there is not one batch to run."""
        return not any(self._limits(float("inf")))

    def run(self, number: int, max_batches: int | float = float("inf"), keep_outputs: bool = False) -> Any:
        """Evaluate once; returns one dict of metrics per loader, or with ``keep_outputs`` the steps' outputs.

        Without a single batch nothing happens, and the list is empty.

        Args:
            number: The number of this run of the stage, part of every batch's seed.
            max_batches: A further limit per loader.
            keep_outputs: Collect what the steps return.
        """
        self._outputs = []
        limits = self._limits(max_batches)
        if not any(limits):
            return []
        trainer, module, prefix = self.trainer, self.trainer.lightning_module, self.prefix
        results = Results(training=False)
        previous_stage, previous_results = trainer.state.stage, module._results
        trainer.state.stage = self.stage
        trainer.metrics.evaluation = results
        module._results = None if trainer.barebones else results
        modes = trainer.training_modes = {child: child.training for child in module.modules()}
        # What a model keeps of its validation during fit, such as a cache, has to be fit for training.
        # And tensors that are made here to gather sharded weights in are used again by a fit.
        inference = trainer.inference_mode and trainer.state.fn != "fit" and not trainer.strategy.shards_model
        no_grad = torch.inference_mode if inference else torch.no_grad
        self._longest = 0
        keeps = self._prepare_for_writers() or keep_outputs
        logged: dict[str, Tensor] = {}
        try:
            call(trainer, f"on_{prefix}_model_eval", only="module")
            with no_grad():
                call(trainer, f"on_{prefix}_start")
                call(trainer, f"on_{prefix}_epoch_start")
                for index, limit in enumerate(limits):
                    self._outputs.append([])
                    self._run_loader(results, index, number, limit, keeps)
                results.dataloader_idx = None
                results.batch = results.batch_size = None
                results.epoch_ended = True
                if prefix != "predict":
                    trainer.metrics.end(results, more=partial(may_log, trainer, f"on_{prefix}_epoch_end"))
                call(trainer, f"on_{prefix}_epoch_end")
                if self.stage is RunningStage.SANITY_CHECKING:
                    trainer.metrics.show(results)
                elif prefix != "predict":
                    logged = trainer.metrics.publish(results)
                    trainer.log_to_loggers(logged, trainer.progress.batches_that_stepped)
                call(trainer, f"on_{prefix}_end")
            if self.stage is RunningStage.VALIDATING:
                trainer.progress.validation_batches += self._longest
        finally:
            # Not after an error: the other ranks are not here to compute a metric together.
            ended = results.epoch_ended
            values = self._outputs if keep_outputs else self._per_loader(results) if ended else []
            results.reset()
            self.epoch_batch_indices = []
            self._outputs = self._outputs if keep_outputs else []
            trainer.metrics.evaluation = None
            module._results = previous_results
            trainer.state.stage = previous_stage
            trainer.training_modes = None
            for child, mode in modes.items():
                child.training = mode
        if prefix != "predict":
            call(trainer, f"on_{prefix}_model_train", only="module")
        return values

    def _limits(self, max_batches: int | float) -> list[int | float]:
        """Batches to take from each stream."""
        limits = [min(count, max_batches) for count in self.batches]
        return limits if self.mode == "sequential" else [combined_length(limits, self.mode)]

    def _prepare_for_writers(self) -> bool:
        """Note the rows of batches if a callback writes predictions; returns whether one wants them all."""
        self.current_batch_indices, self.epoch_batch_indices = [], []
        writers = [c for c in self.trainer.callbacks if isinstance(c, BasePredictionWriter)]
        if self.prefix != "predict" or not writers:
            return False
        for stream in self.streams:
            if isinstance(stream, BatchStream):
                stream.note_rows()
        return any(writer.interval.on_epoch for writer in writers)

    def close(self) -> None:
        """Stop the loaders' worker processes."""
        for stream in self.streams:
            stream.close()

    def _run_loader(self, results: Results, index: int, number: int, limit: int | float, keep: bool) -> None:
        trainer, prefix, stream = self.trainer, self.prefix, self.streams[index]
        loader = index if len(self.streams) > 1 else None
        results.dataloader_idx = loader
        bound, context = bind_step(trainer, self.step_name)
        step = fitted(bound, 2, loader)
        batch_start, batch_end = f"on_{prefix}_batch_start", f"on_{prefix}_batch_end"
        starts = [fitted(hook, 2, loader) for hook in bind(trainer, batch_start)]
        ends = [fitted(hook, 3, loader) for hook in bind(trainer, batch_end)]
        transfer = make_transfer(trainer)
        rows, kept = getattr(stream, "rows", None), self._outputs[index]
        self.epoch_batch_indices.append([])
        if limit <= 0:
            return
        counts_steps = self.stage is RunningStage.VALIDATING and trainer.state.fn == "fit"
        batch_idx, again = -1, _given_to_others_too(stream)
        stream.limit = limit
        batches = profiled_items(trainer, _FETCHES[prefix], stream.start(number))
        for batch_idx, batch in enumerate(batches):
            if rows is not None:
                self.current_batch_indices = rows.popleft()
                self.epoch_batch_indices[index].append(self.current_batch_indices)
            if transfer is not None:
                batch = transfer(batch, index)
            results.batch, results.batch_size = batch, (0 if batch_idx == again else None)
            results.fx = batch_start
            for hook in starts:
                hook(batch, batch_idx)
            results.fx = self.step_name
            if context is None:
                output = step(batch, batch_idx)
            else:
                with context:
                    output = step(batch, batch_idx)
            results.fx = batch_end
            for hook in ends:
                hook(output, batch, batch_idx)
            if keep:
                kept.append(output)
            self._log_step(results, batch_idx, counts_steps)
            if batch_idx + 1 >= limit:
                break
        stream.leave()
        self._longest = max(self._longest, batch_idx + 1)
        results.fx = None

    def _log_step(self, results: Results, batch_idx: int, counts_steps: bool) -> None:
        if not results.entries or self.stage is RunningStage.SANITY_CHECKING:
            return
        current = results.dataloader_idx
        wanted = lambda entry: entry.logger and entry.loader == current  # noqa: E731
        metrics = self.trainer.metrics.step(results, wanted)
        if metrics:
            self.trainer.metrics.logged.update(metrics)
            before = self.trainer.progress.validation_batches if counts_steps else 0
            self.trainer.log_to_loggers(metrics, before + batch_idx, with_epoch=False)

    def _per_loader(self, results: Results) -> list[dict[str, float]]:
        """The epoch's metrics as numbers, less those logged with ``logger=False``: one dict per loader.

        What belongs to no loader is in each.
        """
        per_loader: list[dict[str, float]] = [{} for _ in self.streams] or [{}]
        for index, values in enumerate(per_loader):
            found = results.epoch_metrics(partial(_is_result, index))
            values.update({name: value.item() for name, value in found.items()})
        return per_loader


def _given_to_others_too(stream: BatchStream | CombinedStream) -> int | None:
    """The number of the batch that another rank has too, for lack of rows: in the mean it counts once."""
    shares = getattr(stream, "shares", None)
    units = shares.units() if shares is not None and shares.splits and not shares.drop_last else None
    if shares is None or units is None or shares.grid is None:
        return None
    whole, left = divmod(units, shares.grid.size)
    return whole if 0 < left <= shares.rank else None


def _is_result(loader: int, entry: Entry) -> bool:
    return entry.logger and (entry.loader is None or entry.loader == loader)
