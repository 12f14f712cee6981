"""What a trainer tells a profiler, and where its report goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.utilities.rank_zero import rank_zero_info


class Profiler:
    """Is told when each named action of a run starts and stops. Subclass it and override what you need.

    Args:
        dirpath: Directory of the report's file; None for the first logger's directory.
        filename: Name of the report's file, without its ending; None writes the report to the log instead.
    """

    active = True
    """Whether a run tells it anything: asked once, when the run starts."""

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._log_dir: str | None = None
        self._local_rank: int | None = None

    # -- actions ---------------------------------------------------------------------------------------------

    def start(self, action_name: str) -> None:
        """An action starts."""

    def stop(self, action_name: str) -> None:
        """It stops."""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """The action lasts for the length of a block.

        Example::

            with self.trainer.profiler.profile("augment"):
                batch = self.augment(batch)
        """
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    # -- a run -----------------------------------------------------------------------------------------------

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return self._local_rank or 0

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run starts.

        Args:
            stage: "fit", "validate", "test" or "predict".
            local_rank: Rank of this process on its machine.
            log_dir: Where files go for which ``dirpath`` names no other place.
        """
        self._stage, self._local_rank, self._log_dir = stage, local_rank, log_dir

    def summary(self) -> str:
        """The report so far."""
        return ""

    def describe(self) -> None:
        """A run ended well: the report goes to the file, or to the log."""
        text = self.summary()
        if not text:
            return
        if self.filename is None:
            rank_zero_info(text)
            return
        path = self._file(".txt")
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def teardown(self, stage: str | None) -> None:
        """A run is over, however it ended."""

    def _file(self, ending: str) -> str:
        """Path of a file of the report, in a directory that is there: ``<stage>-<filename>-<rank><ending>``.

        Without what is not known, and without rank 0.
        """
        directory = os.fspath(self.dirpath or self._log_dir or ".")
        os.makedirs(directory, exist_ok=True)
        parts = [self._stage, self.filename, None if not self.local_rank else str(self.local_rank)]
        return os.path.join(directory, "-".join(part for part in parts if part) + ending)

    def _heading(self) -> str:
        return f"{self._stage.upper()} " if self._stage else ""


class PassThroughProfiler(Profiler):
    """Profiles nothing, and costs a run nothing: what a trainer has that was given no profiler."""

    active = False
