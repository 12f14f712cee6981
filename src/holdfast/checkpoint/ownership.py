"""Which files in a directory are a Checkpointer's own, across all the times its run was killed and restarted.

A run gets an id when it starts fresh. The id is in the summary of each of its files, with the name that the
file was given and a number that counts the saves into the directory. A run that is restarted and goes on
from its newest file keeps the id. Only files of its own id, under the names they were given, are ever deleted
or written over.

Who saves into a directory first holds a lock on it until its process ends. Another one that saves there
meanwhile is a guest: it has an id that nobody takes over, and that is in its files' names. The lock is on the
directory itself, so no file is needed for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint import catalog, commit, directories
from holdfast.checkpoint.catalog import Entry
from holdfast.checkpoint.retention import Policy, judge

KEY = "checkpointer"
_NAME = re.compile(r"step=(\d{8,})(-[0-9a-f]+)?\.ckpt")


@dataclass(frozen=True)
class Owned:
    """A whole file that a Checkpointer wrote, under the name it gave it.

    Attributes:
        entry: what the catalog says of it.
        run: the id of the run that wrote it.
        order: later saves into this directory have greater numbers, whatever the clock says.
        guest: another run was saving there when it was written.
    """

    entry: Entry
    run: str
    order: int
    guest: bool


@dataclass(frozen=True)
class Contents:
    """What a directory holds.

    Attributes:
        owned: whole files of Checkpointers, oldest first.
        broken: files with such a name that are not whole, the one of the highest step first.
        others: all other checkpoints.
    """

    owned: tuple[Owned, ...] = ()
    broken: tuple[Entry, ...] = ()
    others: tuple[Entry, ...] = ()


def new_run_id() -> str:
    """Return an id that no other run has, without touching any generator that training draws from."""
    return os.urandom(8).hex()


def file_name(step: int, run: str | None = None) -> str:
    """``step=00001200.ckpt``; with a run, its id is in the name too."""
    return f"step={step:08d}{'' if run is None else f'-{run[:8]}'}.ckpt"


def step_in(path: str) -> int:
    """The step that a file's name says; -1 if it says none."""
    match = _NAME.fullmatch(os.path.basename(path))
    return int(match[1]) if match else -1


def owned(entry: Entry) -> Owned | None:
    """Tell whose a file is; None unless it is a whole one of a Checkpointer, under the name it was given."""
    said = entry.values.get(KEY)
    if not entry.whole or not isinstance(said, Mapping) or said.get("name") != os.path.basename(entry.path):
        return None
    run, order = said.get("run"), said.get("order")
    if not isinstance(run, str) or not isinstance(order, int):
        return None
    return Owned(entry, run, order, said.get("guest") is True)


def look(directory: str) -> Contents:
    """Read the tails of all checkpoints in a directory; one that isn't there holds nothing.

    Raises:
        StorageError: it cannot be read.
    """
    if not os.path.isdir(directory):
        return Contents()
    mine: list[Owned] = []
    broken: list[Entry] = []
    others: list[Entry] = []
    for entry in catalog.scan(directory):
        found = owned(entry)
        if found is not None:
            mine.append(found)
        elif not entry.whole and not entry.foreign and step_in(entry.path) >= 0:
            broken.append(entry)
        else:
            others.append(entry)
    mine.sort(key=lambda one: (one.order, one.entry.saved_at, one.entry.step or 0, one.entry.path))
    broken.sort(key=lambda entry: step_in(entry.path), reverse=True)
    return Contents(tuple(mine), tuple(broken), tuple(others))


def is_still(one: Owned) -> bool:
    """Whether the file under that name is still the one that was listed."""
    now = owned(catalog.entry(one.entry.path))
    return now is not None and (now.run, now.order) == (one.run, one.order)


class RunFiles:
    """The files that one run has in a directory, and the names and numbers of the next ones.

    Attributes:
        directory: where they are.
        run: the run's id; empty until it is claimed.
        guest: whether another run saves there too.
        files: its own durable files, oldest first.
        protected: paths of files that stay, and keep their content, as long as this process lives.
        damaged: paths of files that were found damaged: they take no place of a good one, and stay until the
            run comes to their names again.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.run = ""
        self.guest = False
        self.files: list[Owned] = []
        self.protected: set[str] = set()
        self.damaged: frozenset[str] = frozenset()
        self._in_the_way: set[str] = set()
        self._lock = DirectoryLock(directory)
        self._order = 0
        self._goes_on: str | None = None
        self._chosen = False

    def go_on_from(self, path: str, contents: Contents, *, explicit: bool) -> None:
        """Take note of the file that the state was restored from: it decides whose run this is.

        The run that wrote it goes on if nothing newer of that run is there. What was saved after it belongs
        to a future that somebody may still want, so going back begins a run of its own.
        """
        path = os.path.abspath(path)
        one = next((one for one in contents.owned if os.path.abspath(one.entry.path) == path), None)
        newer = one is not None and any(o.run == one.run and o.order > one.order for o in contents.owned)
        goes_on = None if one is None or one.guest or (explicit and newer) else one.run
        if explicit:
            self.protected.add(path)
        if goes_on != self.run or self.damaged:
            self.run = ""
        self._goes_on, self._chosen = goes_on, True

    def start_fresh(self) -> None:
        """Take note that there was nothing to restore."""
        self._goes_on, self._chosen = None, True

    def claim(self) -> str | None:
        """Settle whose files in the directory are this run's own; returns what the user should be told.

        Raises:
            StorageError: the directory cannot be made or read.
        """
        if self.run and not self.guest:
            return None
        commit.make_directories(self.directory)
        self.guest = not self._lock.take()
        if self.run:
            return None
        contents = look(self.directory)
        self.run = self._goes_on if self._goes_on and not self.guest else new_run_id()
        mine = [one for one in contents.owned if one.run == self.run]
        self.files = [one for one in mine if one.entry.path not in self.damaged]
        self._in_the_way = {one.entry.path for one in mine} & self.damaged
        self._order = max((one.order for one in contents.owned), default=0)
        if self.guest:
            return (
                f"Another process, or another Checkpointer of this one, is saving into {self.directory}. "
                "This one uses names of its own there, and neither touches the other's files. Give each run "
                "a directory of its own."
            )
        if contents.owned and not self._chosen:
            newest = os.path.basename(contents.owned[-1].entry.path)
            return (
                f"{self.directory} has checkpoints (the newest is {newest}), and this run was not restored "
                "from any of them: it starts anew beside them, and they stay as they are. To go on from the "
                "newest, call restore(state) before the first save."
            )
        return None

    def place(self, step: int) -> tuple[str, dict[str, Any]]:
        """Where the next file goes, over nobody else's, and what its summary says of whose it is."""
        self._order += 1
        path = os.path.join(self.directory, file_name(step))
        own = ({one.entry.path for one in self.files} | self._in_the_way) - self.protected
        if self.guest or (os.path.lexists(path) and path not in own):
            path = os.path.join(self.directory, file_name(step, self.run))
        said = {"run": self.run, "name": os.path.basename(path), "order": self._order, "guest": self.guest}
        return path, {KEY: said}

    def add(self, path: str) -> None:
        """Count a file that is durable now."""
        one = owned(catalog.entry(path))
        if one is not None:
            self.files = [*(other for other in self.files if other.entry.path != path), one]

    def make_way(self, policy: Policy, now: float) -> tuple[list[str], list[str]]:
        """Delete what a policy does not keep; returns the deleted names and what went wrong.

        Args:
            policy: What to keep.
            now: Seconds since 1970.
        """
        deleted: list[str] = []
        problems: list[str] = []
        verdicts = judge(policy, [one.entry for one in self.files], now=now, protected=self.protected)
        kept: list[Owned] = []
        for one, verdict in zip(self.files, verdicts, strict=True):
            if verdict.kept:
                kept.append(one)
            elif is_still(one):  # and not something that somebody has put there, or deleted already
                try:
                    directories.remove(verdict.path)
                    deleted.append(os.path.basename(verdict.path))
                except OSError as error:
                    problems.append(
                        f"{verdict.path} should have made way for a newer checkpoint, but could not be "
                        f"deleted: {error.strerror}. Delete it yourself."
                    )
        self.files = kept
        return deleted, problems

    def release(self) -> None:
        """Let others have the directory."""
        self._lock.release()
        self.run = ""
        if self.files and not self.guest:
            self._goes_on, self._chosen = self.files[-1].run, True


# -- the lock ------------------------------------------------------------------------------------------------


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


class DirectoryLock:
    """Shows other processes that a run saves into a directory; it ends with the process at the latest."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fd: int | None = None

    def take(self) -> bool:
        """Take the lock; False if somebody else has it. Where there are no locks, all is as if nobody had."""
        if self._fd is not None:
            return True
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                os.close(fd)
                return False
        self._fd = fd
        _held.add(self)
        return True

    def release(self) -> None:
        """Give it back."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.release()


def _let_go_in_the_child() -> None:
    # A forked process, such as a loader's worker, may outlive its parent, and would keep the lock.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_the_child)
