"""Processes that save without a trainer: killed, refused by the disk, or held up by it.

OPTIONS["do"] names the function below that is run; what is to be known of it is said as facts.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import torch
from child import say

from holdfast.checkpoint import commit
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load

LARGE = 1 << 20  # numbers of 4 bytes in the largest tensor


def state(number: int, large: int = LARGE) -> dict[str, Any]:
    small = [torch.full((9,), float(number)) for _ in range(50)]
    return {"number": number, "large": torch.full((large,), float(number)), "small": small}


def number_in(path: Path) -> int:
    """Which state a file holds; every byte of it is checked, and every value is of that state."""
    held = load(path)
    held = held.get("state", held)
    number = held["number"]
    assert all(bool((tensor == number).all()) for tensor in [held["large"], *held["small"]])
    return int(number)


def inventory(folder: Path) -> dict[str, int | None]:
    """Every file below, and the number of the state in it; None for what is not under a final name."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return {
        str(path.relative_to(folder)): None if commit.is_temporary(path.name) else number_in(path)
        for path in paths
    }


def fact(**said: Any) -> None:
    say("fact", json.dumps(said))


# -- the ways to save --------------------------------------------------------------------------------------------


class Foreground:
    """One file, saved over and over, with a second name."""

    def __init__(self, folder: Path, *, background: bool = False) -> None:
        self.folder = folder
        self.background = background
        self.engine = CheckpointEngine()

    def save(self, number: int) -> Any:
        """Return when it is durable."""
        where: Any = {"path": self.folder / "a.ckpt", "names": [self.folder / "last.ckpt"]}
        if self.background:
            return self.engine.save_in_background(state(number), **where).wait()
        return self.engine.save(state(number), **where)


class Background(Foreground):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, background=True)


class ByCheckpointer:
    """A file for each step."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from holdfast.checkpointer import Checkpointer

        self.checkpointer = Checkpointer(folder, **options)

    def save(self, number: int) -> Any:
        self.checkpointer.save(number, {"state": state(number)})
        self.checkpointer.wait()


SAVERS: dict[str, Callable[[Path], Any]] = {
    "foreground": Foreground,
    "background": Background,
    "Checkpointer": ByCheckpointer,
}


# -- what a process does -----------------------------------------------------------------------------------------


def killed(root: Path, options: dict[str, Any]) -> None:
    """Save, and be killed at OPTIONS["point"] of it, if it comes by there."""
    engine = CheckpointEngine()

    def save(number: int, name: str) -> None:
        value, path, names = state(number, 3 * LARGE), root / name, [root / "last.ckpt"]
        if options["background"]:
            engine.save_in_background(value, path, names=names).wait()
        else:
            engine.save(value, path, names=names)

    if options["over"]:
        save(1, "epoch=1.ckpt")
    os.environ["HOLDFAST_CRASH_AT"] = options["point"]
    save(2, "epoch=1.ckpt" if options["over"] else "new/epoch=2.ckpt")
    engine.close()


def refused(root: Path, options: dict[str, Any]) -> None:
    """Save over an older file while the disk refuses, with one error after the other; then for good."""
    saver = SAVERS[options["saver"]](root)
    number = 0
    for error in options["errors"]:
        number += 2
        saver.save(number - 1)
        before = inventory(root)
        disk.refuse(options["call"], error, root, passes=options["passes"])
        failure = failure_of(lambda number=number: saver.save(number))  # type: ignore[misc]
        disk.accept()
        fact(before=before, after=inventory(root), failure=failure)
    saver.save(number + 1)
    fact(end=inventory(root))


def failure_of(call: Callable[[], Any]) -> dict[str, Any] | None:
    """What a call fails with, as facts."""
    try:
        call()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return {
            "type": type(error).__name__,
            "errno": getattr(error, "errno", None),
            "path": getattr(error, "path", None),
            "message": str(error),
            "files": [os.path.basename(frame.filename) for frame in frames],
        }
    return None


def on_a_small_disk(root: Path, options: dict[str, Any]) -> None:
    """Save where there is room for no more than two states, after somebody else has filled the place."""
    small = root / "disk"
    disk.own_mounts()
    disk.mount_memory(small, options["mount"])
    saver = SAVERS[options["saver"]](small)
    saver.save(1)
    before = inventory(small)
    fill(small, options["fill"])
    failure = failure_of(lambda: saver.save(2))
    fact(free=free_bytes(small), failure=failure, before=before, after=inventory_without_filler(small))
    for path in small.glob("filler*"):
        path.unlink()
    saver.save(3)
    fact(end=inventory(small))


def fill(place: Path, what: str) -> None:
    """Take all the bytes of a file system, or all its file entries."""
    try:
        for number in range(1 << 20):
            with open(place / f"filler-{number}", "wb", buffering=0) as file:
                while what == "bytes":
                    file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def inventory_without_filler(folder: Path) -> dict[str, int | None]:
    for path in folder.glob("filler*"):
        assert path.stat().st_size % 4096 == 0
    names = [path.name for path in folder.iterdir() if not path.name.startswith("filler")]
    return {name: None if commit.is_temporary(name) else number_in(folder / name) for name in sorted(names)}


def free_bytes(place: Path) -> int:
    usage = os.statvfs(place)
    return usage.f_bavail * usage.f_frsize


def on_a_read_only_disk(root: Path, options: dict[str, Any]) -> None:
    saver = SAVERS[options["saver"]](root)
    saver.save(1)
    before = inventory(root)
    disk.own_mounts()
    disk.mount_read_only(root)
    failure = failure_of(lambda: saver.save(2))
    fact(failure=failure, before=before, after=inventory(root))
    disk.unmount(root)
    saver.save(3)
    fact(end=inventory(root))


def as_nobody(root: Path, options: dict[str, Any]) -> None:
    """Save as a user whom the directory does not belong to, and to whom root is no help."""
    saver = SAVERS[options["saver"]](root)
    saver.save(1)
    before = inventory(root)
    root.chmod(0o555)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 0)
        os.setresuid(65534, 65534, 0)
    failure = failure_of(lambda: saver.save(2))
    fact(failure=failure, before=before, after=inventory(root))


def too_large(root: Path, options: dict[str, Any]) -> None:
    """Save a file that is larger than this process may write."""
    import resource

    saver = SAVERS[options["saver"]](root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * LARGE, resource.RLIM_INFINITY))
    failure = failure_of(lambda: saver.save(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    fact(failure=failure, after=inventory(root))
    saver.save(2)
    fact(end=inventory(root))


def many(root: Path, options: dict[str, Any]) -> None:
    """Save 200 times in the background, and say now and then what the process uses."""
    engine = CheckpointEngine()
    held = {"large": torch.zeros(5 * LARGE), "small": [torch.zeros(9) for _ in range(50)]}
    for number in range(1, 201):
        held["large"] += 1
        pending = engine.save_in_background({**held, "number": number}, root / f"{number % 2}.ckpt")
        if number % 50 == 0:
            pending.wait()
            fact(number=number, **used())
    engine.close()
    fact(number="closed", **used())


def used() -> dict[str, int]:
    """What this process has: resident memory of its own in bytes, open files, threads."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous_bytes = int(status["RssAnon"].split()[0]) * 1024
    return {
        "anonymous_bytes": anonymous_bytes,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def slowly(root: Path, options: dict[str, Any]) -> None:
    """Save in the background, one after the other, to a disk that takes each file when a line on stdin says so."""
    engine, under_way = CheckpointEngine(), threading.Semaphore(1)
    sync = os.fsync

    def held_up(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            alone = under_way.acquire(blocking=False)
            files = sorted(path.name for path in root.iterdir() if commit.is_temporary(path.name))
            fact(alone=alone, temporary=len(files), now=time.monotonic(), **used())
            input()
            fact(let_go=time.monotonic())
            under_way.release()
        sync(fd)

    os.fsync = held_up
    held = {"large": torch.zeros(5 * LARGE), "small": [torch.zeros(9)]}
    for number in range(1, int(options["saves"]) + 1):
        held["large"] += 1
        held["small"][0] += 1
        say("asks", number)
        pending = engine.save_in_background({**held, "number": number}, root / f"{number % 2}.ckpt")
        say("goes on", number)
    fact(queued_s=pending.wait().queued_s)
    engine.close()


def hold_a_save(root: Path, options: dict[str, Any]) -> None:
    """Wait in the middle of a save for a line on stdin."""

    def held(point: str) -> None:
        if point == "synced":
            say("holding", *os.listdir(root))
            input()

    commit.crash_point = held
    saver = SAVERS[options["saver"]](root)
    saver.save(int(options["number"]))
    fact(end=inventory(root))


def save(root: Path, options: dict[str, Any]) -> None:
    """Save one state after the other; by a Checkpointer, after going on from the newest."""
    saver = SAVERS[options["saver"]](root)
    if options["saver"] == "Checkpointer":
        fact(restored=saver.checkpointer.restore({"state": state(0)}))
    for number in options["numbers"]:
        saver.save(number)


def main(root: Path, options: dict[str, Any]) -> None:
    signal.alarm(100)  # ends a process that hangs, and with it the test that waits for it
    torch.set_num_threads(1)
    try:
        globals()[options["do"]](root, options)
    except disk.NotPermitted as error:
        fact(not_permitted=str(error))
    say("done")
