"""Names that a save is going to give, kept from other processes that save into the same directory meanwhile.

A name that is free when a save is planned may be another run's by the time its file is renamed to it. So it
is reserved: by a temporary file for it, as every save has one, that is locked as long as its process lives.
Who wants the name finds that file; whoever finds another's beside its own takes another name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterable

from holdfast.checkpoint import commit, open_files

_held: dict[str, tuple[str, int]] = {}
"""The names that this process has reserved: the temporary file of each, and where it is open."""


def reserving(usable: Callable[[str], bool]) -> Callable[[str], bool]:
    """Make a judgement of names that also reserves the one it finds usable, until `give_up`.

    Where nothing can be reserved (a directory that cannot be written, no locks), it judges and no more.

    Args:
        usable: tells whether a path may be given; of one that is taken, whether it may be written over.
    """

    def check(path: str) -> bool:
        if not usable(path):
            return False
        if path in _held or os.path.lexists(path):
            return True  # nobody takes a name that is there and not his own
        _reserve(path)
        if not _is_anothers(path) and usable(path):
            return True
        give_up([path])
        return False

    return check


def give_up(paths: Iterable[str]) -> None:
    """End the reservation of these names, if there is one: they are given, or won't be."""
    for path in paths:
        temporary, fd = _held.pop(path, ("", -1))
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            open_files.close(fd)


def _reserve(path: str) -> None:
    with contextlib.suppress(OSError):  # what is wrong there the save itself will say
        commit.make_directories(os.path.dirname(path))
        temporary, fd = commit.create_temporary(path)
        open_files.not_for_children.add(fd)
        _held[path] = temporary, fd


def _is_anothers(path: str) -> bool:
    """Whether another process that lives is about to give this name."""
    directory, own = os.path.dirname(path), os.path.basename(_held.get(path, ("", -1))[0])
    beginning = own.rsplit(".", 3)[0]
    try:
        names = os.listdir(directory) if own else []
    except OSError:
        return False
    return any(
        name != own
        and commit.is_temporary(name)
        and name.rsplit(".", 3)[0] == beginning
        and name.rsplit(".", 3)[1] != str(os.getpid())
        and _is_locked(os.path.join(directory, name))
        for name in names
    )


os.register_at_fork(after_in_child=_held.clear)  # they are the parent's


def _is_locked(temporary: str) -> bool:
    try:
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(fd)
    return False
