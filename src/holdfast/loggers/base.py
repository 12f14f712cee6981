"""What a logger is."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.callbacks.base import Checkpoint

L = TypeVar("L")


class Logger(ABC):
    """Takes metrics and hyperparameters of a run and keeps them somewhere.

    Derive from it to log to something else. ``name``, ``version``, ``log_metrics`` and ``log_hyperparams``
    are all that is needed. Give it ``save_dir`` too, and default checkpoints go below it. With
    ``state_dict``, ``load_state_dict`` and ``resume_in``, a run that was killed and resumed logs on where
    its checkpoint stands; without them, what was logged between the checkpoint and the kill comes twice.

    Ranks: the trainer calls a logger on rank 0. What user code may call on every rank is decorated with
    `rank_zero_only`, and ``experiment`` with `rank_zero_experiment`.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The experiment's name."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep ``metrics`` as of global step ``step``."""

    @abstractmethod
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the run's hyperparameters."""

    @property
    def save_dir(self) -> str | None:
        """The directory under which this logger writes; None when it writes nowhere local."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The directory that holds every version of this experiment; None when there is none."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The directory of this version; None when there is none."""
        return None

    @property
    def experiment(self) -> Any:
        """The object behind the logger, for what this interface does not cover."""
        return None

    @property
    def group_separator(self) -> str:
        """The character between a metric's group and its name."""
        return "/"

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Keep the model's graph, where the logger can show one."""

    def save(self) -> None:
        """Write out what is buffered."""

    def finalize(self, status: str) -> None:
        """Write out everything and close; ``status`` is "success", "failed" or "interrupted"."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Called after a checkpoint callback's save is durable and its attributes are published."""

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be in a checkpoint for a resumed run to log on without gaps or duplicates."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, before anything is logged."""

    def resume_in(self, version: int | str) -> None:
        """Go on in an existing ``version``; called before anything is written, if at all."""

    def take_version(self, version: int | str | None) -> None:
        """Be told, on another rank than 0, which version rank 0 writes; from now on it is this one's too.

        Without it, ``version`` and ``log_dir`` are what this rank thinks. `Trainer.log_dir` is right anyway.
        """

    def continues(self, state_dict: Mapping[str, Any]) -> bool:
        """Tell whether what is there already was logged by the run that a checkpoint's state is of.

        Asked where the user names both the checkpoint and the version. If so, the run goes on with
        `resume_in` and `load_state_dict`, and what was logged after the checkpoint is dropped; that must
        never be another run's. In doubt: False.
        """
        return False


def rank_zero_experiment(fn: Callable[[L], Any]) -> Callable[[L], Any]:
    """Make an ``experiment`` property's function run on rank 0 alone; other ranks get a `DummyExperiment`."""

    @functools.wraps(fn)
    def experiment(self: L) -> Any:
        found = rank_zero_only(fn)(self)
        return DummyExperiment() if found is None else found

    return experiment


class DummyExperiment:
    """Takes any call and any item, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self

    def __setitem__(self, index: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        # Without this, Python would ask for item after item and never come to an end.
        return iter(())


class DummyLogger(Logger):
    """Keeps nothing: what a trial run logs to, so that code that uses the logger is tried too."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def name(self) -> str:
        """Empty."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    @property
    def experiment(self) -> DummyExperiment:
        """An object that takes any call."""
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep nothing."""

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Keep nothing."""

    def __getattr__(self, name: str) -> Any:
        # What a logger of another kind would offer, such as log_image.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._experiment
