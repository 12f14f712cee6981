"""What a logger is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.callbacks.base import Checkpoint


class Logger(ABC):
    """Takes metrics and hyperparameters of a run and keeps them somewhere.

    Ranks: the trainer calls a logger on rank 0 only.
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


class DummyExperiment:
    """Takes any call and any item, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self

    def __setitem__(self, index: Any, value: Any) -> None: ...


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
