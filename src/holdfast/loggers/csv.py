"""Metrics as a CSV file that a crash leaves readable and a resumed run continues.

Only whole rows reach the file: rows are buffered and appended in one write, and a new column writes the
file anew beside the old one and replaces it. A checkpoint remembers how many rows were logged; going on
from it cuts the file back to them, so that a run that was killed and resumed ends with the very file of a
run that never stopped. It remembers a checksum of these rows too: a file that does not begin with them is
another run's, and is kept under another name.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import zlib
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from holdfast.checkpoint import commit
from holdfast.loggers.base import rank_zero_experiment
from holdfast.loggers.hparams_file import NAME_HPARAMS_FILE, named, write_hparams
from holdfast.loggers.versioned import VersionedLogger, sync_file
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn


class ExperimentWriter:
    """The files of one version: ``metrics.csv`` and ``hparams.yaml``.

    Args:
        log_dir: The directory of the version; `CSVLogger.experiment` makes it.
        keep_rows: How many rows of a metrics file that is already there to go on from; the rest is cut
            off at the first write. None moves such a file aside instead, as ``metrics-v1.csv``.
        checksums: What `checksum_of` says of the first of these rows, and of all of them; a file that has
            others is moved aside likewise. None takes them as they are.
    """

    NAME_HPARAMS_FILE = NAME_HPARAMS_FILE
    NAME_METRICS_FILE = "metrics.csv"

    def __init__(
        self, log_dir: str, keep_rows: int | None = None, checksums: Sequence[int] | None = None
    ) -> None:
        self.log_dir = log_dir
        self.hparams: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        """The rows that are not in the file yet."""
        self.metrics_keys: list[str] = []
        """The file's columns, sorted."""
        self.rows_written = 0
        self.checksums = [0, 0]
        """Of the file's first row, and of all its rows."""
        self._synced = 0
        self._keep_rows = keep_rows
        self._expected = checksums
        self._started = False

    @property
    def metrics_file_path(self) -> str:
        """The path of ``metrics.csv``."""
        return os.path.join(self.log_dir, self.NAME_METRICS_FILE)

    @property
    def rows(self) -> int:
        """How many rows were logged, whether they are in the file or not."""
        self._start()
        return self.rows_written + len(self.metrics)

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Add one row of numbers; ``step`` defaults to the number of rows not yet in the file."""
        row = {name: one.item() if hasattr(one, "item") else one for name, one in metrics_dict.items()}
        row["step"] = len(self.metrics) if step is None else step
        self.metrics.append(row)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Add to the hyperparameters and write ``hparams.yaml``."""
        self.hparams.update(params)
        write_hparams(self.log_dir, self.hparams)

    def save(self) -> None:
        """Put every buffered row into the file, in one write."""
        if not self.metrics:
            return
        self._start()
        rows, path = self.metrics, self.metrics_file_path
        keys = sorted(set(self.metrics_keys).union(*rows))
        if keys == self.metrics_keys and os.path.exists(path):
            _append(path, _csv_text(keys, rows, header=False))
        else:
            kept = _read_rows(path)[: self.rows_written] if os.path.exists(path) else []
            _replace(path, _csv_text(keys, [*kept, *rows], header=True))
            self.metrics_keys = keys
        self._count(rows)
        # Rows are let go of only when they are in the file.
        self.metrics = []

    def sync(self) -> None:
        """Have the file on disk, as far as it was written."""
        if self._synced != self.rows_written:
            sync_file(self.metrics_file_path)
            self._synced = self.rows_written

    def _count(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows and not self.rows_written:
            self.checksums[0] = checksum_of(rows[:1])
        self.checksums[1] = checksum_of(rows, self.checksums[1])
        self.rows_written += len(rows)

    def _start(self) -> None:
        """Settle, before the first write, what becomes of a file that is already there."""
        if self._started:
            return
        self._started = True
        path = self.metrics_file_path
        if not os.path.exists(path):
            if self._keep_rows:
                rank_zero_warn(
                    f"{path} is gone: its {self._keep_rows} rows from before the resume are missing."
                )
            return
        if self._keep_rows is None:
            rank_zero_info(f"{path} of an earlier run is kept as {_move_aside(path)}")
            return
        found = _read_rows(path)
        rows = found[: self._keep_rows]
        if self._expected is not None and not _may_begin_with(rows, self._keep_rows, self._expected):
            rank_zero_warn(
                f"{path} does not begin with the {self._keep_rows} rows that were logged before the "
                f"checkpoint: it is another run's, or was changed, and is kept as {_move_aside(path)}. A new "
                "file begins with what is logged from here on."
            )
            return
        if len(rows) < self._keep_rows:
            rank_zero_warn(
                f"{path} has {len(rows)} rows; the checkpoint was written after {self._keep_rows}. "
                "The missing ones were lost before the resume."
            )
        # Columns that only the cut rows used go with them.
        self.metrics_keys = sorted(set().union(*rows))
        self._count(rows)
        text = _csv_text(self.metrics_keys, rows, header=True)
        if text != _read(path):
            _replace(path, text)


class CSVLogger(VersionedLogger):
    """Write metrics to ``<save_dir>/<name>/version_N/metrics.csv``, hyperparameters to ``hparams.yaml``.

    A row reaches the file within ``flush_logs_every_n_steps`` steps, at every checkpoint and at the end;
    a kill costs at most the rows since, and those are logged again by the resumed run.

    Args:
        save_dir: The directory under which everything is written.
        name: The experiment's directory; None or "" leaves that level out.
        version: Which run of the experiment: a number for ``version_N``, a string as it is. Default: the
            next free number, chosen when first needed.
        prefix: Put before every metric's name, with a "-".
        flush_logs_every_n_steps: Steps (or rows, whichever comes first) that may stay unwritten.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._flush_logs_every_n_steps = flush_logs_every_n_steps
        self._flushed_step = -1
        self._experiment: ExperimentWriter | None = None
        self._keep_rows: int | None = None
        self._keep_checksums: list[int] | None = None
        self._resumed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer behind this logger, with its directory made: so the next free version is another one."""
        if self._experiment is None:
            commit.make_directories(os.path.abspath(self.log_dir))
            self._experiment = ExperimentWriter(self.log_dir, self._keep_rows, self._keep_checksums)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add one row; tensors of one element and NumPy scalars become plain numbers."""
        row = {name: self._number(name, value) for name, value in self._prefixed(metrics).items()}
        experiment = self.experiment
        experiment.log_metrics(row, step)
        waiting = experiment.metrics[-1]["step"] - self._flushed_step
        if max(waiting, len(experiment.metrics)) >= self._flush_logs_every_n_steps:
            self.save()

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Write ``hparams.yaml``; values that YAML has no plain form for are written as strings."""
        self.experiment.log_hparams(named(params))

    @rank_zero_only
    def save(self) -> None:
        """Write out every buffered row."""
        if self._experiment is None or not self._experiment.metrics:
            return
        self._flushed_step = self._experiment.metrics[-1]["step"]
        self._experiment.save()

    def state_dict(self) -> dict[str, Any]:
        """Return how many rows belong to this moment, after writing them all out."""
        # A checkpoint must not count rows that a kill or a power cut can still lose.
        self.save()
        # Where nothing was logged since a resume, the rows are those that the resume kept.
        rows, checksums = self._keep_rows or 0, self._keep_checksums
        if self._experiment is not None:
            rows, checksums = self._experiment.rows, list(self._experiment.checksums)
            self._experiment.sync()
        return {**self._place(), "rows": rows, "checksums": checksums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the checkpoint's rows, if this is the version that they were written in."""
        # One that `resume_in` named is it, even if its directory was moved since.
        if self._resumed or (state_dict.get("name"), state_dict.get("version")) == (self.name, self.version):
            # No rows at all are the beginning of any file. In a version that the user named, it may be
            # another run's, and is not cut back but moved aside.
            self._keep_rows = int(state_dict["rows"]) or (None if self._named else 0)
            self._keep_checksums = state_dict.get("checksums")
            self._experiment = None

    def resume_in(self, version: int | str) -> None:
        """Go on in ``version``: append to its rows, unless ``load_state_dict`` says how many to keep."""
        self._version = version
        self._resumed = True
        self._experiment = None
        path = self._metrics_path()
        if self._keep_rows is None and os.path.exists(path):
            self._keep_rows = len(_read_rows(path))

    def _begins_with(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether ``metrics.csv`` begins with the rows of the state, and no file that was moved aside does.

        If several do, such as those of the same run started twice, whose they are cannot be told.
        """
        path, (stem, extension) = self._metrics_path(), os.path.splitext(self._metrics_path())
        count, checksums = state_dict.get("rows"), state_dict.get("checksums")
        if not count or checksums is None or not os.path.exists(path):
            return False
        paths = [path, *glob.glob(f"{glob.escape(stem)}-v*{extension}")]
        begin = {one: _read_rows(one)[:count] for one in paths}
        found = [
            one for one, rows in begin.items() if len(rows) == count and checksum_of(rows) == checksums[1]
        ]
        return found == [path]

    def _metrics_path(self) -> str:
        return os.path.join(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)


def checksum_of(rows: Iterable[Mapping[str, Any]], before: int = 0) -> int:
    """Return the CRC-32 of the rows as they are in a file, in whatever order its columns are.

    Args:
        rows: As they are logged, or as they are read.
        before: That of the rows before these.
    """
    for row in rows:
        cells = sorted((name, str(value)) for name, value in row.items() if value is not None)
        before = zlib.crc32(repr([cell for cell in cells if all(cell)]).encode(), before)
    return before


def _may_begin_with(rows: Sequence[Mapping[str, Any]], count: int, checksums: Sequence[int]) -> bool:
    """Whether rows may be the ``count`` ones that the checksums are of, or what is left of them."""
    first, whole = checksums
    if len(rows) == count:
        return checksum_of(rows) == whole
    return not rows or checksum_of(rows[:1]) == first


def _move_aside(path: str) -> str:
    aside = _free_name(path)
    os.rename(path, aside)
    return os.path.basename(aside)


def _free_name(path: str) -> str:
    stem, extension = os.path.splitext(path)
    number = 1
    while os.path.exists(f"{stem}-v{number}{extension}"):
        number += 1
    return f"{stem}-v{number}{extension}"


def _csv_text(keys: list[str], rows: Iterable[Mapping[str, Any]], *, header: bool) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=keys, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _read_rows(path: str) -> list[dict[str, str]]:
    """Read every whole row; a last line without its end was cut short and is not one."""
    text = _read(path)
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    # DictReader puts cells without a column under None.
    return [{name: value for name, value in row.items() if name and value} for row in reader]


def _read(path: str) -> str:
    with open(path, newline="", encoding="utf-8") as file:
        return file.read()


def _append(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        try:
            commit.write_all(descriptor, text.encode())
        except BaseException as error:
            # Half a row must not become the beginning of the next one.
            os.ftruncate(descriptor, size)
            if isinstance(error, OSError):
                raise commit.storage_error(path, "append to", error) from error
            raise
    finally:
        os.close(descriptor)


def _replace(path: str, text: str) -> None:
    with commit.replacing(path) as replacement:
        commit.write_all(replacement.fd, text.encode())
