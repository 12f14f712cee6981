"""Every exception that holdfast raises on purpose.

Each one also derives from the built-in that a caller would have caught before holdfast existed, so
``except FileNotFoundError`` keeps working.
"""

from __future__ import annotations

import os


class HoldfastError(Exception):
    """Base of everything below; catch it to catch all of holdfast's own errors."""

    def __init__(self, message: str = "", *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else os.fspath(path)

    def __str__(self) -> str:
        # OSError and friends format their args in ways of their own; the message is always ours.
        return self.message


class ConfigError(HoldfastError, ValueError):
    """An argument, hook or combination of them that cannot work; raised before anything is trained."""


class ArgumentError(ConfigError, TypeError):
    """An argument that there is not, or of a type that it cannot have; the message names the fix."""


class CheckpointError(HoldfastError):
    """A checkpoint could not be read or does not fit."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path, or none that the request could mean."""


class CheckpointIncomplete(CheckpointError, ValueError):
    """The file is not a whole checkpoint: cut short, empty, or not a checkpoint at all."""


class CheckpointCorrupt(CheckpointError, ValueError):
    """The file has the shape of a checkpoint, but bytes in it are not those that were written."""


class CheckpointIncompatible(CheckpointError, ValueError, RuntimeError):
    """The checkpoint is fine but does not fit what it is being loaded into."""


class CheckpointUnsafe(CheckpointError, ValueError):
    """The file asks for something that opening a checkpoint never does, such as running code."""


class StorageError(HoldfastError, OSError):
    """The disk, or whatever stands for it, refused or failed; what was there before is untouched."""


class RankFailed(HoldfastError, RuntimeError):
    """Another process of the job failed, is gone, or is elsewhere, so that this one cannot go on.

    Attributes:
        rank: Which one; None where it is not known, or where it is several.
    """

    def __init__(self, message: str = "", *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
