"""Save once when an exception ends the run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from holdfast.callbacks import naming
from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.callbacks.kept_checkpoints import local_directory
from holdfast.checkpoint import catalog
from holdfast.checkpoint.reserved import reserving
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class OnExceptionCheckpoint(Checkpoint):
    """Save when an exception ends a fit, KeyboardInterrupt included, under a name that no file has.

    The exception was raised in the middle of something, so a run goes on from the file, but not bit-identical
    to one that never stopped; `ModelCheckpoint` saves where it is exact. Nothing is saved if nothing was
    trained since the fit began: the file that it went on from holds the same. Nothing deletes the file, and
    ``ckpt_path="auto"`` takes it only where there is no exact one. A run that a signal, or the first Ctrl-C,
    made leave at a safe point has saved itself by then: that is no exception.

    Args:
        dirpath: Where to save.
        filename: The file's name without its extension; ``-v1``, ``-v2`` ... come behind it if it is taken.

    Raises:
        ConfigError: ``filename`` is empty, or ``dirpath`` is no local directory.
    """

    FILE_EXTENSION = catalog.SUFFIX

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ConfigError("OnExceptionCheckpoint(filename=...) is empty: give the file's name.")
        self.dirpath = local_directory(dirpath, "OnExceptionCheckpoint")
        self.filename = filename
        self._saved_as: str | None = None
        self._begun_at: tuple[int, int] | None = None

    @property
    def ckpt_path(self) -> str:
        """The file that was saved last, or the one that will be if its name is still free."""
        return self._saved_as or self._path(None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training begins."""
        self._begun_at = _position(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit is over, and no exception ended it."""
        self._begun_at = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Request a save if there is something new to save."""
        began, self._begun_at = self._begun_at, None
        if trainer.state.fn == "fit" and began not in (None, _position(trainer)) and not trainer.fast_dev_run:
            trainer.request_save(self)

    def plan_save(self, trainer: Trainer) -> SavePlan:
        """Choose the name: rank 0 does, for every rank."""
        name = ""
        if trainer.is_global_zero:
            free = reserving(lambda path: not os.path.lexists(path))
            name = naming.first_usable(self._path, free, 1)
        # Without a run's id: nobody ranks, overwrites or sweeps up such a file.
        extra = {"callback": self.state_key}
        return SavePlan(names=(trainer.strategy.broadcast(name),), summary_extra=extra)

    def committed(self, trainer: Trainer, plan: SavePlan, report: Any) -> None:
        """Say where the file is."""
        self._saved_as = plan.names[0]
        rank_zero_info(f"saved {os.path.relpath(self._saved_as)}, since an exception ended the run")

    def _path(self, version: int | None) -> str:
        behind = "" if version is None else f"-v{version}"
        return os.path.join(self.dirpath, f"{self.filename}{behind}{self.FILE_EXTENSION}")


def _position(trainer: Trainer) -> tuple[int, int]:
    # In manual optimization a batch may train something without a step that is counted.
    return trainer.global_step, trainer.progress.total_batches
