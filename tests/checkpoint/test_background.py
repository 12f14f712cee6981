"""Saves that go on in the background: one at a time, finished at exit, harmless to children, honest about errors."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moments import equal, holds

from holdfast.checkpoint.catalog import read_summary
from holdfast.checkpoint.engine import CheckpointEngine, PendingSave
from holdfast.checkpoint.load import load
from holdfast.errors import StorageError


class Disk:
    """The disk, which writes when it is let and fails when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.reached = threading.Event()
        self.failures = 0
        self.written: list[str] = []
        pwritev = os.pwritev

        def write(fd: int, *rest: Any) -> int:
            self.reached.set()
            self.goes_on.wait()
            self.written.append(os.readlink(f"/proc/self/fd/{fd}"))
            if self.failures:
                self.failures -= 1
                raise OSError(5, "Input/output error")
            return pwritev(fd, *rest)

        monkeypatch.setattr(os, "pwritev", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.goes_on.set()


@pytest.fixture
def engine(disk: Disk) -> Iterator[CheckpointEngine]:
    engine = CheckpointEngine()
    yield engine
    disk.goes_on.set()
    engine.close()


def state(number: int = 0) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((3000,), float(number))}


class TestOneInFlight:
    def test_the_call_returns_before_the_file_is_there(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        disk.goes_on.clear()
        pending = engine.save_in_background(
            {**state(3), "step": lambda: None},
            tmp_path / "deep" / "a.ckpt",
            names=[tmp_path / "last.ckpt"],
            summary={"step": 3},
        )
        assert not pending.ended and not (tmp_path / "deep" / "a.ckpt").exists()
        assert pending.path == str(tmp_path / "deep" / "a.ckpt") and pending.names == (
            str(tmp_path / "last.ckpt"),
        )
        assert [where for where, _ in pending.omissions] == ["step"]
        disk.goes_on.set()
        report = pending.wait()
        assert pending.ended and report.background and report.attempts == 1
        assert report.path == pending.path and report.names == pending.names
        assert report.links in [("hard link",), ("reflink",)] and report.omissions == pending.omissions
        assert report.size_bytes == os.path.getsize(pending.path)
        assert report.blocked_s == pending.blocked_s > 0
        assert report.durable_s > report.write_s > 0 and report.queued_s < report.durable_s
        assert read_summary(pending.names[0]).step == 3
        assert holds(tmp_path / "deep" / "a.ckpt", state(3))

    def test_a_disk_slower_than_the_interval_makes_the_next_save_wait(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits = []
        wait = CheckpointEngine.wait

        def wait_and_let_the_disk_go_on(self: CheckpointEngine) -> None:
            waits.append(len(list(tmp_path.glob(".*.tmp"))))
            disk.goes_on.set()
            wait(self)

        monkeypatch.setattr(CheckpointEngine, "wait", wait_and_let_the_disk_go_on)
        pendings = []
        for number in range(4):
            pendings.append(engine.save_in_background(state(number), tmp_path / f"{number}.ckpt"))
            disk.reached.wait()
            disk.reached.clear()
            disk.goes_on.clear()
        disk.goes_on.set()
        reports = [pending.wait() for pending in pendings]
        assert max(waits) <= 1, "more than one file was being written"
        order = list(dict.fromkeys(disk.written))
        assert len(order) == 4 and disk.written == sorted(disk.written, key=order.index), "files were mixed"
        for number, report in enumerate(reports):
            assert 0 <= report.queued_s <= report.blocked_s
            assert holds(tmp_path / f"{number}.ckpt", state(number))
        assert reports[1].queued_s > 0

    def test_a_save_in_the_foreground_waits_for_the_one_in_flight(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        disk.goes_on.clear()
        first = engine.save_in_background(state(1), tmp_path / "a.ckpt")
        ends: list[str] = []
        opener = threading.Thread(target=lambda: (disk.reached.wait(), disk.goes_on.set()))
        opener.start()
        report = engine.save(state(2), tmp_path / "a.ckpt")
        opener.join()
        assert first.ended and not ends
        assert report.queued_s > 0 and report.blocked_s == report.durable_s > report.queued_s
        assert not report.background and holds(tmp_path / "a.ckpt", state(2))

    def test_an_engine_that_is_let_go_of_finishes_what_is_in_flight(self, disk: Disk, tmp_path: Path) -> None:
        disk.goes_on.clear()
        large = torch.randn(1 << 20)
        moment = {"large": large.clone()}
        pending = CheckpointEngine().save_in_background({"large": large}, tmp_path / "a.ckpt")
        large.zero_()
        gc.collect()
        disk.goes_on.set()
        pending.wait()
        assert holds(tmp_path / "a.ckpt", moment)

    def test_two_hundred_saves_of_two_structures_leave_nothing_behind(
        self, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        tensors = [torch.randn(1 << 16) for _ in range(24)]

        def save(number: int) -> None:
            some = tensors if number % 3 else tensors[:8]
            engine.save_in_background({"tensors": some, "number": number}, tmp_path / "a.ckpt", late=some)
            for tensor in tensors:
                engine.wait_for_copy()
                tensor += 1

        def used() -> tuple[int, int, int]:
            engine.wait()
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            return resident, threading.active_count(), len(os.listdir("/proc/self/fd"))

        for number in range(20):
            save(number)
        before = used()
        for number in range(180):
            save(number)
        after = used()
        assert after[0] - before[0] < 3 << 20 and after[1:] == before[1:]
        assert engine._arena.size_bytes < 1.05 * sum(4 * tensor.numel() for tensor in tensors)
        assert equal(load(tmp_path / "a.ckpt")["tensors"], [tensor - 1 for tensor in tensors])


class TestErrors:
    def test_wait_raises_what_the_disk_said_with_its_traceback_and_what_was_there_stays(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        engine.save(state(1), tmp_path / "a.ckpt")
        disk.failures = 1
        held = state(2)
        alive = weakref.ref(held["weights"])
        pending = engine.save_in_background(held, tmp_path / "a.ckpt", late=[held["weights"]])
        engine.wait_for_copy()
        for _ in range(2):
            with pytest.raises(StorageError) as failed:
                pending.wait()
        assert str(failed.value) == (
            f"Could not write {tmp_path / 'a.ckpt'}: Input/output error. What was there before is untouched. "
            "The disk reports errors: look at the system's log before relying on this file system."
        )
        assert "in writev_all" in "".join(traceback.format_exception(failed.value))
        assert holds(tmp_path / "a.ckpt", state(1)) and not list(tmp_path.glob(".*"))
        del held
        gc.collect()
        assert alive() is None, "the error keeps the payload"
        engine.wait()  # it has ended, which is all that this says
        engine.save_in_background(state(3), tmp_path / "a.ckpt").wait()
        assert holds(tmp_path / "a.ckpt", state(3))

    def test_each_attempt_is_a_new_file_written_from_the_same_moment(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        large = torch.randn(1 << 20)
        moment = {"large": large.clone(), **state(1)}
        disk.failures = 2
        pending = engine.save_in_background({"large": large, **state(1)}, tmp_path / "a.ckpt", attempts=3)
        large.zero_()
        assert pending.wait().attempts == 3
        assert len(set(disk.written)) == 3
        assert holds(tmp_path / "a.ckpt", moment) and not list(tmp_path.glob(".*"))

    def test_after_the_last_attempt_it_has_failed(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        disk.failures = 9
        pending = engine.save_in_background(state(1), tmp_path / "a.ckpt", attempts=3)
        with pytest.raises(StorageError):
            pending.wait()
        assert disk.failures == 6 and not list(tmp_path.iterdir())

    def test_an_interrupt_while_waiting_leaves_the_engine_usable(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Whoever runs the tests in the background has it ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.interrupt(disk, engine, tmp_path, monkeypatch)
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("begun", [False, True])
    def test_an_interrupt_while_the_thread_begins_loses_nothing(
        self, begun: bool, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin = threading.Thread.start

        def interrupted(thread: threading.Thread) -> None:
            if thread.name != "holdfast-save" or begun:
                begin(thread)
            if thread.name == "holdfast-save":
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threading.Thread, "start", interrupted)
            engine.save_in_background(state(1), tmp_path / "1.ckpt")
        # Else this would never return.
        assert engine._pending is not None and engine._pending._told.wait(20)
        engine.wait()
        assert holds(tmp_path / "1.ckpt", state(1))
        engine.save_in_background(state(2), tmp_path / "1.ckpt").wait()
        assert holds(tmp_path / "1.ckpt", state(2))

    @staticmethod
    def interrupt(
        disk: Disk, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk.goes_on.clear()
        first = engine.save_in_background(state(1), tmp_path / "1.ckpt")
        wait = CheckpointEngine.wait

        def interrupted(self: CheckpointEngine) -> None:
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
            wait(self)

        for call in (
            lambda: engine.save_in_background(state(2), tmp_path / "2.ckpt"),
            lambda: engine.save(state(2), tmp_path / "2.ckpt"),
            engine.close,
        ):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(CheckpointEngine, "wait", interrupted)
                call()
        disk.goes_on.set()
        engine.save_in_background(state(3), tmp_path / "3.ckpt").wait()
        first.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1.ckpt", "3.ckpt"]
        assert holds(tmp_path / "1.ckpt", state(1)) and holds(tmp_path / "3.ckpt", state(3))


class TestOnEnd:
    def test_it_is_called_in_the_background_once_all_is_durable_or_has_failed(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        seen: list[Any] = []

        def on_end(pending: PendingSave) -> None:
            ended = pending.ended and threading.current_thread() is not threading.main_thread()
            engine.wait()
            try:
                seen.append((ended, pending.wait().size_bytes == os.path.getsize(pending.path)))
            except StorageError as error:
                seen.append((ended, error))

        engine.save_in_background(state(1), tmp_path / "a.ckpt", on_end=on_end).wait()
        disk.failures = 1
        failed = engine.save_in_background(state(2), tmp_path / "b.ckpt", on_end=on_end)
        with pytest.raises(StorageError) as error:
            failed.wait()
        assert seen == [(True, True), (True, error.value)]

    def test_what_it_raises_is_raised_by_wait_and_nothing_is_lost(
        self, disk: Disk, engine: CheckpointEngine, tmp_path: Path
    ) -> None:
        def on_end(pending: PendingSave) -> None:
            raise LookupError("whom to tell?")

        pending = engine.save_in_background(state(1), tmp_path / "a.ckpt", on_end=on_end)
        with pytest.raises(LookupError, match=r"^whom to tell\?$"):
            pending.wait()
        assert pending.ended and holds(tmp_path / "a.ckpt", state(1))
        disk.failures = 1
        pending = engine.save_in_background(state(2), tmp_path / "a.ckpt", on_end=on_end)
        with pytest.raises(StorageError) as failed:
            pending.wait()
        assert "LookupError: whom to tell?" in "".join(traceback.format_exception(failed.value))
        engine.save_in_background(state(3), tmp_path / "a.ckpt").wait()
        assert holds(tmp_path / "a.ckpt", state(3))

    def test_it_must_not_save(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        def on_end(pending: PendingSave) -> None:
            engine.save(state(2), tmp_path / "b.ckpt")

        pending = engine.save_in_background(state(1), tmp_path / "a.ckpt", on_end=on_end)
        with pytest.raises(RuntimeError) as refused:
            pending.wait()
        assert str(refused.value) == (
            "An on_end callback must not save: it would wait for itself. Note what is to be done there, and save "
            "where training calls from."
        )
        assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


GATED = """
import os, sys, threading, torch
from pathlib import Path
from torch.optim.optimizer import _global_optimizer_pre_hooks
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.errors import StorageError

goes_on, reached, pwritev = threading.Event(), threading.Event(), os.pwritev
def write(*args):
    reached.set()
    goes_on.wait()
    return pwritev(*args)
os.pwritev = write
sys.excepthook = lambda *error: (goes_on.set(), sys.__excepthook__(*error))  # or it would wait at its end
path = sys.argv[1]
tensor = torch.arange(1 << 19)
"""

EXITING = """
def open_when_the_main_thread_has_ended():
    threading.main_thread().join()
    print("the main thread has ended", flush=True)
    goes_on.set()

engine = CheckpointEngine()
engine.save_in_background({"tensor": tensor}, path, late=[tensor], on_end=lambda save: print(save.wait().size_bytes))
reached.wait()
assert not Path(path).exists()
threading.Thread(target=open_when_the_main_thread_has_ended, daemon=True).start()
sys.exit(3)
"""

FORKING = """
engine = CheckpointEngine()
engine.prepare(1 << 24)
for _ in range(2):  # so that the third is copied late
    goes_on.set()
    engine.save_in_background({"tensor": tensor}, path, late=[tensor]).wait()
    engine.wait_for_copy()
goes_on.clear()
reached.clear()
pending = engine.save_in_background({"tensor": tensor, "third": True}, path, late=[tensor])
assert engine.copying
reached.wait()

def in_the_child():
    open_here = [os.readlink(f"/dev/fd/{fd}") for fd in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{fd}")]
    assert not any(name.endswith(".tmp") for name in open_here), open_here
    assert not engine.copying and pending.ended
    try:
        pending.wait()
    except StorageError as error:
        told = f"{path} is being saved by the process that forked this one: wait for it there."
        assert str(error) == told, error
    global goes_on
    goes_on = threading.Event()
    goes_on.set()
    assert _global_optimizer_pre_hooks
    for hook in _global_optimizer_pre_hooks.values():
        hook(None, (), {})  # as a step calls them
    engine.wait()
    engine.save({"child": 1}, path + ".child")
    engine.save_in_background({"child": tensor}, path + ".child").wait()
    engine.close()

child = os.fork()
if child == 0:
    in_the_child()
    sys.exit(7)  # as any interpreter ends, waiting for its threads
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

loader = torch.utils.data.DataLoader(range(8), num_workers=2, persistent_workers=True)
assert len(list(loader)) == 8
del loader
assert not pending.ended
engine.wait_for_copy()
tensor += 1
goes_on.set()
print(pending.wait().size_bytes)
engine.close()
"""


def run_child(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", GATED + script, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_save_in_flight_is_finished_when_the_interpreter_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    done = run_child(EXITING, path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"the main thread has ended\n{path.stat().st_size}\n"
    assert holds(path, {"tensor": torch.arange(1 << 19)})


def test_children_begin_anew_and_leave_a_save_in_flight_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    done = run_child(FORKING, path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert holds(path, {"tensor": torch.arange(1 << 19), "third": True})
    assert load(f"{path}.child")["child"].shape == (1 << 19,)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.child"]
