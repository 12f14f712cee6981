"""Metrics, hyperparameters and the graph as TensorBoard's event files, continued exactly by a resumed run.

A checkpoint remembers how far each event file went; going on from it cuts them back to there, when something
is to be logged, and goes on in a new one. So a run that was killed and resumed shows the very points of a run
that never stopped. The names of a run's event files hold a mark of the run, so that those of another run
in the same directory are never touched.
"""

from __future__ import annotations

import inspect
import os
import uuid
import warnings
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint import commit
from holdfast.errors import ArgumentError, ConfigError
from holdfast.loggers import event_files
from holdfast.loggers.base import rank_zero_experiment
from holdfast.loggers.hparams_file import NAME_HPARAMS_FILE, flat, named, plain, write_hparams
from holdfast.loggers.versioned import VersionedLogger, expanded, sync_file
from holdfast.utilities.example_forward import unchanged
from holdfast.utilities.nested import move_to_device
from holdfast.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(VersionedLogger):
    """Write metrics to event files in ``<save_dir>/<name>/version_N``, hyperparameters to ``hparams.yaml``.

    It needs the package tensorboard. All events are on their way to the disk within ``flush_secs`` (120),
    and those before a checkpoint when it is written; what a kill costs is logged again by the resumed run.

    Args:
        save_dir: The directory under which everything is written.
        name: The experiment's directory; None or "" leaves that level out.
        version: Which run of the experiment: a number for ``version_N``, a string as it is. Default: the
            next free number, chosen when first needed.
        log_graph: Whether to log the model's graph when a run starts, traced with its
            ``example_input_array``.
        default_hp_metric: Whether hyperparameters that are logged without metrics get the metric
            ``hp_metric`` (-1): TensorBoard's table of hyperparameters lists a run only if it has one.
        prefix: Put before every metric's name, with a "-".
        sub_dir: A directory inside the version's for the files of this logger; checkpoints go beside it.
        kwargs: Further arguments of `torch.utils.tensorboard.SummaryWriter`, such as ``flush_secs``.

    Raises:
        ArgumentError: ``SummaryWriter`` does not take one of ``kwargs``.
        ConfigError: tensorboard is not installed.
    """

    NAME_HPARAMS_FILE = NAME_HPARAMS_FILE

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        taken = list(inspect.signature(_summary_writer()).parameters)[1:]
        unknown = [argument for argument in kwargs if argument not in taken]
        if unknown:
            raise ArgumentError(
                f"TensorBoardLogger({unknown[0]}=...): it is not an argument of this logger, nor one of "
                f"torch.utils.tensorboard.SummaryWriter that can be given here: {', '.join(taken)}."
            )
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._arguments = kwargs
        self._experiment: SummaryWriter | None = None
        self._resumed = False
        self._marks = [_new_mark()]
        """Of the run that this is, and of what user code may have logged before the run was known."""
        self._keep: dict[str, int] | None = None
        """The files to go back to, and their sizes, before anything is logged."""
        self._keep_marks: list[str] | None = None
        self._synced: dict[str, int] = {}
        self._graph_logged = False
        self._hp_metrics: list[tuple[str, int, float]] = []
        self._not_again: list[tuple[str, int, float]] = []
        self.hparams: dict[str, Any] = {}
        """The hyperparameters logged so far."""

    @property
    def sub_dir(self) -> str | None:
        """The directory inside the version's that was given, if any."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        """``<save_dir>/<name>/version_N``, or ``.../<version>`` for a string, and in it ``sub_dir``."""
        directory = super().log_dir
        return directory if self._sub_dir is None else os.path.join(directory, expanded(self._sub_dir))

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The ``SummaryWriter`` behind this logger, for images, text, histograms and all else it can do."""
        # Its own file_writer is None after close(), which user code may have called.
        if self._experiment is None or self._experiment.file_writer is None:
            commit.make_directories(os.path.abspath(self.log_dir))
            if self._keep is not None:
                event_files.cut_back(self.log_dir, self._keep, self._keep_marks)
                self._keep = None
            event_files.wait_for_a_later_name(self.log_dir)
            suffix = f"{self._marks[0]}{self._arguments.get('filename_suffix', '')}"
            arguments = {**self._arguments, "filename_suffix": suffix}
            self._experiment = _summary_writer()(log_dir=self.log_dir, **arguments)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a point to each metric's curve; a dict of numbers gives its curves one chart."""
        # From here on, the run does something that it had not done when it was killed.
        self._not_again.clear()
        self._add(self._prefixed(metrics), step)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace | None = None,
        metrics: Mapping[str, Any] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Write ``hparams.yaml`` and a row of TensorBoard's table of hyperparameters.

        Args:
            params: The hyperparameters.
            metrics: What the table shows beside them; one number is called ``hp_metric``.
            step: The step at which ``metrics`` are logged; None for 0.
        """
        from torch.utils.tensorboard.summary import hparams

        values = named(params)
        self.hparams.update(values)
        experiment = self.experiment
        write_hparams(self.log_dir, self.hparams)
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        metrics = {name: self._point(name, value) for name, value in self._prefixed(metrics).items()}
        for summary in hparams(flat(plain(values)), metrics):
            experiment.file_writer.add_summary(summary)
        for name, value in metrics.items():
            point = (name, int(step or 0), value)
            if point in self._not_again:
                self._not_again.remove(point)
            else:
                self._add({name: value}, step)
                self._hp_metrics.append(point)

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """Log the model's graph where ``log_graph=True`` asks for it; the model is trained as without it.

        Args:
            model: The model, traced in evaluation mode.
            input_array: A tensor, or a tuple of arguments of its ``forward``. Default: the model's
                ``example_input_array``, whose graph is logged once.
        """
        if not self._log_graph or (input_array is None and self._graph_logged):
            return
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if example is None or isinstance(example, Mapping):
            found = "is not there" if example is None else f"is a {type(example).__name__}"
            rank_zero_warn(
                "TensorBoardLogger(log_graph=True) logs no graph: "
                f"{type(model).__name__}.example_input_array {found}. "
                "Set it to a tensor, or to a tuple of the arguments of forward."
            )
            return
        self._graph_logged = True
        _add_graph(self.experiment, model, example)

    @rank_zero_only
    def save(self) -> None:
        """Write out every event."""
        if self._experiment is not None and self._experiment.file_writer is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write out every event and close the files; what is logged later goes into new ones."""
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    def state_dict(self) -> dict[str, Any]:
        """Return how far the event files go at this moment, after writing all events out."""
        # A checkpoint must not count on points that a kill or a power cut can still lose.
        self.save()
        # Where nothing was logged since a resume, the files are those that the resume kept.
        files = dict(self._keep or {})
        if self._keep is None:
            files = event_files.sizes(self.log_dir)
            grown = [name for name, size in files.items() if self._synced.get(name) != size]
            for name in event_files.marked(grown, self._marks):
                sync_file(os.path.join(self.log_dir, name))
            self._synced = files
        return {
            **self._place(),
            "files": files,
            "run": self._marks[0],
            "graph": self._graph_logged,
            "hp_metrics": [list(point) for point in self._hp_metrics],
        }

    @rank_zero_only
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the event files were, if this is the version that they were written in."""
        # One that `resume_in` named is it, even if its directory was moved since.
        if self._resumed or (state_dict.get("name"), state_dict.get("version")) == (self.name, self.version):
            self.finalize("interrupted")
            self._keep = dict(state_dict["files"])
            mark = state_dict.get("run")
            if mark is not None:
                self._marks = list(dict.fromkeys([mark, *self._marks]))
            # Before they were marked, whose files they are could not be told.
            self._keep_marks = None if mark is None else self._marks
            self._graph_logged = bool(state_dict["graph"])
            self._hp_metrics = [(name, step, value) for name, step, value in state_dict["hp_metrics"]]
            # A run logs its hyperparameters when it starts, and that it does again.
            self._not_again = list(self._hp_metrics)

    def _begins_with(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether the run's marked files are here, each at least as long as it was."""
        mark, files = state_dict.get("run"), dict(state_dict.get("files") or {})
        own = event_files.marked(files, [mark] if mark else [])
        found = event_files.sizes(self.log_dir)
        return bool(own) and all(found.get(name, -1) >= files[name] for name in own)

    @rank_zero_only
    def resume_in(self, version: int | str) -> None:
        """Go on in ``version``: add to its events, unless ``load_state_dict`` says how many to keep."""
        self.finalize("interrupted")
        self._version = version
        self._resumed = True

    def _add(self, metrics: Mapping[str, Any], step: int | None) -> None:
        experiment = self.experiment
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                points = {key: self._point(f"{name}/{key}", one) for key, one in value.items()}
                experiment.add_scalars(name, points, step)
            else:
                experiment.add_scalar(name, self._point(name, value), step)

    def _point(self, name: str, value: Any) -> float:
        number = self._number(name, value)
        if not isinstance(number, bool | int | float):
            raise ConfigError(
                f"TensorBoardLogger.log_metrics: {name!r} is {value!r}. A metric is a number, a tensor with "
                "one element, or a dict of them; text, images and histograms go through logger.experiment."
            )
        return float(number)

    def __getstate__(self) -> dict[str, Any]:
        # The writer's thread can neither be copied nor go to another process; a copy opens its own.
        return {**self.__dict__, "_experiment": None}


def _new_mark() -> str:
    return f".{uuid.uuid4().hex[:8]}"


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "TensorBoardLogger needs the package tensorboard: pip install tensorboard. Or use CSVLogger."
        ) from error
    return SummaryWriter


def _add_graph(experiment: SummaryWriter, model: nn.Module, example: Any) -> None:
    """Trace and log the graph; the model and random numbers are as before."""
    import torch

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = move_to_device(example, device)
    with unchanged(model), warnings.catch_warnings():
        # Tracing warns of what would matter to a program; this is a picture.
        warnings.simplefilter("ignore")
        experiment.add_graph(model, tuple(example) if isinstance(example, list) else example)
