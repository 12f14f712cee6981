"""Disks that refuse: by a library below Python, or for real, as a mount that only one process sees."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_disk.c")
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_numbers = itertools.count()


@functools.cache
def library() -> str | None:
    """The library of failing_disk.c, for LD_PRELOAD; None where nothing can compile it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    place = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, place)
    made = os.path.join(place, "failing_disk.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, str(SOURCE), "-ldl"], check=True)
    return made


def refuse(call: str, number: int, path: Path, *, passes: int = 0, fails: int = -1) -> None:
    """In a process with that library: let calls on what lies under ``path`` fail with this errno.

    Args:
        call: create, write, fsync, dirfsync, rename or link.
        number: the errno.
        path: how the paths begin.
        passes: how many calls (of write: bytes) come through before.
        fails: how many then fail; -1 for all.
    """
    asked = f"{next(_numbers)}:{call}:{number}:{passes}:{fails}:{path}"
    os.environ["HOLDFAST_TEST_DISK"] = asked


def accept() -> None:
    """End what `refuse` began."""
    os.environ.pop("HOLDFAST_TEST_DISK", None)


class NotPermitted(Exception):
    """This place does not let a process have mounts of its own."""


def own_mounts() -> None:
    """Let nobody else see what this process mounts.

    Raises:
        NotPermitted: saying what was refused.
    """
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | (0 if user == 0 else _CLONE_NEWUSER)
    _call("unshare", flags)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)


def mount_memory(place: Path, options: str) -> None:
    """Mount a file system in memory at ``place``, as large as ``options`` say.

    Raises:
        NotPermitted: saying what was refused.
    """
    place.mkdir(exist_ok=True)
    _call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", 0, options.encode())


def mount_read_only(place: Path) -> None:
    """Make what lies under ``place`` impossible to change for this process.

    Raises:
        NotPermitted: saying what was refused.
    """
    name = os.fsencode(place)
    _call("mount", name, name, None, _MS_BIND, None)
    _call("mount", name, name, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY, None)


def unmount(place: Path) -> None:
    """Take the last mount at ``place`` away."""
    _call("umount", os.fsencode(place))


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)) != 0:
        raise NotPermitted(f"{name}: {os.strerror(ctypes.get_errno())}")
