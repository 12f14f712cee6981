"""`CombinedLoader`: several iterables read as one, in four modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")
_COLLECTIONS = (dict, list, tuple)
_NO_LOADERS = (str, bytes, torch.Tensor)


def could_be_iterated(item: Any) -> bool:
    """Whether something may be a loader: not text, and not a tensor or an array, which are batches."""
    if isinstance(item, _NO_LOADERS) or hasattr(item, "shape"):
        return False
    return hasattr(item, "__iter__") or hasattr(item, "__getitem__")


def _is_one_loader(item: Any) -> bool:
    if not isinstance(item, _COLLECTIONS):
        return True
    return not any(could_be_iterated(child) for child in (item.values() if isinstance(item, dict) else item))


def length_of(iterable: Any) -> int | None:
    """``len(iterable)``, or None where there is none."""
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return None


def combined_length(lengths: Sequence[int | float], mode: str) -> int | float:
    """Batches that iterables of these lengths make together; infinite is "cannot tell"."""
    if not lengths:
        return 0
    if mode == "sequential":
        return sum(lengths)
    return min(lengths) if mode == "min_size" else max(lengths)


class Rounds:
    """Rounds over several iterators: each gives one batch, until the mode says that it is over.

    Args:
        iterators: One for each iterable.
        mode: "min_size", "max_size" or "max_size_cycle".
        again: Called with an index, gives a new iterator over that iterable; for "max_size_cycle".
    """

    def __init__(
        self,
        iterators: Sequence[Iterator[Any]],
        mode: str,
        again: Callable[[int], Iterator[Any]],
    ) -> None:
        self.iterators = list(iterators)
        self.mode = mode
        self.ended = [False] * len(self.iterators)
        """Which of the iterables came to their end, even if they began again."""
        self.taken = [0] * len(self.iterators)
        """Batches that each gave since it began, or began again."""
        self.at_end = [False] * len(self.iterators)
        """Which of the iterators have said that there is no more."""
        self._again = again

    def __iter__(self) -> Iterator[list[Any]]:
        return self

    def __next__(self) -> list[Any]:
        if not self.iterators:
            raise StopIteration
        taken, round_ = self.taken, []
        for index, iterator in enumerate(self.iterators):
            try:
                batch = next(iterator)
                taken[index] += 1
            except StopIteration:
                batch = self._after_the_end(index)
            round_.append(batch)
        return round_

    def _after_the_end(self, index: int) -> Any:
        self.ended[index] = self.at_end[index] = True
        if self.mode == "min_size" or all(self.ended):
            raise StopIteration
        if self.mode == "max_size":
            self.iterators[index] = iter(())
            return None
        self.iterators[index] = self._again(index)
        self.taken[index], self.at_end[index] = 0, False
        batch = next(self.iterators[index])
        self.taken[index] = 1
        return batch


class CombinedLoader(Iterable[Any]):
    """Several iterables, in any nesting of dicts, lists and tuples, read as one.

    Iterating gives ``(batch, batch_idx, dataloader_idx)``. In "sequential" mode the batches come from one
    iterable after the other. In the other modes a batch has the nesting of ``iterables``, with one batch of
    each in it, and ``dataloader_idx`` is 0.

    Args:
        iterables: Loaders, or anything else that can be iterated.
        mode: "min_size" ends with the first iterable that ends; "max_size_cycle" begins those that end anew
            until all have ended once; "max_size" has None in their place; "sequential" takes them in turn.

    Raises:
        ValueError: there is no such mode.
    """

    def __init__(
        self,
        iterables: Any,
        mode: Literal["min_size", "max_size_cycle", "max_size", "sequential"] = "min_size",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"CombinedLoader(mode={mode!r}): expected one of {', '.join(map(repr, MODES))}.")
        self._iterables = iterables
        self._flattened, self._spec = tree_flatten(iterables, is_leaf=_is_one_loader)
        self._mode = mode
        self._limits: list[int | float] | None = None
        self._running: Iterator[tuple[Any, int, int]] | None = None
        self._iterators: list[Iterator[Any]] = []

    @property
    def mode(self) -> str:
        """How the iterables are combined."""
        return self._mode

    @property
    def iterables(self) -> Any:
        """The iterables in the nesting that they were given in."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a list; assigning one of the same length replaces them."""
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        if len(flattened) != len(self._flattened):
            raise ValueError(
                f"CombinedLoader.flattened: expected {len(self._flattened)} iterables, found "
                f"{len(flattened)}."
            )
        self._flattened = list(flattened)
        self._iterables = self.unflatten(self._flattened)

    def unflatten(self, flat: Sequence[Any]) -> Any:
        """One value per iterable, in the iterables' nesting."""
        return tree_unflatten(list(flat), self._spec)

    @property
    def sampler(self) -> Any:
        """Each iterable's sampler, or None where it has none, in the iterables' nesting."""
        return self.unflatten([getattr(one, "sampler", None) for one in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """Each iterable's batch sampler, or None where it has none, in the iterables' nesting."""
        return self.unflatten([getattr(one, "batch_sampler", None) for one in self._flattened])

    @property
    def limits(self) -> list[int | float] | None:
        """Batches that each iterable counts for at most. Only "sequential" stops at them by itself."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        if limits is not None and len(limits) != len(self._flattened):
            raise ValueError(
                f"CombinedLoader.limits: expected {len(self._flattened)} limits, one for each iterable, "
                f"found {len(limits)}."
            )
        self._limits = limits

    def __len__(self) -> int:
        """Batches, as far as the limits let them through.

        Raises:
            TypeError: an iterable that it depends on has no length.
        """
        lengths: list[int | float] = []
        limits = [math.inf] * len(self._flattened) if self._limits is None else self._limits
        for one, limit in zip(self._flattened, limits, strict=True):
            length = length_of(one)
            lengths.append(min(limit, math.inf if length is None else length))
        total = combined_length(lengths, self._mode)
        if math.isinf(total):
            raise TypeError(
                f"CombinedLoader(mode={self._mode!r}) has no length: one of its iterables has none."
            )
        return int(total)

    def __iter__(self) -> CombinedLoader:
        self.reset()
        self._running = self._one_by_one() if self._mode == "sequential" else self._side_by_side()
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self._running is None:
            raise RuntimeError("next(combined_loader) works after iter(combined_loader) only.")
        return next(self._running)

    def _one_by_one(self) -> Iterator[tuple[Any, int, int]]:
        for index, one in enumerate(self._flattened):
            limit = math.inf if self._limits is None else self._limits[index]
            if limit <= 0:
                continue
            iterator = iter(one)
            self._iterators = [iterator]
            for number, batch in enumerate(iterator):
                yield batch, number, index
                if number + 1 >= limit:
                    break

    def _side_by_side(self) -> Iterator[tuple[Any, int, int]]:
        def again(index: int) -> Iterator[Any]:
            return iter(self._flattened[index])

        rounds = Rounds([iter(one) for one in self._flattened], self._mode, again)
        self._iterators = rounds.iterators
        for number, batches in enumerate(rounds):
            yield self.unflatten(batches), number, 0

    def reset(self) -> None:
        """Stop iterating, and with it the worker processes of loaders."""
        kept = [getattr(one, "_iterator", None) for one in self._flattened]
        iterators: list[Any] = [*self._iterators, *kept]
        for iterator in iterators:
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
        for one in self._flattened:
            if getattr(one, "_iterator", None) is not None:
                one._iterator = None
        self._running, self._iterators = None, []
