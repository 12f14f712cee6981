"""The newest checkpoint of a directory that can be trusted, and what is passed over for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from holdfast.checkpoint.ownership import Contents, step_in
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointNotFound,
    StorageError,
)
from holdfast.utilities.rank_zero import rank_zero_warn

T = TypeVar("T")


@dataclass(frozen=True)
class Newest(Generic[T]):
    """A checkpoint that can be trusted.

    Attributes:
        path: where it is.
        read: what reading it gave.
        damaged: newer ones that were passed over for it.
    """

    path: str
    read: T
    damaged: frozenset[str]


def newest_verified(directory: str, contents: Contents, read: Callable[[str], T]) -> Newest[T] | None:
    """Read checkpoints, the newest first, until one is whole and verified; None if there is none at all.

    Those that are damaged, and newer, are named in one warning.

    Args:
        directory: What to call the place.
        contents: What it holds.
        read: Reads and verifies a file.

    Raises:
        CheckpointCorrupt: there are checkpoints, and each is damaged; names all of them.
        CheckpointIncompatible: the newest is of a newer holdfast.
    """
    passed_over: list[str] = []
    damaged: set[str] = set()
    for one in reversed(contents.owned):
        path = one.entry.path
        try:
            found = read(path)
        except CheckpointNotFound:
            continue  # deleted between the listing and now
        except CheckpointIncompatible:
            raise
        except (CheckpointError, StorageError) as error:
            passed_over.append(_line(path, str(error)))
            damaged.add(path)
            continue
        step = one.entry.step or 0
        passed_over += [_line(e.path, e.reason) for e in contents.broken if step_in(e.path) > step]
        if passed_over:
            rank_zero_warn(
                f"Checkpoints in {directory} are damaged and were passed over:\n  "
                + "\n  ".join(passed_over)
                + f"\nGoing on from {os.path.basename(path)}."
            )
        return Newest(path, found, frozenset(damaged))
    passed_over += [_line(entry.path, entry.reason) for entry in contents.broken]
    if passed_over:
        raise CheckpointCorrupt(
            f"{directory} has checkpoints, but not one of them is whole and verified, and starting from "
            "step 0 would bury them:\n  " + "\n  ".join(passed_over) + "\nMove them away to start anew.",
            path=directory,
        )
    return None


def _line(path: str, reason: str | None) -> str:
    name = os.path.basename(path)
    return f"{name}: " + str(reason).splitlines()[0].removeprefix(f"{name} is corrupt: ")
