"""A disk that refuses a save: the older files stay, nothing half done stays, the error says all, and saving goes on.

What is refused comes from below Python, by a library that is loaded before the C library, or it is real: a full
or read-only file system, a directory of somebody else's, a limit of the process.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disk
import pytest
from lives import Life

SAVERS = ["foreground", "background", "Checkpointer"]
ERRORS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EIO: "Input/output error",
    errno.EACCES: "Permission denied",
}
ADVICE = {
    errno.ENOSPC: r"([\d,]+ bytes are needed, )?[\d,]+ bytes are free: make room, or save somewhere else\.",
    errno.EDQUOT: r"Free some of your quota, or save somewhere else\.",
    errno.EIO: r"The disk reports errors: look at the system's log before relying on this file system\.",
    errno.EACCES: r"Check the permissions of the directory\.",
}
# What the call is for, in the words of the message.
CALLS = {
    "create": "create a file beside",
    "write": "write",
    "fsync": "fsync",
    "rename": "rename a file to",
    "dirfsync": "fsync the directory of",
}


def look(root: Path, do: str, **options: Any) -> Life:
    """Run a function of saving_child; skip where this place does not permit what it needs."""
    root.mkdir(exist_ok=True)
    life = Life(root, "saving_child", do=do, **options).end()
    assert life.code == 0, life.log
    if "not_permitted" in life.facts[-1]:
        pytest.skip(f"no mounts of its own here: {life.facts[-1]['not_permitted']}")
    return life


@pytest.fixture
def library() -> str:
    made = disk.library()
    if made is None:
        pytest.skip("no C compiler here")
    return made


def path_of(saver: str, root: Path, number: int) -> str:
    return str(root / (f"step={number:08d}.ckpt" if saver == "Checkpointer" else "a.ckpt"))


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    "call, passes",
    [("create", 0), ("write", 0), ("write", 3 << 20), ("fsync", 0), ("rename", 0), ("dirfsync", 0)],
)
def test_refused(tmp_path: Path, library: str, saver: str, call: str, passes: int) -> None:
    root = tmp_path / "run"
    options = {"saver": saver, "call": call, "passes": passes, "errors": list(ERRORS)}
    life = look(root, "refused", preload=library, **options)
    *rounds, last = life.facts
    for number, (code, said) in enumerate(zip(ERRORS, rounds, strict=True), 1):
        failure, before, after = said["failure"], said["before"], said["after"]
        path = path_of(saver, root, 2 * number)
        assert (failure["type"], failure["errno"], failure["path"]) == ("StorageError", code, path)
        state = "" if saver == "Checkpointer" else r"What was there before is untouched\. "
        if call == "dirfsync":
            state = r"The new file is in place, but may not survive a power failure\. "
        expected = f"Could not {CALLS[call]} {re.escape(path)}: {ERRORS[code]}\\. {state}{ADVICE[code]}"
        assert re.fullmatch(expected, failure["message"]), failure["message"]
        if call == "write":
            assert (code == errno.ENOSPC) == ("bytes are needed" in failure["message"])
        assert "commit.py" in failure["files"], "the traceback leads to where it was met"
        # A new file that could not be made certain stays: it is whole, and may be all there is.
        stays = {os.path.basename(path): 2 * number} if call == "dirfsync" else {}
        assert after == before | stays
        assert None not in after.values(), "nothing half done is left"
    assert set(last["end"].values()) >= {2 * len(ERRORS) + 1}, "once the disk is well, saving goes on"


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    "mount, fill", [("size=15m", "bytes"), ("size=40m,nr_inodes=12", "entries")], ids=["bytes", "entries"]
)
def test_a_full_disk(tmp_path: Path, saver: str, mount: str, fill: str) -> None:
    """The file system is full for real: no bytes, or no entries for files, are left."""
    root = tmp_path / "run"
    life = look(root, "on_a_small_disk", saver=saver, mount=mount, fill=fill)
    said, last = life.facts
    failure, path = said["failure"], path_of(saver, root / "disk", 2)
    assert (failure["type"], failure["errno"], failure["path"]) == ("StorageError", errno.ENOSPC, path)
    state = "" if saver == "Checkpointer" else "What was there before is untouched. "
    operation = "write" if fill == "bytes" else "create a file beside"
    start = f"Could not {operation} {path}: No space left on device. {state}"
    assert failure["message"].startswith(start), failure["message"]
    rest = failure["message"].removeprefix(start)
    if fill == "bytes":
        match = re.fullmatch(
            r"([\d,]+) bytes are needed, ([\d,]+) bytes are free: make room, or save somewhere else\.", rest
        )
        assert match, rest
        needed, free = (int(number.replace(",", "")) for number in match.groups())
        assert 4 << 20 < needed < 5 << 20 and free < 2 << 20
    else:
        free_bytes = f"{said['free']:,}"
        assert rest == (
            f"No file can be added, although {free_bytes} bytes are free: "
            "delete files that are no longer needed, or save somewhere else."
        )
    assert said["after"] == said["before"]
    assert 3 in last["end"].values(), "once there is room, saving goes on"


@pytest.mark.parametrize("saver", SAVERS)
def test_a_read_only_file_system(tmp_path: Path, saver: str) -> None:
    root = tmp_path / "run"
    said, last = look(root, "on_a_read_only_disk", saver=saver).facts
    path = path_of(saver, root, 2)
    state = "" if saver == "Checkpointer" else "What was there before is untouched. "
    assert said["failure"]["message"] == (
        f"Could not create a file beside {path}: Read-only file system. {state}"
        "Choose a directory on a file system that can be written."
    )
    assert said["after"] == said["before"] and 3 in last["end"].values()


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that any user can get to."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_directory_of_somebody_elses(open_place: Path, saver: str) -> None:
    root = open_place / "run"
    (said,) = look(root, "as_nobody", saver=saver).facts
    path = path_of(saver, root, 2)
    state = "" if saver == "Checkpointer" else "What was there before is untouched. "
    assert said["failure"]["message"] == (
        f"Could not create a file beside {path}: Permission denied. {state}"
        "Check the permissions of the directory."
    )
    assert said["after"] == said["before"]


@pytest.mark.parametrize("saver", SAVERS)
def test_a_file_larger_than_may_be_written(tmp_path: Path, saver: str) -> None:
    root = tmp_path / "run"
    said, last = look(root, "too_large", saver=saver).facts
    path = path_of(saver, root, 1)
    assert said["failure"]["message"] == (
        f"Could not write {path}: File too large. "
        "The file system, or a limit of this process (ulimit -f), allows no file of this size."
    )
    assert said["after"] == {}
    assert 2 in last["end"].values()


def test_200_saves_leave_memory_files_and_threads_as_they_were(tmp_path: Path) -> None:
    """What is used after the first saves is all that is ever used, and closing gives it back."""
    life = look(tmp_path / "run", "many")
    early, *later, closed = life.facts
    assert [said["number"] for said in (early, *later)] == [50, 100, 150, 200]
    for said in later:
        assert said["anonymous_bytes"] - early["anonymous_bytes"] < 10 << 20, "less than half a state"
        assert (said["files"], said["threads"]) == (early["files"], early["threads"])
    assert closed["threads"] == 1
