"""Starts runs of a training, stops them at exact moments by signals, and reads what they left."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from holdfast.checkpoint import catalog
from holdfast.checkpoint.load import load

HERE = Path(__file__).parent
STOPPED = 143
INTERRUPTED = 130


class Warm:
    """One process with everything imported; each run is a copy of it, and costs no imports."""

    def __init__(self, preload: str | None = None) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(HERE / "warm.py"), str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if preload is not None:
            environment["LD_PRELOAD"] = preload
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        atexit.register(self.close)

    def ask(self, message: dict[str, Any], fds: Iterable[int] = ()) -> int:
        socket.send_fds(self.connection, [json.dumps(message).encode()], list(fds))
        return int(self.connection.recv(64))

    def close(self) -> None:
        self.connection.close()
        self.process.wait()


@functools.cache
def warm(preload: str | None = None) -> Warm:
    return Warm(preload)


class Life:
    """One start of a training, or of another program of these tests, until it ends.

    Args:
        root: where it writes; its log is beside it.
        program: the module whose `main` is run.
        command: start an interpreter for it, as a user does, and not a copy of a warm one.
        environment: further variables.
        preload: a library that is loaded before all others.
        options: what the program is told.

    Attributes:
        lines: what it said on stdout, in words.
        facts: what it said there after the word "fact", as JSON.
        code: how it ended: the exit code, or the negative number of a signal.
        log: what it said on stderr.
    """

    def __init__(
        self,
        root: Path,
        program: str = "preempted_child",
        *,
        command: bool = False,
        environment: Any = None,
        preload: str | None = None,
        **options: Any,
    ) -> None:
        self.root = root
        self.lines: list[list[str]] = []
        self.facts: list[Any] = []
        self.code: int | None = None
        self.log = ""
        root.mkdir(exist_ok=True)
        ours, theirs = os.pipe(), os.pipe()
        self._log: IO[str] = (root.parent / f"{root.name}.log").open("w+")
        fds = (ours[0], theirs[1], self._log.fileno())
        around = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        if command:
            child = [sys.executable, str(HERE / f"{program}.py"), str(root), json.dumps(options)]
            self._process = subprocess.Popen(
                child, stdin=fds[0], stdout=fds[1], stderr=fds[2], env=around, start_new_session=True
            )
            self.pid = self._process.pid
        else:
            asked = {"program": program, "root": str(root), "options": options}
            self._warm = warm(preload)
            self.pid = self._warm.ask({**asked, "environment": around, "directory": os.getcwd()}, fds)
        os.close(ours[0]), os.close(theirs[1])
        self._stdin, self._stdout = ours[1], os.fdopen(theirs[0])

    # -- while it lives --------------------------------------------------------------------------------------

    def reach(self, moment: str) -> Life:
        """Read on until it waits at ``moment``."""
        return self.hear("at", moment)

    def hear(self, *words: str) -> Life:
        """Read on until it says something that begins with these words."""
        while self._read():
            if self.lines[-1][: len(words)] == list(words):
                return self
        raise AssertionError(f"ended before it said {words}: {self.lines}\n{self.end().log}")

    def _read(self) -> bool:
        line = self._stdout.readline()
        if line:
            self.lines.append(line.split())
        if line.startswith("fact "):
            self.facts.append(json.loads(line[len("fact ") :]))
        return bool(line)

    def kill(self) -> Life:
        """SIGKILL, wherever it is."""
        os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def send(self, *signals: signal.Signals, group: bool = False) -> Life:
        """Send it signals where it waits, each when its handler for the one before has run."""
        moment = self.lines[-1][1]
        for index, number in enumerate(signals):
            if index:
                self._tell("again")
                self.reach(moment)
            (os.killpg if group else os.kill)(self.pid, number)
        return self

    def go(self) -> Life:
        """Let it go on, unless a signal has ended it where it waits."""
        with contextlib.suppress(BrokenPipeError):
            self._tell("go")
        return self

    def _tell(self, word: str) -> None:
        os.write(self._stdin, f"{word}\n".encode())

    def end(self) -> Life:
        """Read what it says until it, and all that it started, has closed its stdout; then how it ended."""
        if self.code is None:
            while self._read():
                pass
            if self._process is not None:
                self.code = self._process.wait()
            else:
                self.code = os.waitstatus_to_exitcode(self._warm.ask({"wait": self.pid}))
            self._log.seek(0)
            self.log = self._log.read()
            self._log.close(), self._stdout.close(), os.close(self._stdin)
        return self

    # -- what it said ----------------------------------------------------------------------------------------

    def said(self, word: str) -> list[list[str]]:
        return [line[1:] for line in self.lines if line[0] == word]

    @property
    def first_step(self) -> int:
        return int(self.said("started")[0][0])

    @property
    def resumed_from(self) -> str | None:
        path = self.said("started")[0][1]
        return None if path == "None" else path

    @property
    def steps(self) -> list[list[str]]:
        """The number and the loss of each batch whose hooks had run."""
        return self.said("step")

    @property
    def last_step(self) -> int:
        return int(self.steps[-1][0]) if self.steps else self.first_step

    @property
    def done(self) -> bool:
        return self.lines[-1][0] == "done"

    @property
    def workers(self) -> list[int]:
        """The processes that had been started for loaders when it waited last."""
        return [int(word) for word in self.said("workers")[-1]]


def stop(root: Path, moment: str, *signals: signal.Signals, group: bool = False, **options: Any) -> Life:
    """Start the training, send it the signals when it has reached ``moment``, and see how it ends."""
    life = Life(root, pause=[moment], **options)
    return life.reach(moment).send(*signals, group=group).go().end()


def finish(root: Path, **options: Any) -> Life:
    """Start the training and let it end by itself."""
    life = Life(root, **options).end()
    assert life.code == 0 and life.done, life.log
    return life


# -- what it left ------------------------------------------------------------------------------------------------


def stopped_file(root: Path, name: str = "stopped.ckpt") -> Path:
    (path,) = root.rglob(name)
    return path


def stopped_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("stopped*.ckpt"))


def assert_all_verified(root: Path, *, tidy: bool = True) -> None:
    """Every file under a final name is whole, every byte as it was written, and nothing half done is left.

    Not ``tidy``: what a next start removes may be left.
    """
    for path in sorted(root.rglob("*.ckpt")):
        load(path)  # raises, naming the file, for a torn or changed one
    assert not tidy or list(root.rglob("*.tmp")) == []


def assert_stopped(life: Life, step: int, code: int = STOPPED) -> None:
    """It left with ``code``; all that it had trained, ``step`` steps, is in an exact file that is verified."""
    assert (life.code, life.last_step) == (code, step), life.log
    assert_all_verified(life.root)
    assert stopped_files(life.root) == ["stopped.ckpt"]
    path = stopped_file(life.root)
    summary = catalog.read_summary(path)
    assert (summary.step, summary.values["exact"], summary.values["kind"]) == (step, True, "full")
    assert load(path)["global_step"] == step
    assert "Traceback" not in life.log


def assert_one_run(reference: Life, lives: list[Life]) -> None:
    """Each life began where the one before had ended, and together they are the run that never stopped."""
    for before, after in itertools.pairwise(lives):
        assert after.first_step == before.last_step
    assert [step for life in lives for step in life.steps] == reference.steps
    assert_same_end(reference.root, lives[-1].root)


def assert_same_end(reference: Path, root: Path) -> None:
    """Weights, logs and the set of files kept, in one version directory, are those of the other run."""
    weights, expected = torch.load(root / "final.pt"), torch.load(reference / "final.pt")
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not weights[name].equal(expected[name])] == []
    assert files(root) == files(reference)
    (mine,), (theirs,) = root.rglob("metrics.csv"), reference.rglob("metrics.csv")
    assert mine.read_bytes() == theirs.read_bytes()


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def assert_no_workers_left(life: Life) -> None:
    """There were workers, and none of them outlived the run."""
    assert life.workers
    assert [pid for pid in life.workers if is_alive(pid)] == []


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
