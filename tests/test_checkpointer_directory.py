"""Whose files are whose: what is deleted and written over, over restarts and with others in the directory."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import commit
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.retention import KeepBest, KeepEvery, KeepLast, KeepNewer
from holdfast.checkpointer import Checkpointer
from holdfast.errors import StorageError


def name(step: int) -> str:
    return f"step={step:08d}.ckpt"


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def steps(directory: Path) -> list[int]:
    """The steps in the plain names."""
    return [int(one[5:13]) for one in names(directory) if one == name(int(one[5:13]))]


def save(checkpointer: Checkpointer, *numbers: int, **metrics: float) -> None:
    for step in numbers:
        checkpointer.save(step, {"epoch": step, "w": torch.full((3,), float(step))}, metrics)
        checkpointer.wait()


def restored(directory: Path, **arguments: Any) -> Checkpointer:
    checkpointer = Checkpointer(directory, **arguments)
    checkpointer.restore({"epoch": 0, "w": torch.zeros(3)}, path=arguments.pop("path", None))
    return checkpointer


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(one.message) for one in caught]


# -- what goes ---------------------------------------------------------------------------------------------------


def test_the_last_ones_stay(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        save(checkpointer, 1, 2, 3, 4)
        assert [entry.step for entry in checkpointer.checkpoints] == [3, 4]
    assert steps(tmp_path) == [3, 4]


def test_policies_together(tmp_path: Path) -> None:
    policy = KeepBest(1, "loss") | KeepEvery(4) | KeepLast(1)
    with Checkpointer(tmp_path, keep=policy) as checkpointer:
        for step, loss in enumerate((5.0, 1.0, 3.0, 4.0, 2.0, 9.0), 1):
            save(checkpointer, step, loss=loss)
    assert steps(tmp_path) == [2, 4, 6]


def test_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with Checkpointer(tmp_path, keep=KeepNewer(timedelta(hours=1))) as checkpointer:
        for step, minutes in ((1, 0), (2, 30), (3, 70), (4, 300)):
            monkeypatch.setattr(time, "time", lambda at=now + 60 * minutes: at)
            save(checkpointer, step)
            if step == 3:
                assert steps(tmp_path) == [2, 3]
    assert steps(tmp_path) == [4]


def test_nothing_goes_before_the_newer_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def refuse(source: Any, target: Any, **more: Any) -> None:
        if str(target).endswith(name(2)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **more)

    monkeypatch.setattr(os, "replace", refuse)
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 1)
    with pytest.raises(StorageError):
        save(checkpointer, 2)
    assert steps(tmp_path) == [1]
    save(checkpointer, 3)
    assert steps(tmp_path) == [3]
    checkpointer.close()


def test_a_file_that_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def refuse(path: Any, **more: Any) -> None:
        if str(path).endswith(name(1)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 1)
        with told() as messages:
            save(checkpointer, 2, 3)
    assert messages == [
        f"{tmp_path}/{name(1)} should have made way for a newer checkpoint, but could not be deleted: Permission "
        "denied. Delete it yourself."
    ]
    assert steps(tmp_path) == [1, 3]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    """Other names, other programs' files, copies under new names, and one that took the place of ours."""
    CheckpointEngine().save({"a": 1}, tmp_path / "epoch=0-step=1.ckpt", summary={"step": 1})
    CheckpointEngine().save({"a": 1}, tmp_path / name(0), summary={"step": 0})
    torch.save({"a": 1}, tmp_path / "last.ckpt")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step=00000099.ckpt").mkdir()
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 1, 2)
        shutil.copy(tmp_path / name(2), tmp_path / "copy.ckpt")
        save(checkpointer, 3)
        CheckpointEngine().save({"a": 1}, tmp_path / name(3), summary={"step": 3})
        save(checkpointer, 4)
        os.unlink(tmp_path / name(4))
        save(checkpointer, 5)
    assert names(tmp_path) == [
        "copy.ckpt", "epoch=0-step=1.ckpt", "last.ckpt", "notes.txt", name(0), name(3), name(5), name(99),
    ]  # fmt: skip
    assert load(tmp_path / name(3)) == {"a": 1}
    assert load(tmp_path / "copy.ckpt")["epoch"] == 2


def test_a_name_that_somebody_else_has_is_not_written_over(tmp_path: Path) -> None:
    CheckpointEngine().save({"a": 1}, tmp_path / name(1), summary={"step": 1})
    with Checkpointer(tmp_path) as checkpointer:
        path = checkpointer.save(1, {"epoch": 7})
    assert path is not None
    assert path.startswith(f"{tmp_path}/step=00000001-")
    assert load(tmp_path / name(1)) == {"a": 1}
    assert load(path)["epoch"] == 7
    state = {"epoch": 0}
    assert Checkpointer(tmp_path).restore(state) == 1
    assert state["epoch"] == 7


def test_a_second_name_costs_nothing_and_survives_the_first(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 1)
        kind = commit.add_name(str(tmp_path / name(1)), str(tmp_path / "paper.ckpt"))
        assert kind in ("reflink", "hard link")
        assert kind == "reflink" or (tmp_path / "paper.ckpt").samefile(tmp_path / name(1))
        checkpointer.save(1, {"epoch": 100}, force=True)  # over the first name
        assert load(tmp_path / "paper.ckpt")["epoch"] == 1
        save(checkpointer, 2)  # and away with it
    assert names(tmp_path) == ["paper.ckpt", name(2)]
    assert load(tmp_path / "paper.ckpt")["epoch"] == 1


# -- over restarts -----------------------------------------------------------------------------------------------


def test_a_restarted_run_takes_over_its_own_files(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=KeepBest(1, "loss") | KeepLast(2)) as checkpointer:
        for step, loss in ((1, 0.1), (2, 0.9), (3, 0.8)):
            save(checkpointer, step, loss=loss)
    with restored(tmp_path, keep=KeepBest(1, "loss") | KeepLast(2)) as checkpointer:
        save(checkpointer, 4, loss=0.5)
        assert steps(tmp_path) == [1, 3, 4]
        best = checkpointer.best
        assert best is not None
        assert best.step == 1
        save(checkpointer, 5, loss=0.05)
    assert steps(tmp_path) == [4, 5]


def test_what_is_lived_again_is_written_over(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        save(checkpointer, 1, 2, 3)
    os.truncate(tmp_path / name(3), 100)
    with told() as messages, restored(tmp_path, keep=None) as checkpointer:
        save(checkpointer, 3)
    assert len(messages) == 1
    # The broken file says nothing of whose it is, so it is left to the user.
    assert [one for one in names(tmp_path) if not one.startswith("step=00000003-")] == [
        name(1),
        name(2),
        name(3),
    ]
    os.unlink(tmp_path / name(3))
    state = {"epoch": 0, "w": torch.zeros(3)}
    assert Checkpointer(tmp_path).restore(state) == 3


def test_without_restore_a_run_starts_beside_the_old_files_and_says_so(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 1)
    with told() as messages, Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"epoch": 50})
        checkpointer.save(2, {"epoch": 51})
    assert messages == [
        f"{tmp_path} has checkpoints (the newest is {name(1)}), and this run was not restored from any of them: "
        "it starts anew beside them, and they stay as they are. To go on from the newest, call restore(state) "
        "before the first save."
    ]
    assert names(tmp_path) == [name(1), name(2)]
    assert load(tmp_path / name(1))["epoch"] == 1
    state = {"epoch": 0}
    assert Checkpointer(tmp_path).restore(state) == 2
    assert state["epoch"] == 51


def test_going_back_by_a_path_leaves_what_came_after(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        save(checkpointer, 1, 2, 3)
    state = {"epoch": 0, "w": torch.zeros(3)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.restore(state, path=tmp_path / name(1)) == 1
        for step in (2, 3, 4):
            checkpointer.save(step, {"epoch": 10 * step})
    assert names(tmp_path) == [name(1), name(2), name(3), name(4)]
    assert [load(tmp_path / name(step))["epoch"] for step in (1, 2, 3, 4)] == [1, 2, 3, 40]
    found: dict[str, Any] = {"epoch": 0}
    assert Checkpointer(tmp_path).restore(found) == 4


def test_the_file_gone_on_from_by_its_path_stays(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        save(checkpointer, 1, 2)
    state = {"epoch": 0, "w": torch.zeros(3)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.restore(state, path=tmp_path / name(2))
        save(checkpointer, 3, 4)
    assert steps(tmp_path) == [2, 4]  # it is the newest of its run, which goes on: 1 has gone


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        save(checkpointer, 1, 2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    with restored(tmp_path, keep=2) as checkpointer:
        save(checkpointer, 3)
        assert steps(tmp_path) == [2, 3]
        assert checkpointer.newest is not None
        assert checkpointer.newest.step == 3
    state = {"epoch": 0, "w": torch.zeros(3)}
    assert Checkpointer(tmp_path).restore(state) == 3


def test_a_damaged_file_takes_no_place_of_a_good_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        save(checkpointer, 1, 2, 3)
    data = bytearray((tmp_path / name(3)).read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / name(3)).write_bytes(data)
    with told() as messages, restored(tmp_path, keep=2) as checkpointer:
        checkpointer.save(2, {"epoch": 2}, force=True)
        checkpointer.wait()
        assert steps(tmp_path) == [1, 2, 3]  # the good 1 is one of the last two; 3 is for the user to look at
        save(checkpointer, 3)
        assert steps(tmp_path) == [2, 3]  # written over when the run got there again
    assert len(messages) == 1
    assert load(tmp_path / name(3))["epoch"] == 3


# -- two at a time -----------------------------------------------------------------------------------------------


def guests(directory: Path) -> list[str]:
    return [one for one in names(directory) if one not in {name(step) for step in steps(directory)}]


def test_two_at_a_time_leave_each_others_files_alone(tmp_path: Path) -> None:
    first, second = Checkpointer(tmp_path, keep=1), Checkpointer(tmp_path, keep=1)
    save(first, 1)
    second.restore({"epoch": 0, "w": torch.zeros(3)})
    with told() as messages:
        save(second, 2, 3)
    assert messages == [
        f"Another process, or another Checkpointer of this one, is saving into {tmp_path}. This one uses names "
        "of its own there, and neither touches the other's files. Give each run a directory of its own."
    ]
    save(first, 2, 3)
    assert steps(tmp_path) == [3]
    assert len(guests(tmp_path)) == 1
    first.close()
    save(second, 4)  # alone now
    assert steps(tmp_path) == [3, 4]
    assert guests(tmp_path) == []
    second.close()
    with restored(tmp_path, keep=1) as again:
        save(again, 5)
    assert steps(tmp_path) == [3, 5]


def test_nobody_takes_over_the_run_of_a_living_guest(tmp_path: Path) -> None:
    first, guest = Checkpointer(tmp_path, keep=1), Checkpointer(tmp_path, keep=1)
    save(first, 1)
    guest.restore({"epoch": 0, "w": torch.zeros(3)})
    with told():
        save(guest, 2)
    first.close()
    with restored(tmp_path, keep=1) as restarted:  # from the guest's file, the newest
        save(restarted, 3, 4)
        assert len(guests(tmp_path)) == 1
        assert steps(tmp_path) == [1, 4]
    guest.close()


CHILD = """
import os, sys
from holdfast.checkpointer import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=1)
checkpointer.save(1, {"epoch": 1})
checkpointer.wait()
if sys.argv[2] == "fork" and os.fork() == 0:
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def running(directory: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has saved into the directory, and lives."""
    command = [sys.executable, "-c", CHILD, str(directory), how]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, text=True, **pipes)
    try:
        assert child.stderr is not None
        assert "saved" in child.stderr.readline()
        yield child
    finally:
        child.kill()
        child.communicate()


def test_another_process_holds_the_directory_until_it_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "alone") as child:
        meanwhile = Checkpointer(tmp_path, keep=1)
        meanwhile.restore({"epoch": 0})
        with told() as messages:
            save(meanwhile, 2, 3)
        assert len(messages) == 1
        assert steps(tmp_path) == [1]
        meanwhile.close()
        child.send_signal(signal.SIGKILL)
        child.wait()
        after = Checkpointer(tmp_path, keep=1)
        after.restore({"epoch": 0}, path=tmp_path / name(1))
        save(after, 2)
        assert steps(tmp_path) == [1, 2]
        after.close()


def test_a_worker_that_outlives_a_killed_run_does_not_hold_the_directory(tmp_path: Path) -> None:
    with running(tmp_path, "fork") as child:
        assert child.stdout is not None
        worker = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        child.wait()
        os.kill(worker, 0)  # it lives
        state = {"epoch": 0}
        with Checkpointer(tmp_path, keep=1) as checkpointer:
            assert checkpointer.restore(state) == 1
            save(checkpointer, 2)
        assert names(tmp_path) == [name(2)]
        os.kill(worker, signal.SIGKILL)
