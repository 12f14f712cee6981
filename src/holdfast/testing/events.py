"""What a watched run tells of itself: what happened, in order, and where it was stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.testing.fingerprints import Leaf
from holdfast.training.progress import BATCH, END, VALIDATED

BATCH_END, VALIDATION_END, EPOCH_END, FIT_END = "batch", "validation", "epoch", "end"
KINDS = {BATCH: BATCH_END, VALIDATED: VALIDATION_END, END: EPOCH_END}
"""The stage of a safe point -> the kind of the event that it is behind."""


class Key(NamedTuple):
    """Which event it is: equal for the same one in the run that never stopped and in a stopped one."""

    fit: int
    """Which of the script's fits, from 0."""
    kind: str
    epoch: int
    batch: int
    """Training batches that are done, over all epochs."""


@dataclass(frozen=True)
class Event:
    """A training batch, a validation, an epoch or a fit that is over, with all that can be seen of it."""

    key: Key
    batch_idx: int
    global_step: int
    values: dict[str, dict[str, Leaf]]
    """Category -> name -> value; the categories in the order in which they are compared."""

    def where(self, fits: int = 1) -> str:
        """The event in words; with several fits the message says which."""
        fit, kind, epoch, _ = self.key
        which = f"fit {fit + 1} of {fits}, " if fits > 1 else ""
        if kind == FIT_END:
            which = which.removesuffix(", ") or "fit"
            return f"the end of {which} (global step {self.global_step})"
        batch = f"{which}epoch {epoch}, batch {self.batch_idx}"
        step = f" (global step {self.global_step})"
        if kind == BATCH_END:
            return batch + step
        if kind == VALIDATION_END:
            return f"the validation behind {batch}{step}"
        return f"the end of {which}epoch {epoch}{step}"


@dataclass(frozen=True)
class Started:
    """A fit began, from the start or from a checkpoint."""

    fit: int
    resumed_from: str | None
    """The checkpoint, below the run's directory."""
    position: str


@dataclass(frozen=True)
class Stopped:
    """The run is stopped now."""

    fit: int
    where: str


@dataclass(frozen=True)
class Tables:
    """The CSV files that a fit has logged to, below the run's directory."""

    fit: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Reasons:
    """Why the run itself says that it cannot be exact."""

    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Over:
    """The script came to its end; or it failed, and the text says how."""

    failure: str = ""


Message = Event | Started | Stopped | Tables | Reasons | Over


@dataclass(frozen=True)
class Life:
    """One start of the script.

    Args:
        number: Which; -1 is the run that is never stopped, 0 the first that is.
        root: Where it trains.
        by: What stops it: "exception", "sigterm" or "sigkill".
        save: Whether a checkpoint is saved at the stop, besides the run's own.
        seed: What the generators are seeded with before the script is called.
        stop: Behind which event the run is stopped; None for never.
        goes_on: The fit that has to go on from a checkpoint, if any has to.
    """

    number: int
    root: str
    by: str
    save: bool
    seed: int
    stop: Key | None = None
    goes_on: int | None = None


@dataclass
class Tale:
    """All that one life told."""

    life: Life
    messages: list[Message] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        """What happened, in order."""
        return [message for message in self.messages if isinstance(message, Event)]

    @property
    def starts(self) -> list[Started]:
        """The fits that began."""
        return [message for message in self.messages if isinstance(message, Started)]

    @property
    def stopped(self) -> Stopped | None:
        """Where it was stopped, if it was."""
        return next((message for message in self.messages if isinstance(message, Stopped)), None)


@dataclass(frozen=True)
class Parting:
    """The first difference.

    Args:
        where: The event, or the file, in words.
        what: How the two differ; a line each.
        cause: What usually makes it.
        also: What else differs there, in words.
    """

    where: str
    what: tuple[str, ...]
    cause: str
    also: tuple[str, ...] = ()
