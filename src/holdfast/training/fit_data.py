"""The loaders of a fit: asked for when they are needed first, and anew every so many epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from holdfast.training import rng, workers
from holdfast.training.combined import CombinedStream, make_stream
from holdfast.training.data import BatchStream
from holdfast.training.evaluation import EvaluationLoop, count_batches
from holdfast.training.progress import BATCH, VALIDATED, RunningStage
from holdfast.training.replay import Replay
from holdfast.training.sharding import job_of
from holdfast.training.sources import in_order, processed
from holdfast.training.validation_schedule import batches_between

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class FitData:
    """Training's loader and validation's loop.

    Args:
        trainer: The trainer.
        load_train: Gives the training loader.
        load_val: Gives the validation loader or loaders.
        resumed: The "holdfast" part of the checkpoint that the run goes on from, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        load_train: Callable[[], Any],
        load_val: Callable[[], Any],
        resumed: dict[str, Any] | None,
    ) -> None:
        self.trainer = trainer
        self.stream: BatchStream | CombinedStream | None = None
        self.batches: int | float = math.inf
        self.validation: EvaluationLoop | None = None
        self.validation_interval: int | float = math.inf
        """Training batches between validation runs; infinite where only the end of the data can tell."""
        self._load = {"train": load_train, "val": load_val}
        self._reload_every: int = trainer.reload_dataloaders_every_n_epochs
        resumed = resumed or {}
        self.order: str | None = self._rule_of(resumed)
        """The rule by which the run has its rows in order; None if it begins here."""
        self.asked: dict[str, Any] = {}
        """When each kind of loader was asked for; part of the progress."""
        self._asked_before: dict[str, Any] = dict(resumed.get("progress", {}).get("loaders") or {})
        self._validation_data: list[dict[str, Any]] = resumed.get("validation_data") or []

    @staticmethod
    def _rule_of(resumed: dict[str, Any]) -> str | None:
        data = resumed.get("data")
        # Files without a rule are of one process; those without the data's state are somebody else's.
        return None if not data else str(data.get("order", "drawn"))

    # -- training's ------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Make the training loader and count its batches; does nothing the second time."""
        if self.stream is None:
            self._make_stream()

    def _make_stream(self) -> None:
        trainer = self.trainer
        loader = processed(trainer, self._ask("train"))
        self.stream = make_stream(
            loader, stage="train", index=0, seed=trainer.seed, rank=trainer.global_rank,
            shield=workers.signals_of_the_run(trainer), replaying=Replay(trainer),
            job=job_of(trainer, self.order),
        )  # fmt: skip
        self.batches = count_batches(self.stream.length(), trainer.limit_train_batches, "limit_train_batches")
        self.stream.limit = self.batches
        self.validation_interval = batches_between(
            trainer.val_check_interval, self.batches, trainer.check_val_every_n_epoch is None
        )

    def reload(self) -> None:
        """Ask for the training loader anew if that is due in the epoch that begins."""
        if not self._reload_every or self.stream is None:
            return
        if self.trainer.progress.epoch - self.asked["train"]["epoch"] >= self._reload_every:
            self.stream.close()
            self._make_stream()

    def translate_position(self, data: dict[str, Any]) -> None:
        """Batches of another size than in the checkpoint: go on at the same row.

        Args:
            data: The checkpoint's part about the training data, of an epoch that was under way.
        """
        progress, stream = self.trainer.progress, self.stream
        if not isinstance(stream, BatchStream):
            return
        progress.batch = stream.shares.locate(progress.batch, data)
        grid = stream.shares.grid
        if progress.stage == BATCH and grid is not None and grid.first != (0, 0):
            # No batch ends here, for which validation could be due.
            progress.stage = VALIDATED
            progress.batches_that_stepped += 1

    # -- validation's ----------------------------------------------------------------------------------------

    @property
    def validation_waits(self) -> bool:
        """Whether validation's loaders would be asked for anew before they are used."""
        known = "val" in self._asked_before or self.validation is not None
        return bool(self._reload_every) and not known and self.trainer.check_val_every_n_epoch != 1

    def make_validation(self) -> EvaluationLoop:
        """The validation loop; its loaders are asked for at the first call."""
        if self.validation is None:
            trainer = self.trainer
            limit = (trainer.limit_val_batches, "limit_val_batches")
            stage = trainer.state.stage
            if stage is not RunningStage.SANITY_CHECKING:
                trainer.state.stage = RunningStage.VALIDATING
            try:
                self.validation = EvaluationLoop(
                    trainer, RunningStage.VALIDATING, self._ask("val"), limit, self.order
                )
            finally:
                trainer.state.stage = stage
            saved, self._validation_data = self._validation_data, []
            for stream, state in zip(self.validation.streams, saved, strict=False):
                stream.restore_begin(state)
        return self.validation

    def fresh_validation(self) -> EvaluationLoop:
        """The loop for a validation that begins now; its loaders are asked for anew if that is due."""
        if self._reload_every and self.validation is not None:
            asked = self.asked["val"]
            since = self.trainer.progress.epoch - asked["epoch"]
            # What the sanity check had is for validation in the same epoch, or for none.
            if since >= self._reload_every or (asked["sanity"] and since > 0):
                self.validation.close()
                self.validation = None
            asked["sanity"] = False
        return self.make_validation()

    # -- both ------------------------------------------------------------------------------------------------

    def _ask(self, kind: str) -> Any:
        """Ask for a loader, and with reloads keep what a resumed run needs to be given the same one."""
        trainer, progress = self.trainer, self.trainer.progress
        if not self._reload_every:
            return self._loaders(kind)
        asked = self._asked_before.pop(kind, None)
        if asked is None:
            sanity = trainer.state.stage is RunningStage.SANITY_CHECKING
            self.asked[kind] = {"epoch": progress.epoch, "sanity": sanity, "generators": rng.capture()}
            return self._loaders(kind)
        # It was asked for in an epoch before this one. Whatever it depends on is as it was then.
        self.asked[kind] = asked
        epoch, generators = progress.epoch, rng.capture()
        progress.epoch = asked["epoch"]
        rng.restore(asked["generators"])
        try:
            return self._loaders(kind)
        finally:
            progress.epoch = epoch
            rng.restore(generators)

    def _loaders(self, kind: str) -> Any:
        loaders = self._load[kind]()
        return in_order(loaders, kind) if self.trainer.overfit_batches else loaders

    def state_of_validation(self) -> list[dict[str, Any]] | None:
        """What validation's loaders draw their next run from, besides the generators that each run seeds."""
        if self.validation is None:
            return None
        return [stream.state(False)["now"] for stream in self.validation.streams]

    def close(self) -> None:
        """Stop the loaders' worker processes."""
        if self.stream is not None:
            self.stream.close()
        if self.validation is not None:
            self.validation.close()
