"""Write predictions out as they are made, or when the last of them is."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from holdfast.callbacks.base import Callback
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class WriteInterval(str, Enum):
    """When a `BasePredictionWriter` writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """After each batch."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """After the last batch, everything at once."""
        return self is not WriteInterval.BATCH

    def __str__(self) -> str:
        return self.value


class BasePredictionWriter(Callback):
    """Hand out predictions with the rows of the dataset that they are of; derive from it and write them.

    Override `write_on_batch_end`, `write_on_epoch_end` or both, as ``write_interval`` says. What is written
    after the batch need not stay in memory: ``trainer.predict(return_predictions=False)`` keeps nothing.

    Args:
        write_interval: "batch", "epoch" or "batch_and_epoch".

    Raises:
        ConfigError: Another ``write_interval``.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        known = [str(interval) for interval in WriteInterval]
        if write_interval not in known:
            raise ConfigError(
                f"{type(self).__name__}(write_interval={write_interval!r}) must be one of "
                f"{', '.join(map(repr, known))}."
            )
        self.interval = WriteInterval(write_interval)

    def uses_hook(self, name: str) -> bool:
        """Leave out the moment at which nothing is written, unless a subclass has taken the hook itself."""
        for hook, writes in (
            ("on_predict_batch_end", self.interval.on_batch),
            ("on_predict_epoch_end", self.interval.on_epoch),
        ):
            if name == hook and getattr(type(self), hook) is getattr(BasePredictionWriter, hook):
                return writes
        return super().uses_hook(name)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's prediction; override it.

        Args:
            trainer: The trainer.
            pl_module: The module.
            prediction: What ``predict_step`` returned.
            batch_indices: The batch's rows in the dataset, in order; empty where the data has no rows to
                speak of, such as an iterable's.
            batch: The batch.
            batch_idx: Its number.
            dataloader_idx: Which loader it comes from.
        """
        raise NotImplementedError(
            f"{type(self).__name__} writes after each batch: define write_on_batch_end."
        )

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all predictions; override it.

        Args:
            trainer: The trainer.
            pl_module: The module.
            predictions: What ``predict_step`` returned for each batch; with several loaders a list of lists.
            batch_indices: For each loader the list of its batches' rows in the dataset.
        """
        raise NotImplementedError(
            f"{type(self).__name__} writes after the last batch: define write_on_epoch_end."
        )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Have one batch's prediction written."""
        assert trainer.predict_loop is not None
        indices = trainer.predict_loop.current_batch_indices
        self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have all predictions written."""
        loop = trainer.predict_loop
        assert loop is not None
        self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)
