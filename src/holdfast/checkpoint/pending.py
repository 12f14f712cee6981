"""A save that goes on in the background, as its caller sees it."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from collections.abc import Callable

from holdfast.checkpoint.report import SaveReport
from holdfast.errors import StorageError


class PendingSave:
    """A save that goes on in the background.

    Attributes:
        path: the final name.
        names: further names for the same content.
        omissions: (path, reason) of each value that could not be stored; known at once.
        blocked_s: seconds for which the caller waited.
        waited_s: seconds for which training waited for the rest of the copy, so far.
    """

    def __init__(
        self,
        path: str,
        names: tuple[str, ...],
        omissions: list[tuple[str, str]],
        on_end: Callable[[PendingSave], None] | None,
    ) -> None:
        self.path = path
        self.names = names
        self.omissions = omissions
        self.blocked_s = 0.0
        self.waited_s = 0.0
        self._on_end = on_end
        self._ended = threading.Event()
        self._told = threading.Event()
        self._telling: int | None = None  # the thread that is in on_end
        self._report: SaveReport | None = None
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether it is durable under all its names, or has failed."""
        return self._ended.is_set()

    def wait(self) -> SaveReport:
        """Return when the file is durable under all its names.

        Raises:
            StorageError: the disk refused; with the traceback of where it was met.
            SnapshotChanged: the tensors changed while they were copied. Save again at the next safe point.
            Exception: the file is durable, and ``on_end`` raised this.
        """
        if self._telling != threading.get_ident():
            self._told.wait()
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return dataclasses.replace(self._report, blocked_s=self.blocked_s, waited_s=self.waited_s)

    def _end(self, report: SaveReport | None, error: BaseException | None) -> None:
        if error is not None:
            _let_go(error)
        self._report, self._error = report, error
        self._telling = threading.get_ident()
        self._ended.set()
        try:
            if self._on_end is not None:
                self._on_end(self)
        except BaseException as raised:
            _let_go(raised)
            if self._error is None:
                self._error = raised
            else:  # shown below the error that ended the save
                first = self._error
                while first.__context__ is not None:
                    first = first.__context__
                first.__context__ = raised
        finally:
            self._on_end = None
            self._telling = None
            self._told.set()

    def _left_behind(self) -> None:
        """In a child of the process whose threads write it: nobody here can tell how it ends."""
        if not self._told.is_set():
            self._error = StorageError(
                f"{self.path} is being saved by the process that forked this one: wait for it there.",
                path=self.path,
            )
            self._ended, self._told = threading.Event(), threading.Event()
            self._ended.set()
            self._told.set()


def _let_go(error: BaseException) -> None:
    """Keep the lines of its traceback but not the variables, among them the payload and the snapshot."""
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            rest += [one.__cause__, one.__context__]
