"""What checkpoints a directory holds, from the tails of the files alone and without torch."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import stat
from typing import Any

from holdfast.checkpoint import commit, container, directories, sharded_manifest
from holdfast.errors import CheckpointIncomplete, CheckpointNotFound

SUFFIX = ".ckpt"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a checkpoint says about itself in its last kilobytes.

    Attributes:
        format: version of the file format.
        step: optimizer steps taken, or None if the saver did not say.
        epoch: the epoch, or None.
        metrics: the numbers by which checkpoints are compared.
        saved_at: seconds since 1970.
        exact: whether a resume from it goes on bit-identically.
        kind: "full", "weights" if that is all it holds, or "state" for what a `Checkpointer` was given.
        contents: the payload's top-level keys.
        values: everything that the saver put into the summary.
    """

    format: int
    step: int | None
    epoch: int | None
    metrics: dict[str, float]
    saved_at: float
    exact: bool
    kind: str
    contents: tuple[str, ...]
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name in a directory that is, or should be, a checkpoint.

    Attributes:
        whole: its structure says that all of it is there; `load.load` checks every byte.
        reason: why it is not whole, or None.
        saved_at: seconds since 1970; the file's own time where no summary says it.
        foreign: it was not written by holdfast (torch.save, PyTorch Lightning).
        contents: the payload's top-level keys, where a summary says them.
        values: everything that the saver put into the summary; empty where there is none.
    """

    path: str
    whole: bool
    reason: str | None
    step: int | None
    epoch: int | None
    metrics: dict[str, float]
    saved_at: float
    size_bytes: int
    exact: bool
    kind: str
    foreign: bool
    contents: tuple[str, ...] = ()
    values: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def read_summary(path: str | os.PathLike[str]) -> Summary:
    """Read what a checkpoint says about itself, from its tail alone.

    Raises:
        CheckpointNotFound: if there is no such file.
        CheckpointIncomplete: if it is not a whole holdfast checkpoint.
        StorageError: if it cannot be read.
    """
    name = os.fspath(path)
    try:
        return _summary_of(name)[0]
    except container.NotWhole as problem:
        raise CheckpointIncomplete(
            f"{os.path.basename(name)} is not a whole checkpoint: {problem.reason}.", path=name
        ) from None
    except sharded_manifest.Bad as bad:
        raise bad.told(name) from None
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"There is no checkpoint {name}.", path=name) from error
    except OSError as error:
        raise commit.storage_error(name, "read", error) from error


def scan(
    directory: str | os.PathLike[str], recursive: bool = False, suffix: str | tuple[str, ...] = SUFFIX
) -> list[Entry]:
    """List the checkpoints in a directory, newest first, broken and foreign ones included.

    Every name counts, so two names of one file are two entries (`choice.second_names` tells). Temporary files
    are not listed. A directory is a checkpoint if it is a sharded one, and is not looked into;
    asked about one itself, it is the only one.

    Args:
        directory: where to look.
        recursive: look into the directories below it too.
        suffix: how the names of checkpoints end; one or several.

    Raises:
        CheckpointNotFound: if there is no such directory.
        StorageError: if it, or with ``recursive`` a directory below it, cannot be read.
    """
    top = os.fspath(directory)
    if directories.is_sharded(top):
        return [entry(top)]
    found: list[Entry] = []
    pending = [top]
    while pending:
        at = pending.pop()
        try:
            with os.scandir(at) as items:
                for item in items:
                    path = _standing_for(item)
                    if path.endswith(suffix) and _is_candidate(item):
                        found.append(entry(path))
                    elif recursive and _may_hold_checkpoints(item):
                        pending.append(item.path)
        except FileNotFoundError as error:
            if at == top:
                raise CheckpointNotFound(f"There is no directory {top}.", path=top) from error
        except OSError as error:
            raise commit.storage_error(at, "read the directory", error) from error
    found.sort(key=lambda e: (e.saved_at, -1 if e.step is None else e.step, e.path), reverse=True)
    return found


def _standing_for(item: os.DirEntry[str]) -> str:
    """The path that it is found by: another than its own for one that was moved aside and not replaced."""
    name = directories.name_aside(item.name)
    if name is None:
        return item.path
    path = os.path.join(os.path.dirname(item.path), name)
    return item.path if os.path.lexists(path) else path


def _is_candidate(item: os.DirEntry[str]) -> bool:
    if commit.is_temporary(item.name):
        return False
    # A dangling link is a broken one.
    return not os.path.isdir(item.path) or directories.is_sharded(item.path)


def _may_hold_checkpoints(item: os.DirEntry[str]) -> bool:
    return (
        item.is_dir(follow_symlinks=False)
        and not commit.is_temporary(item.name)
        and not directories.is_sharded(item.path)
    )


def entry(path: str) -> Entry:
    """Describe one file, or a sharded checkpoint; never raises: of one that is broken the reason is there."""
    try:
        try:
            summary, size = _summary_of(path)
        except container.NotWhole as problem:
            return _unlisted(path, problem)
        except sharded_manifest.Bad as bad:
            return _broken_directory(path, bad)
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
        if isinstance(error, FileNotFoundError):
            reason = "it is a link to a file that does not exist"
        return Entry(path, False, reason, None, None, {}, 0.0, 0, False, "full", False)
    return Entry(
        path, True, None, summary.step, summary.epoch, summary.metrics, summary.saved_at, size,
        summary.exact, summary.kind, False, summary.contents, summary.values,
    )  # fmt: skip


def _summary_of(path: str) -> tuple[Summary, int]:
    path = directories.standing(path)
    about = os.stat(path)
    if stat.S_ISDIR(about.st_mode) and directories.is_sharded(path):
        with sharded_manifest.opened(path) as directory:
            manifest = directory.manifest
        return summary_from({"format": manifest.format} | manifest.summary), manifest.size_bytes
    if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for somebody to write to it
        raise OSError(errno.EINVAL, "it is not a regular file")
    with open(path, "rb") as file:
        tail = container.read_tail(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return summary_from(tail.summary), size


def summary_from(values: dict[str, Any]) -> Summary:
    """Read the values forgivingly: a summary of another version may lack some, or mean more."""
    about = {key: value for key, value in values.items() if key not in ("format", "records")}
    step, epoch, saved_at = about.get("step"), about.get("epoch"), _number(about.get("saved_at"))
    metrics = about.get("metrics")
    contents, kind = about.get("contents"), about.get("kind")
    return Summary(
        format=values["format"],
        step=step if isinstance(step, int) else None,
        epoch=epoch if isinstance(epoch, int) else None,
        metrics=_numbers(metrics) if isinstance(metrics, dict) else {},
        saved_at=saved_at if saved_at is not None and math.isfinite(saved_at) else 0.0,
        exact=about.get("exact") is True,
        kind=kind if isinstance(kind, str) else "full",
        contents=tuple(key for key in contents if isinstance(key, str)) if isinstance(contents, list) else (),
        values=about,
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    numbers = {name: _number(value) for name, value in metrics.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: Any) -> float | None:
    try:
        return float(value)  # "NaN" and "inf" stand as text: JSON has no such numbers
    except (TypeError, ValueError, OverflowError):
        return None


def _broken_directory(path: str, bad: sharded_manifest.Bad) -> Entry:
    at = os.stat(directories.standing(path)).st_mtime
    return Entry(path, False, bad.reason, None, None, {}, at, 0, False, "full", False)


def _unlisted(path: str, problem: container.NotWhole) -> Entry:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        reason: str | None = problem.reason
        foreign = not problem.ours and not container.has_mark(file.fileno())
        if foreign and container.is_zip(file.fileno()):
            try:
                container.find_directory(file.fileno(), status.st_size)
                reason = None
            except container.NotWhole as damage:
                reason = damage.reason
        elif foreign:
            foreign = os.pread(file.fileno(), 1, 0) == b"\x80"
            reason = "only loading it shows whether it is whole" if foreign else "it is not a checkpoint"
    return Entry(
        path, reason is None, reason, None, None, {}, status.st_mtime, status.st_size, False, "full", foreign
    )
