"""Several processes go on from one checkpoint: rank 0 says which, each reads it, and all hear how it went.

A file that one rank cannot use is used by none: what is passed over is passed over everywhere, and an error
of any rank is raised on every one.
"""

from __future__ import annotations

import os
import pickle
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint import origin
from holdfast.errors import CheckpointError, CheckpointNotFound, ConfigError, HoldfastError, StorageError
from holdfast.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.resume import Resolved
    from holdfast.training.trainer import Trainer

_SHOWN = 8
_TAIL_BYTES = 64 << 10


class NotEverywhere(Exception):
    """Some ranks read a checkpoint that others have not, or have another; ``error`` says so to the user."""

    def __init__(self, error: HoldfastError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class _Outcome:
    """How one rank's reading went."""

    host: str
    error: Exception | None
    content: tuple[int, int] | None
    """What tells the file from another one; None where nothing does."""


def resolve_together(
    trainer: Trainer,
    ckpt_path: str | os.PathLike[str] | None,
    find: Callable[[Callable[[str], Resolved]], Resolved | None],
    read: Callable[[str], Resolved],
) -> Resolved | None:
    """The checkpoint that rank 0 finds, read and verified by each rank; None means a fresh start.

    Ranks: all. Blocks: until every rank has read it. On return: all have the same one, or all raise.

    Args:
        trainer: Whose ranks.
        ckpt_path: What this rank was given.
        find: Called on rank 0 with what reads a file on all ranks.
        read: Reads a file on this rank.

    Raises:
        ConfigError: some ranks were given a checkpoint and others none.
        CheckpointNotFound: a rank has no such file, or another one, where rank 0 reads it.
        Exception: whatever kept a rank from reading it.
    """
    _compare_given(trainer, ckpt_path)
    if trainer.is_global_zero:
        return _lead(trainer, find, read)
    return _follow(trainer, read)


# -- rank 0 --------------------------------------------------------------------------------------------------


def _lead(
    trainer: Trainer,
    find: Callable[[Callable[[str], Resolved]], Resolved | None],
    read: Callable[[str], Resolved],
) -> Resolved | None:
    def read_everywhere(path: str) -> Resolved:
        strategy = trainer.strategy
        strategy.broadcast(("read", path if origin.is_url(path) else os.path.abspath(path)))
        found, outcome = _attempt(read, path)
        outcomes = strategy.gather(outcome)
        assert outcomes is not None
        problem = _problem(path, outcomes)
        strategy.broadcast(problem is None)
        if problem is not None:
            raise problem
        assert found is not None
        return found

    try:
        found = find(read_everywhere)
    except NotEverywhere as problem:
        trainer.strategy.broadcast(("raise", _portable(problem.error)))
        raise problem.error from None
    except Exception as problem:
        trainer.strategy.broadcast(("raise", _portable(problem)))
        raise
    told = None if found is None else (found.version, found.skipped)
    trainer.strategy.broadcast(("done", told))
    return found


def _problem(path: str, outcomes: list[_Outcome]) -> Exception | None:
    """What keeps the ranks from going on from a file, as rank 0 is to raise it; None if nothing does."""
    leading = outcomes[0]
    if leading.error is not None:
        return leading.error
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error is not None]
    if not failed:
        others = [
            rank
            for rank, outcome in enumerate(outcomes)
            if None not in (outcome.content, leading.content) and outcome.content != leading.content
        ]
        return NotEverywhere(_differs(path, others, outcomes)) if others else None
    error = outcomes[failed[0]].error
    assert error is not None
    if isinstance(error, (CheckpointNotFound, StorageError)):
        same = [rank for rank in failed if type(outcomes[rank].error) is type(error)]
        return NotEverywhere(_out_of_reach(path, same, outcomes))
    if isinstance(error, CheckpointError):
        return type(error)(f"{_who(failed[:1], outcomes)}: {error}", path=path)
    return error


def _out_of_reach(path: str, ranks: list[int], outcomes: list[_Outcome]) -> HoldfastError:
    error = outcomes[ranks[0]].error
    there_is_none = isinstance(error, CheckpointNotFound)
    found = "there is no such file there" if there_is_none else str(error).rstrip(".")
    return (CheckpointNotFound if there_is_none else StorageError)(
        f"{_who(ranks, outcomes)} cannot read {_place(path)}, which rank 0 (host {outcomes[0].host}) reads: "
        f"{found}. {_WHAT_TO_DO}",
        path=path,
    )


def _differs(path: str, ranks: list[int], outcomes: list[_Outcome]) -> HoldfastError:
    sizes = [outcomes[rank].content or (0, 0) for rank in (ranks[0], 0)]
    told = f" ({sizes[0][0]:,} and {sizes[1][0]:,} bytes)" if sizes[0][0] != sizes[1][0] else ""
    return CheckpointNotFound(
        f"{_who(ranks, outcomes)} has another file at {_place(path)} than rank 0 (host {outcomes[0].host})"
        f"{told}, and a run can go on from one only. {_WHAT_TO_DO}",
        path=path,
    )


_WHAT_TO_DO = (
    "Every process reads the checkpoint itself: let default_root_dir or dirpath be on storage that all "
    "machines share, or copy rank 0's file to the same path on each."
)


def _who(ranks: list[int], outcomes: list[_Outcome]) -> str:
    """Name them: "rank 3 (host b)", or "ranks 3, 4 (hosts b, c)"."""
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    hosts = list(dict.fromkeys(outcomes[rank].host for rank in ranks))
    on = ", ".join(hosts[:_SHOWN]) + (", ..." if len(hosts) > _SHOWN else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown} (host{'s' * (len(hosts) > 1)} {on})"


def _place(path: str) -> str:
    return origin.title(path) if origin.is_url(path) else os.path.abspath(path)


# -- the others ----------------------------------------------------------------------------------------------


def _follow(trainer: Trainer, read: Callable[[str], Resolved]) -> Resolved | None:
    found: Resolved | None = None
    while True:
        told: tuple[str, Any] = trainer.strategy.broadcast(("", None))
        what, said = told
        if what == "raise":
            raise said
        if what == "done":
            if said is None:
                return None
            assert found is not None
            found.version, found.skipped = said
            return found
        found = None  # what was read before is not taken, and need not be in memory
        found, outcome = _attempt(read, said)
        trainer.strategy.gather(outcome)
        if not trainer.strategy.broadcast(True) and found is not None:
            found.let_go()
            found = None


# -- every rank ----------------------------------------------------------------------------------------------


def _attempt(read: Callable[[str], Resolved], path: str) -> tuple[Resolved | None, _Outcome]:
    host = socket.gethostname()
    try:
        found = read(path)
        return found, _Outcome(host, None, _content(path))
    except Exception as error:
        return None, _Outcome(host, _portable(error), None)


def _content(path: str) -> tuple[int, int] | None:
    """The size of a file and a checksum of its end, where a checkpoint has the checksums of the rest."""
    if origin.is_url(path):
        return None
    inside = os.path.join(path, "manifest.json") if os.path.isdir(path) else path
    try:
        with open(inside, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return size, zlib.crc32(file.read())
    except OSError:  # a plugin's, which may be anywhere
        return None


def _portable(error: Exception) -> Exception:
    """The error, or where another process could not be told of it what it says."""
    try:
        other = pickle.loads(pickle.dumps(error))
        if type(other) is type(error) and str(other) == str(error):
            return error
    except Exception:
        pass
    return CheckpointError(f"{type(error).__name__}: {error}")


def _compare_given(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> None:
    """Make sure that all ranks want to go on from something, or all from nothing.

    Raises:
        ConfigError: they differ, so that rank 0 could begin anew where there is a checkpoint.
    """
    mine = None if ckpt_path is None else os.fspath(ckpt_path)
    given = trainer.strategy.gather((socket.gethostname(), mine))
    problem: str | None = None
    if given is not None:
        host, leading = given[0]
        for rank, (other_host, other) in enumerate(given):
            if (other is None) != (leading is None):
                problem = (
                    f"ckpt_path= is not the same on all ranks: rank 0 (host {host}) was given {leading!r}, "
                    f"rank {rank} (host {other_host}) {other!r}. os.path.exists() and the like can come out "
                    'differently on each machine. Give all ranks the same, such as ckpt_path="auto" or '
                    '"last", for which rank 0 looks and speaks for all.'
                )
                break
            if other != leading:
                rank_zero_warn(
                    f"ckpt_path= is not the same on all ranks: rank 0 was given {leading!r}, rank {rank} "
                    f"{other!r}. Rank 0's is taken."
                )
                break
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise ConfigError(problem)
