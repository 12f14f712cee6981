"""Making a file durable, or leaving everything as it was: the only place that renames over a file.

A file is written under a temporary name beside its target, with a lock held on it, fsynced, renamed over the
target, and the directory is fsynced. Until the rename the old file stands; after it the new one does; nothing
else is ever under the final name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence

from holdfast.checkpoint import directories, open_files
from holdfast.checkpoint.directories import crash_point as crash_point
from holdfast.checkpoint.directories import fsync_directory as fsync_directory
from holdfast.checkpoint.directories import is_temporary as is_temporary
from holdfast.errors import StorageError

_FICLONE = 0x40049409


class Replacement:
    """A file on its way to its final name.

    Attributes:
        fd: where to write; the file has no content yet.
        needed_bytes: how long the file will be, once the writer knows: for the message if the disk fills.
    """

    def __init__(self, path: str, temporary: str, fd: int) -> None:
        self.path = path
        self.temporary = temporary
        self.fd = fd
        self.needed_bytes: int | None = None


@contextlib.contextmanager
def replacing(path: str) -> Iterator[Replacement]:
    """Write a file that takes the place of ``path`` when the block ends, durably; or not at all.

    Blocks: until the file and its directory are on disk.
    On return: ``path`` is the new file. On an error, or if the process is killed, ``path`` is what it was.

    Raises:
        StorageError: with the path, the operation, the reason and what to do.
    """
    path = os.path.abspath(path)
    directory = os.path.dirname(path)
    make_directories(directory)
    if directory not in _swept:
        _swept.add(directory)
        with contextlib.suppress(StorageError):  # saving matters more; what is wrong is met again below
            remove_stray_temp_files(directory)
    with _told(path, "create a file beside"):
        directories.check_replaceable(path)
        temporary, fd = create_temporary(path)
    replacement = Replacement(path, temporary, fd)
    old: int | None = None
    try:
        open_files.not_for_children.add(fd)
        crash_point("temp-created")
        with _told(path, "write", replacement):
            yield replacement
        crash_point("written")
        with _told(path, "fsync", replacement):
            os.fsync(fd)
        crash_point("synced")
        old = open_files.held(path)
        with _told(path, "rename a file to"):
            before = directories.replace(temporary, path)
        temporary = ""
        crash_point("renamed")
        with _told(path, "fsync the directory of", in_place=True):
            fsync_directory(directory)
        crash_point("directory-synced")
        if before is not None:  # a directory stood there
            with contextlib.suppress(OSError):
                directories.discard(before)
    finally:
        # In this order: while the lock is held, nobody else takes the file for a stray one.
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        open_files.close(fd)
        if old is not None:
            open_files.close_in_background(old)


def check_room(replacement: Replacement) -> None:
    """Refuse to begin a file that the file system has no room for, as far as that can be known before.

    Raises:
        StorageError: as for a disk that fills; nothing was written.
    """
    try:
        free = free_bytes(replacement.path)
    except OSError:
        return
    if replacement.needed_bytes is not None and free < replacement.needed_bytes:
        raise storage_error(
            replacement.path, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), replacement
        )


def add_name(path: str, name: str, *, symlink: bool = True) -> str:
    """Put the content of ``path`` under a second name as well, for 0 bytes where the file system can.

    Of a directory, `directories.add_name` says how. For a file it tries a reflink, a hard link, a relative
    symlink, then a copy; returns which one it was. The name changes over at once, like a rename. Files that
    share an inode are made read-only, because writing into one of them would change the other; saving over
    either name is safe.

    Args:
        path: the file.
        name: its further name.
        symlink: False copies rather than symlinks: such a name has to outlive the file's first one.

    Blocks: until the new name is on disk.

    Raises:
        StorageError: with the path, the operation, the reason and what to do.
    """
    path, name = os.path.abspath(path), os.path.abspath(name)
    if path == name:
        return "same"
    make_directories(os.path.dirname(name))
    with _told(name, "link"):
        if os.path.isdir(path):
            return directories.add_name(path, name)
        directories.check_replaceable(name)
        if not os.path.islink(name) and os.path.exists(name) and os.path.samefile(path, name):
            # rename() onto the same inode does nothing and leaves the temporary name behind.
            return "same"
        with open(path, "rb") as source:
            # A hard link shares the lock: nobody takes it for a stray file before it has its name.
            with contextlib.suppress(OSError):
                fcntl.flock(source, fcntl.LOCK_SH | fcntl.LOCK_NB)
            kind = _link(path, name, source.fileno(), symlink)
        crash_point("link-renamed")
    with _told(name, "fsync the directory of", in_place=True):
        fsync_directory(os.path.dirname(name))
    crash_point("link-synced")
    return kind


def _link(path: str, name: str, source: int, symlink: bool, attempts: int = 2) -> str:
    kind, temporary = _linked_temporary(path, name, source, symlink)
    try:
        crash_point("link-made")
        before = directories.replace(temporary, name)
        if before is not None:
            fsync_directory(os.path.dirname(name))
            directories.discard(before)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, FileNotFoundError) and attempts > 1:
            # A symlink has no lock, so another run that tidies up may have taken it for a stray one.
            return _link(path, name, source, symlink, attempts - 1)
        raise
    return kind


def _linked_temporary(path: str, name: str, source: int, symlink: bool) -> tuple[str, str]:
    temporary, fd = create_temporary(name)
    try:
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _FICLONE, source)
            os.fsync(fd)
            return "reflink", temporary
        os.unlink(temporary)
        with contextlib.suppress(OSError):
            os.link(path, temporary, follow_symlinks=True)
            os.chmod(temporary, os.fstat(source).st_mode & 0o555)
            return "hard link", temporary
        if symlink:
            with contextlib.suppress(OSError):
                os.symlink(os.path.relpath(path, os.path.dirname(name)), temporary)
                return "symlink", temporary
    finally:
        os.close(fd)
    return "copy", _copied_temporary(path, name)


def _copied_temporary(path: str, name: str) -> str:
    temporary, fd = create_temporary(name)
    try:
        with open(path, "rb") as source:
            while chunk := source.read(8 << 20):
                write_all(fd, chunk)
        os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of it at the file's position; a short write goes on where it stopped."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def writev_all(fd: int, parts: Sequence[bytes | memoryview], at: int) -> int:
    """Write the parts one after the other from offset ``at``; return the offset after them."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    while views:
        written = os.pwritev(fd, views[:512], at)
        at += written
        done = 0
        while done < len(views) and written >= views[done].nbytes:
            written -= views[done].nbytes
            done += 1
        del views[:done]
        if written:
            views[0] = views[0][written:]
    return at


def make_directories(directory: str) -> None:
    """Make a directory and its parents; each one that was made is on disk when this returns.

    Raises:
        StorageError: with the directory and the reason.
    """
    missing = []
    at = directory
    while not os.path.isdir(at) and os.path.dirname(at) != at:
        missing.append(at)
        at = os.path.dirname(at)
    for path in reversed(missing):
        with _told(path, "create the directory"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, "a file of that name is in the way")
            fsync_directory(os.path.dirname(path))


_swept: set[str] = set()
"""Directories that this process has rid of what killed ones left there."""


def remove_stray_temp_files(directory: str | os.PathLike[str]) -> list[str]:
    """Remove temporary files that a killed process left behind; return their names.

    A file whose lock is held by a living process stays.

    Raises:
        StorageError: if the directory cannot be read, or the disk fails.
    """
    top = os.fspath(directory)
    removed = []
    try:
        for name in sorted(os.listdir(top)):
            if is_temporary(name) and remove_if_stray(os.path.join(top, name)):
                removed.append(name)
            final = directories.name_aside(name)
            if final is not None and os.path.lexists(os.path.join(top, final)):
                fsync_directory(top)  # what took its place is there to stay
                directories.check_replaceable(os.path.join(top, name))
                directories.discard(os.path.join(top, name))
                removed.append(name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(top, "clean the directory", error) from error
    return removed


def remove_if_stray(path: str) -> bool:
    """Remove a temporary file that no process holds; return whether it was removed.

    One that cannot be told apart from a file in use (no locks here, or another user's file) stays.
    """
    try:
        if os.path.islink(path):  # on its way to a name; it holds nothing, and is made again if it is missed
            os.unlink(path)
            return True
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                directories.discard_stray(path)
            else:
                os.unlink(path)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _NOT_STRAY:
            raise
        return False
    return True


_NOT_STRAY = (
    errno.EWOULDBLOCK, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP,
    errno.ELOOP, errno.EISDIR,
)  # fmt: skip


def create_temporary(path: str) -> tuple[str, int]:
    """Make an empty temporary file for ``path``, locked as long as it is open; return its path and where."""
    while True:
        temporary = directories.temporary_name(path)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            # Without locks a cleaner cannot take it either, so it is never mistaken for a stray file.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                os.close(fd)
                os.unlink(temporary)
                raise
        if os.fstat(fd).st_nlink:
            return temporary, fd
        # Another process that tidies up took it between its making and its lock.
        os.close(fd)


_ADVICE = {
    errno.EACCES: "Check the permissions of the directory.",
    errno.EPERM: "Check the permissions of the directory.",
    errno.EROFS: "Choose a directory on a file system that can be written.",
    errno.EISDIR: "Choose another name: a directory has this one.",
    errno.ENOTDIR: "Choose another directory.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EIO: "The disk reports errors: look at the system's log before relying on this file system.",
    errno.EDQUOT: "Free some of your quota, or save somewhere else.",
    errno.EFBIG: "The file system, or a limit of this process (ulimit -f), allows no file of this size.",
}


@contextlib.contextmanager
def _told(
    path: str, operation: str, replacement: Replacement | None = None, *, in_place: bool = False
) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, operation, error, replacement, in_place=in_place) from error


def storage_error(
    path: str,
    operation: str,
    error: OSError,
    replacement: Replacement | None = None,
    *,
    in_place: bool = False,
) -> StorageError:
    """The error for a failed operation: what failed, where, why, what is there now and what to do.

    ``in_place`` says that the new file already stands under its name.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    advice = _ADVICE.get(error.errno or 0, "It is safe to try again.")
    if error.errno == errno.ENOSPC:
        known = replacement is not None and replacement.needed_bytes is not None
        needed = f"{replacement.needed_bytes:,} bytes are needed, " if replacement and known else ""
        free = f"{free_bytes(path):,} bytes are free"
        advice = f"{needed}{free}: make room, or save somewhere else."
        if replacement is None and _lacks_entries(path):
            advice = (
                f"No file can be added, although {free}: "
                "delete files that are no longer needed, or save somewhere else."
            )
    state = ""
    if in_place:
        state = "The new file is in place, but may not survive a power failure. "
    elif _exists(path):
        state = "What was there before is untouched. "
    made = StorageError(f"Could not {operation} {path}: {reason}. {state}{advice}", path=path)
    made.errno = error.errno
    return made


def _exists(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode) or directories.is_sharded(path)
    except OSError:
        return False


def free_bytes(path: str) -> int:
    """How much this user may still write to the file system of a path, whose directory need not be there."""
    usage = _usage(path)
    # Root may use what the file system keeps back.
    return (usage.f_bfree if os.geteuid() == 0 else usage.f_bavail) * usage.f_frsize


def _lacks_entries(path: str) -> bool:
    """Whether the file system has a fixed number of files (inodes), and all of them are taken."""
    usage = _usage(path)
    return usage.f_files > 0 and usage.f_favail == 0


def _usage(path: str) -> os.statvfs_result:
    directory = os.path.dirname(path)
    while not os.path.isdir(directory) and os.path.dirname(directory) != directory:
        directory = os.path.dirname(directory)
    return os.statvfs(directory)
