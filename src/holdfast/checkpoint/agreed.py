"""Rounds in which every process does its part and one of them decides; an error is everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from holdfast.checkpoint import commit
from holdfast.errors import HoldfastError, StorageError

T = TypeVar("T")
D = TypeVar("D")


class Round:
    """The processes of a job, as a save or a load sees them.

    Args:
        path: what it is about, for messages.
        operation: what is done to it.
        rank: this process's number in the group.
        world_size: how many there are.
        group: a process group on the host; None for the default one, which is not used by one process.
    """

    def __init__(self, path: str, operation: str, *, rank: int, world_size: int, group: Any) -> None:
        self._path, self._operation = path, operation
        self._rank, self._world_size, self._group = rank, world_size, group

    def __call__(self, own: Callable[[], T], decide: Callable[[list[T]], list[D]]) -> D:
        """Do this process's part; rank 0 decides what each of them gets by what all of them found.

        Ranks: all. Blocks: until all have done their part and rank 0 has decided.

        Raises:
            HoldfastError: what the first rank that failed met; the same on all. Of another kind of error the
                rank that met it raises the error itself, the others a `StorageError` that tells it.
        """
        part, error = _tried(own)
        gathered = self._gather((part, self._told(error)))
        decided: list[tuple[Any, Any]] | None = None
        if gathered is not None:
            problem = next((one[1] for one in gathered if one[1] is not None), None)
            results: list[D] | None = None
            if problem is None:
                parts: list[Any] = [one[0] for one in gathered]
                results, late = _tried(lambda: decide(parts))
                error, problem = late, self._told(late)
            shared: list[Any] = [None] * self._world_size if results is None else list(results)
            decided = [(one, problem) for one in shared]
        result, problem = self._scatter(decided)
        if problem is not None:
            raise self._raised(error, problem)
        return result  # type: ignore[no-any-return]

    def _told(self, error: Exception | None) -> tuple[Any, ...] | None:
        """An error as it is sent to the others."""
        if error is None:
            return None
        if isinstance(error, OSError) and not isinstance(error, HoldfastError):
            error = commit.storage_error(self._path, self._operation, error)
        if isinstance(error, HoldfastError):
            return self._rank, type(error), error.message, error.path, getattr(error, "errno", None)
        text = f"Could not {self._operation} {self._path}: {error!r} on rank {self._rank}."
        return self._rank, None, text, self._path, None

    def _raised(self, own: Exception | None, told: tuple[Any, ...]) -> Exception:
        rank, kind, message, path, code = told
        if own is not None and (rank == self._rank and (kind is None or isinstance(own, HoldfastError))):
            return own
        made: HoldfastError = (kind or StorageError)(message, path=path)
        if code is not None and isinstance(made, OSError):
            made.errno = code
        made.__cause__ = own if rank == self._rank else None
        return made

    def _gather(self, value: T) -> list[T] | None:
        if self._world_size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self._world_size if self._rank == 0 else None
        dist.gather_object(value, found, dst=self._first(), group=self._group)
        return found

    def _scatter(self, values: list[T] | None) -> T:
        if self._world_size == 1:
            assert values is not None
            return values[0]
        import torch.distributed as dist

        found: list[Any] = [None]
        dist.scatter_object_list(found, values, src=self._first(), group=self._group)
        return found[0]  # type: ignore[no-any-return]

    def _first(self) -> int:
        import torch.distributed as dist

        return 0 if self._group is None else dist.get_global_rank(self._group, 0)


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
