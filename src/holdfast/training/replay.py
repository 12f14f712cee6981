"""Data that has to be read again: said beforehand, and shown while it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from holdfast.errors import CheckpointIncompatible
from holdfast.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

Replaying = Callable[[Any, int, int], Iterable[int]]
"""Called with a loader, its number and a count of batches; gives 0, 1, ... while each of them is read."""

EVERY_S = 10.0
"""Seconds between two lines."""


def silently(loader: Any, index: int, count: int) -> Iterable[int]:
    """Say nothing."""
    return range(count)


def read_again(batches: Iterator[Any], numbers: Iterable[int], count: int) -> None:
    """Read the batches before a position.

    Args:
        batches: Those of an epoch from its start.
        numbers: What a `Replaying` gave.
        count: How many there are before the position.

    Raises:
        CheckpointIncompatible: there are not so many.
    """
    end = object()
    for index in numbers:
        if next(batches, end) is end:
            raise CheckpointIncompatible(
                f"The checkpoint is {count} batches into the epoch, but the training data ended after "
                f"{index}. Give the run the data it was started with."
            )


class Replay:
    """Says that batches are read again, and how far that is.

    Args:
        trainer: Whose progress bar says whether there is one: a bar on a terminal, else a line now and then.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, loader: Any, index: int, count: int) -> Iterator[int]:
        """Yield the numbers below ``count``.

        Raises:
            Preempted: a signal came while they were read.
        """
        if count == 0:
            return iter(())
        number = f", loader {index}" if index else ""
        rank_zero_info(
            f"train_dataloader{number}: {described(loader)} has no state, so the {count} batches before the "
            "position are read again. A loader with state_dict and load_state_dict, such as torchdata's "
            "StatefulDataLoader over a dataset that has them too, goes on at once."
        )
        bar = self._trainer.progress_bar_callback
        console = _terminal() if bar is not None and bar.is_enabled else None
        return self._unless_told_to_leave(
            _with_lines(count) if console is None else _with_bar(console, count)
        )

    def _unless_told_to_leave(self, numbers: Generator[int, None, None]) -> Iterator[int]:
        """Reading again may take longer than a run that was told to stop is given.

        Of several processes only some may read again, so they leave together when that is over.
        """
        with closing(numbers):
            for number in numbers:
                yield number
                if self._trainer.world_size == 1:
                    self._trainer.preemption.leave_untrained(self._trainer)


def described(loader: Any) -> str:
    """A loader by its type, and the dataset's where it has one."""
    dataset = getattr(loader, "dataset", None)
    over = "" if dataset is None else f" over {type(dataset).__name__}"
    return f"{type(loader).__name__}{over}"


def _terminal() -> Any:
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _with_bar(console: Any, count: int) -> Generator[int, None, None]:
    from rich.progress import Progress

    # Drawn by the clock, without a thread.
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("Reading again", total=count)
        drawn_s = 0.0
        for done in range(count):
            now_s = time.monotonic()
            if now_s - drawn_s >= 0.25:
                drawn_s = now_s
                progress.update(task, completed=done, refresh=True)
            yield done


def _with_lines(count: int) -> Generator[int, None, None]:
    said_s = time.monotonic()
    for done in range(count):
        now_s = time.monotonic()
        if now_s - said_s >= EVERY_S:
            said_s = now_s
            rank_zero_info(f"read {done} of {count} batches again")
        yield done
