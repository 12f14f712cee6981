"""A checkpoint that is a directory: put in place, found, given further names and removed, each as one step.

What stands under a name changes over at once, whatever two kinds the old and the new are. Where the file
system cannot exchange two names in one step, the old one is moved aside, to a name that follows from its own,
and whoever finds nothing under the name looks there: until the new one stands, the old one is found.

Nothing is removed but what consists of a checkpoint's files alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
from typing import Any

MANIFEST = "manifest.json"
PAYLOAD = "payload.ckpt"
TENSORS = "tensors.json"
METADATA = ".metadata"

_SHARD = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
_ASIDE = ".holdfast-aside"
_FICLONE = 0x40049409
_EXCHANGE, _HERE = 2, -100  # of renameat2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST)
_PIECE_BYTES = 8 << 20


def crash_point(name: str) -> None:
    """Do nothing, unless a test asked for the process to be killed here."""
    if os.environ.get("HOLDFAST_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


sharded_point = crash_point
"""The same, of what is done to directories alone."""


def fsync_directory(directory: str) -> None:
    """Make the names in a directory durable; file systems that cannot do that for directories are let off."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


# -- names ---------------------------------------------------------------------------------------------------


def is_part(name: str) -> bool:
    """Whether a file of that name may be part of a sharded checkpoint."""
    return name in (MANIFEST, PAYLOAD, TENSORS, METADATA) or is_shard(name)


def is_shard(name: str) -> bool:
    """Whether a file of that name may hold a process's part of the tensors."""
    return _SHARD.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Whether a name is one that a checkpoint has before its final one."""
    parts = name.rsplit(".", 3)
    return (
        len(parts) == 4
        and name.startswith(".")
        and parts[3] == "tmp"
        and parts[1].isdigit()
        and len(parts[2]) == 8
    )


def temporary_name(path: str) -> str:
    """A name beside ``path`` that nothing has."""
    # The name may be as long as the file system allows, so the temporary one holds only its beginning.
    directory, name = os.path.split(path)
    name = os.fsencode(name)[:180].decode("utf-8", "ignore")
    return os.path.join(directory, f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def aside_of(path: str) -> str:
    """Where what stands under a name is while another takes its place, where the two cannot be exchanged."""
    directory, name = os.path.split(os.path.abspath(path))
    return os.path.join(directory, f".{name}{_ASIDE}")


def name_aside(name: str) -> str | None:
    """The name whose `aside_of` this one is; None if it is none."""
    return name[1 : -len(_ASIDE)] if name.startswith(".") and name.endswith(_ASIDE) else None


def standing(path: str) -> str:
    """Where the checkpoint of that name is: there, or aside if a process died while it was being replaced."""
    if not os.path.lexists(path):
        aside = aside_of(path)
        if os.path.lexists(aside):
            return aside
    return path


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether a sharded checkpoint, or what is left of one, is there; its reader tells if it is whole."""
    at = standing(os.fspath(path))
    if not os.path.isdir(at):
        return False
    if any(os.path.lexists(os.path.join(at, name)) for name in (MANIFEST, METADATA, PAYLOAD)):
        return True
    try:
        return any(map(is_shard, os.listdir(at)))
    except OSError:
        return False


def check_replaceable(path: str) -> None:
    """Refuse to do away with a directory that is no checkpoint, or that holds something else as well.

    Raises:
        OSError: it is such a directory.
    """
    if not os.path.islink(path) and os.path.isdir(path) and not (is_sharded(path) and _is_pure(path)):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _is_pure(path: str) -> bool:
    """Whether there is nothing in a directory but files of a checkpoint, and hidden ones."""
    with os.scandir(path) as items:
        return all(
            (is_part(item.name) or item.name.startswith(".")) and not item.is_dir(follow_symlinks=False)
            for item in items
        )


# -- in place, and away --------------------------------------------------------------------------------------


def replace(temporary: str, path: str) -> str | None:
    """Put what is ready under a temporary name under its final one, in place of whatever has that.

    Until it stands, what stood there before is found. Returns where the latter is now, for `discard` once
    the directory is on disk; None if that is nothing, or a file that is gone.

    Raises:
        OSError: the file system refuses, or what stands there is a directory of something else.
    """
    aside = aside_of(path)
    while True:
        try:
            os.replace(temporary, path)
            return aside if os.path.lexists(aside) else None
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
        check_replaceable(path)
        if _exchange(temporary, path):
            return temporary
        if os.path.lexists(aside):  # what has the name now took the place of that
            discard(aside)
        os.rename(path, aside)
        sharded_point("moved-aside")


def _exchange(one: str, other: str) -> bool:
    """Let two names change places in one step; False where the file system cannot."""
    import ctypes

    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), other)


def remove(path: str) -> None:
    """Delete a checkpoint, a file or a directory; whoever reads finds all of it or none.

    Of a link, the link alone goes. What cannot be deleted of a directory once it has lost its name goes with
    the next save into that place.

    Raises:
        FileNotFoundError: there is none.
        OSError: the file system refuses, or it is a directory that holds something else too.
    """
    at = standing(path)
    if os.path.islink(at) or not os.path.isdir(at):
        if at == path and os.path.lexists(aside_of(path)):
            discard(aside_of(path))  # first: it would be found once the name is gone
        os.unlink(at)
        return
    check_replaceable(at)
    if at == path and os.path.lexists(aside_of(path)):
        discard(aside_of(path))
    discard(at)


def discard(path: str) -> None:
    """Delete what is there, file or directory; a directory loses its name before any of its files goes.

    Raises:
        OSError: the file system refuses to take the name away.
    """
    if os.path.islink(path) or not os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    if not is_temporary(os.path.basename(path)):
        nameless = temporary_name(path)
        os.rename(path, nameless)
        fsync_directory(os.path.dirname(os.path.abspath(path)))
        sharded_point("nameless")
        path = nameless
    shutil.rmtree(path, ignore_errors=True)


def create_temporary(path: str) -> tuple[str, int]:
    """Make an empty directory for ``path``, held as long as it is open; return its path and where.

    Raises:
        OSError: the file system refuses.
    """
    while True:
        temporary = temporary_name(path)
        os.mkdir(temporary)
        fd = hold(temporary)
        if fd is not None:
            return temporary, fd


def discard_stray(path: str) -> None:
    """Delete a temporary directory that nobody holds, unless somebody has put something else into it.

    Raises:
        OSError: somebody has.
    """
    if not _is_pure(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    discard(path)


def hold(temporary: str) -> int | None:
    """Hold a temporary directory, so that nobody takes it for a stray one; None if somebody just did.

    Several processes may hold it.

    Raises:
        OSError: there is no such directory, or the file system refuses.
    """
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except OSError as error:
        # Without locks a cleaner cannot have it either.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            os.close(fd)
            raise
    if os.fstat(fd).st_nlink:
        return fd
    os.close(fd)
    return None


# -- further names -------------------------------------------------------------------------------------------


def add_name(path: str, name: str) -> str:
    """Put a sharded checkpoint under a second name as well: a directory of its own, of the same files.

    They are reflinked, hard linked or copied, the first of these that the file system can; returns which.
    To delete either name, or to save over it, leaves the other as it is. Hard links are made read-only,
    because to write into one would change the other.

    Raises:
        OSError: the file system refuses, or a directory of something else has the name.
    """
    if not os.path.islink(name) and os.path.exists(name) and os.path.samefile(path, name):
        return "same"
    check_replaceable(name)
    temporary, fd = create_temporary(name)
    try:
        kind = _fill(path, temporary)
        os.fsync(fd)
        sharded_point("name-filled")
        old = replace(temporary, name)
        temporary = ""
        fsync_directory(os.path.dirname(name))
        if old is not None:
            discard(old)
    finally:
        os.close(fd)
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return kind


def _fill(path: str, temporary: str) -> str:
    source = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    kinds: set[str] = set()
    try:
        for name in sorted(filter(is_part, os.listdir(source)), key=lambda name: (name == MANIFEST, name)):
            kinds.add(_give(source, name, os.path.join(temporary, name), kinds))
    finally:
        os.close(source)
    return next(kind for kind in ("copy", "hard link", "reflink", "same") if kind in {*kinds, "same"})


def _give(directory: int, name: str, to: str, so_far: set[str]) -> str:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not so_far - {"reflink"}:  # what one file refused, the next one would
            with contextlib.suppress(OSError):
                _reflink(source, to)
                return "reflink"
        if "copy" not in so_far:
            with contextlib.suppress(OSError):
                os.link(name, to, src_dir_fd=directory, follow_symlinks=False)
                os.chmod(to, stat.S_IMODE(os.fstat(source).st_mode) & 0o555)
                return "hard link"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(to)
        fd = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb", buffering=0) as file:
            at = 0
            while piece := os.pread(source, _PIECE_BYTES, at):
                at += len(piece)
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) or 0 :]
            os.fsync(fd)
        return "copy"
    finally:
        os.close(source)


def _reflink(source: int, to: str) -> None:
    fd = os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.ioctl(fd, _FICLONE, source)
        os.fsync(fd)
    except BaseException:
        os.unlink(to)
        raise
    finally:
        os.close(fd)
