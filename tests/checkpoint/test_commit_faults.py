"""A disk that refuses at any step: the old file stays, nothing half-written stays, the error says what to do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import commit, direct
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.errors import StorageError

OLD, NEW = {"w": torch.zeros(1000)}, {"w": torch.ones(1000)}


def failing(number: int, after: int = 0) -> Any:
    """A function that raises this errno, once it has been called ``after`` times."""
    calls = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return None

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["pwritev", "fsync", "replace", "open"])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save(OLD, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(StorageError) as caught:
            CheckpointEngine().save(NEW, path)
    assert caught.value.errno == number
    assert caught.value.path == str(path)
    assert os.strerror(number) in str(caught.value)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert load(path)["w"].sum() == 0


def test_messages_name_the_path_the_operation_the_reason_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    monkeypatch.setattr(commit, "free_bytes", lambda path: 12_345)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(errno.ENOSPC))
        with pytest.raises(StorageError) as full:
            CheckpointEngine().save(NEW, path)
    start = f"Could not write {path}: No space left on device. "
    assert str(full.value).startswith(start)
    needed, _, rest = str(full.value).removeprefix(start).partition(" ")
    assert 4_000 <= int(needed.replace(",", "")) < 6_000
    assert rest == "bytes are needed, 12,345 bytes are free: make room, or save somewhere else."

    CheckpointEngine().save(OLD, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError) as broken:
            CheckpointEngine().save(NEW, path)
    assert str(broken.value) == (
        f"Could not fsync {path}: Input/output error. What was there before is untouched. "
        "The disk reports errors: look at the system's log before relying on this file system."
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(errno.EACCES))
        with pytest.raises(StorageError) as refused:
            CheckpointEngine().save(NEW, path)
    assert str(refused.value) == (
        f"Could not rename a file to {path}: Permission denied. What was there before is untouched. "
        "Check the permissions of the directory."
    )


def test_the_directory_is_fsynced_after_the_rename_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, after=1))
    with pytest.raises(StorageError) as caught:
        CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert str(caught.value) == (
        f"Could not fsync the directory of {tmp_path}/a.ckpt: Input/output error. "
        "The new file is in place, but may not survive a power failure. "
        "The disk reports errors: look at the system's log before relying on this file system."
    )
    monkeypatch.undo()
    assert load(tmp_path / "a.ckpt")["w"].sum() == 1000


def test_a_failed_fsync_is_never_tried_again_on_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError):
        CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert len(calls) == 1


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: whole(fd, [bytes(parts[0][:777])], at))
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt")["w"].sum() == 1000


def test_new_parents_are_made_and_each_is_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(commit, "fsync_directory", synced.append)
    CheckpointEngine().save(NEW, tmp_path / "x" / "y" / "a.ckpt")
    assert synced == [str(tmp_path), str(tmp_path / "x"), str(tmp_path / "x" / "y")]


def test_a_name_that_is_taken_by_a_directory_or_lies_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(StorageError) as caught:
        CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert str(caught.value) == (
        f"Could not create a file beside {tmp_path}/a.ckpt: Is a directory. "
        "Choose another name: a directory has this one."
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        CheckpointEngine().save(NEW, tmp_path / "file" / "a.ckpt")
    assert str(caught.value) == (
        f"Could not create the directory {tmp_path}/file: Not a directory. "
        "What was there before is untouched. Choose another directory."
    )


def test_the_temporary_directory_of_the_system_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    CheckpointEngine().save(NEW, tmp_path / "run" / "a.ckpt")
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["a.ckpt"]


def test_a_file_that_was_replaced_is_given_back_to_the_disk(tmp_path: Path) -> None:
    """A large one in the background: to free its blocks takes longer than all that makes the new one durable."""
    path = tmp_path / "a.ckpt"
    with open(path, "wb") as large:
        large.truncate(1 << 30)
    CheckpointEngine().save(NEW, path)
    for thread in threading.enumerate():
        if thread.name == "holdfast-free":
            thread.join()
    assert load(path)["w"].sum() == 1000
    assert open_under(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_made_by_fork_keeps_no_file_of_a_save_open(tmp_path: Path) -> None:
    """Loader workers live long: a checkpoint that they held open would take up disk space after its deletion."""
    with commit.replacing(str(tmp_path / "a.ckpt")) as file:
        writer = direct.BlockWriter(file.fd, threads=0)
        assert len(open_under(tmp_path)) == 2
        child = os.fork()
        if child == 0:
            os._exit(len(open_under(tmp_path)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        writer.close()
        assert open_under(tmp_path) == [file.temporary]
    assert open_under(tmp_path) == []


def open_under(folder: Path) -> list[str]:
    """The files there that this process has open, deleted ones too."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(f"{folder}/")]


def test_a_read_only_file_is_replaced(tmp_path: Path) -> None:
    CheckpointEngine().save(OLD, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").chmod(0o444)
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt")["w"].sum() == 1000


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + ".ckpt")
    CheckpointEngine().save(NEW, path)
    assert os.listdir(tmp_path) == [path.name]


def test_stray_files_go_and_files_that_are_being_written_stay(tmp_path: Path) -> None:
    strays = [".a.ckpt.123.0a1b2c3d.tmp", ".b.ckpt.99999999.0a1b2c3d.tmp"]
    others = [".hidden.tmp", "a.tmp", ".a.ckpt.xyz.0a1b2c3d.tmp", "a.ckpt.123.0a1b2c3d.tmp"]
    with commit.replacing(str(tmp_path / "a.ckpt")) as file:
        writing = os.path.basename(file.temporary)
        (tmp_path / strays[0]).write_bytes(b"half")
        (tmp_path / strays[1]).symlink_to("nowhere")
        for name in others:
            (tmp_path / name).write_bytes(b"the user's")
        assert sorted(commit.remove_stray_temp_files(tmp_path)) == strays
        assert sorted(os.listdir(tmp_path)) == sorted([*others, writing])
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.ckpt"])
    assert commit.remove_stray_temp_files(tmp_path / "nowhere") == []


def test_a_processs_first_write_into_a_directory_clears_what_killed_ones_left_there(tmp_path: Path) -> None:
    (tmp_path / ".a.ckpt.123.0a1b2c3d.tmp").write_bytes(b"half")
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_temporary_file_that_cannot_be_judged_stays_and_saving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / ".a.ckpt.123.0a1b2c3d.tmp"
    theirs.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == [theirs.name, "a.ckpt"]


def test_a_second_name_on_its_way_is_not_taken_for_a_stray_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    removed: list[str] = []

    def cleaner(point: str) -> None:
        if point == "link-made":
            removed.extend(commit.remove_stray_temp_files(tmp_path))

    monkeypatch.setattr(commit, "crash_point", cleaner)
    commit.add_name(str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"))
    assert removed == []
    assert load(tmp_path / "b.ckpt")["w"].sum() == 1000


def test_a_file_system_without_locks_still_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    monkeypatch.undo()
    assert load(tmp_path / "a.ckpt")["w"].sum() == 1000


def test_a_cleaner_that_is_quicker_than_the_lock_costs_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not taken:
            taken.extend(name for name in os.listdir(tmp_path) if commit.is_temporary(name))
            for name in taken:
                os.unlink(tmp_path / name)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    CheckpointEngine().save(NEW, tmp_path / "a.ckpt")
    assert len(taken) == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert load(tmp_path / "a.ckpt")["w"].sum() == 1000
