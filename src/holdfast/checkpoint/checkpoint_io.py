"""Writing and reading checkpoints behind Lightning's interface, so that a trainer can be given another."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from holdfast.checkpoint import commit, directories
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.point_in_time import PointInTime
from holdfast.checkpoint.report import tell_omissions
from holdfast.errors import ConfigError


class CheckpointIO(ABC):
    """Where checkpoints go and how. Subclass it, and hand an object of it to ``Trainer(plugins=...)``.

    A checkpoint is a dict of plain values and tensors that ``torch.save`` and ``torch.load`` can take.
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: The checkpoint; its tensors are the live ones.
            path: Where to.
            storage_options: What was given to ``trainer.save_checkpoint(storage_options=...)``.

        On return: what happens to the checkpoint's values now is not in the file.
        """

    @abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint.

        Args:
            path: Where from.
            map_location: Where tensors go, as `torch.load` takes it.
            weights_only: Accepted for Lightning's sake.
        """

    @abstractmethod
    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint; nothing happens if it is not there."""

    def teardown(self) -> None:
        """Finish what is under way; called when a run is over, however it ended."""


class TorchCheckpointIO(CheckpointIO):
    """holdfast's own engine: durable files that are whole or absent, checked when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; when this returns, it is on disk under its name.

        Raises:
            ConfigError: there are storage options; this writes local files.
            StorageError: the disk refused; a file that was there before is untouched.
        """
        if storage_options is not None:
            raise ConfigError(
                f"storage_options={storage_options!r}: {type(self).__name__} writes local files and takes "
                "none. Use a CheckpointIO of your own that does: Trainer(plugins=[...])."
            )
        report = CheckpointEngine().save(checkpoint, path, summary=summary_of(checkpoint))
        tell_omissions(report.omissions)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint, every byte checked first, no code run; see `holdfast.checkpoint.load.load`."""
        return load(path, map_location="cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, a sharded one too; nothing happens if it is not there.

        Raises:
            StorageError: the disk refused.
        """
        try:
            directories.remove(os.fspath(path))
        except FileNotFoundError:
            return
        except OSError as error:
            raise commit.storage_error(os.fspath(path), "delete", error) from error


class AsyncCheckpointIO(CheckpointIO):
    """Saves through another `CheckpointIO` in a background thread, one save at a time.

    A save is a point in time: the call copies and returns, and nothing that is changed afterwards is in the
    file. A further call waits for the save before it. Deletions take their place behind the saves that were
    called before them, and are left out if one of these failed.

    Args:
        checkpoint_io: What writes; None for `TorchCheckpointIO`.

    Raises:
        Exception: what the background met is raised by the next call, by `wait` and by `teardown`.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self._checkpoint_io = TorchCheckpointIO() if checkpoint_io is None else checkpoint_io
        self._thread: ThreadPoolExecutor | None = None
        self._save: Future[None] | None = None
        self._deletions: list[Future[None]] = []

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes."""
        return self._checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy the checkpoint and write it in the background.

        Blocks: until the save before this one is done, and for the copy.
        """
        self.wait()
        snapshot = PointInTime().of(checkpoint)
        self._save = self._submit(
            lambda: self._checkpoint_io.save_checkpoint(snapshot, path, storage_options=storage_options)
        )

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint, after all that is under way. Blocks: until it is done."""
        self.wait()
        return self._checkpoint_io.load_checkpoint(path, map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint behind all saves so far; if the last of these fails, it stays."""
        save = self._save

        def remove() -> None:
            # A run that was killed had perhaps deleted it already.
            if save is None or save.exception() is None:
                with suppress(FileNotFoundError):
                    self._checkpoint_io.remove_checkpoint(path)

        self._deletions = [one for one in self._deletions if not one.done() or one.exception() is not None]
        self._deletions.append(self._submit(remove))

    def wait(self) -> None:
        """Return when everything so far is done; raise the first error that it met, once."""
        pending = [*([] if self._save is None else [self._save]), *self._deletions]
        errors = [error for error in (future.exception() for future in pending) if error is not None]
        # Not before: who interrupts the waiting has not heard of an error yet.
        self._save, self._deletions = None, []
        if errors:
            raise errors[0]

    def teardown(self) -> None:
        """Wait, and let go of the thread; it can be used again afterwards."""
        try:
            self.wait()
        finally:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()
            self._checkpoint_io.teardown()

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="holdfast-checkpoint")
        return self._thread.submit(work)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a trainer's parts starts with nothing under way.
        return {"_checkpoint_io": self._checkpoint_io, "_thread": None, "_save": None, "_deletions": []}


def writes_own_format(checkpoint_io: CheckpointIO | None) -> bool:
    """Whether what a plugin writes is, as far as anybody can tell, not holdfast's format."""
    while isinstance(checkpoint_io, AsyncCheckpointIO):
        checkpoint_io = checkpoint_io.checkpoint_io
    return checkpoint_io is not None and not isinstance(checkpoint_io, TorchCheckpointIO)


def summary_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a listing shall show of a checkpoint: what the trainer put there for it, or what can be told."""
    own = checkpoint.get("holdfast")
    given = own.get("summary") if isinstance(own, dict) else None
    if isinstance(given, dict):
        return given
    found = {"step": checkpoint.get("global_step"), "epoch": checkpoint.get("epoch")}
    return {key: value for key, value in found.items() if isinstance(value, int)}
