"""Opens files in processes of their own, under watch: ``python -m tests.attacks.guard``.

One line in, one line out. Each file is opened by every reader that holdfast has, in a process that was forked for
it, with limits on memory and processor time. Told are how each reader ended, how much memory it took, and
everything that no reader may do: write, start a process, run code, connect, import what the file names.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BOUND_BYTES = 48 << 20
BOUND_TIMES = 600
"""What opening a file may take: so much, and so many times its size. An empty set is one byte in a pickle and 216
in memory, and a listing has a name for each."""
_ADDRESSES_BYTES = 1 << 30  # threads reserve more than they use
_PROCESSOR_S = 20  # a last resort: what takes this long would take for ever

_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.rename", "os.remove",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime",
    "os.putenv", "os.kill", "subprocess.Popen", "pty.spawn", "socket.connect", "socket.bind", "shutil.",
    "tempfile.", "exec", "compile", "ctypes.dlopen", "marshal.", "code.__new__",
    "function.__new__", "sys.setprofile", "sys.settrace", "urllib.Request", "webbrowser.open",
)  # fmt: skip


class Watch:
    """Takes note of what a reader must not do."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._event)

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.seen.append(f"open {path!r} {mode!r}")
        elif event == "import":
            if str(args[0]).startswith(("canary", "antigravity", "this")):
                self.seen.append(f"import {args[0]}")
        elif event in ("exec", "compile", "marshal.loads", "code.__new__") and self._importing():
            pass  # a module of holdfast's own, or of a library, the first time that it is needed
        elif any(event == name or (name[-1] == "." and event.startswith(name)) for name in _FORBIDDEN):
            self.seen.append(f"{event} {str(args)[:200]}")

    def _importing(self) -> bool:
        at: Any = sys._getframe(2)
        while at is not None:
            if at.f_code.co_filename.startswith("<frozen importlib"):
                return True
            at = at.f_back
        return False


def readers() -> dict[str, Callable[[str], Any]]:
    """Everything that opens a checkpoint, by name."""
    from holdfast.checkpoint import catalog
    from holdfast.checkpoint.contents import opened
    from holdfast.checkpoint.inspect import describe
    from holdfast.checkpoint.load import load, load_mapped
    from holdfast.checkpoint.single import load_tensor
    from holdfast.checkpoint.verify import verify

    def inspect(path: str) -> None:
        with opened(path) as contents:
            json.dumps(describe(contents, tensors=True))

    def mapped(path: str) -> None:
        load_mapped(path).release()

    return {
        "load": load,
        "load without a key": lambda path: load(path, skip=["a"]),
        "load_mapped": mapped,
        "load_tensor": lambda path: load_tensor(path, "a"),
        "load_tensor of no name": lambda path: load_tensor(path, "nothing/of/that/name"),
        "verify": verify,
        "inspect": inspect,
        "list": lambda path: catalog.scan(os.path.dirname(path)),
    }


def _dies(path: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


_WRONG: dict[str, Callable[[str], Any]] = {
    "! writes": lambda path: open("canary", "w").close(),
    "! runs": lambda path: os.system("true"),
    "! takes": lambda path: bytearray(BOUND_BYTES + (16 << 20)),
    "! dies": _dies,
    "! fails": lambda path: [][0],
}
"""Readers that do what none may, to try the guard by."""


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    raise AssertionError(name)


def _limit(size_bytes: int) -> None:
    most = _status("VmSize") + _ADDRESSES_BYTES + BOUND_TIMES * size_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_S, _PROCESSOR_S + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def examine(path: str, names: list[str] | None) -> dict[str, Any]:
    """Open one file in this process; returns how each reader ended."""
    from holdfast.errors import HoldfastError

    known = readers()
    watch, ended, took = Watch(), {}, {}
    size_bytes = os.path.getsize(path)
    _limit(size_bytes)
    for name in names or list(known):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew
        before = _status("VmRSS")
        watch.on = True
        try:
            (known.get(name) or _WRONG[name])(path)
            ended[name] = ["", ""]
        except HoldfastError as error:
            ended[name] = [type(error).__name__, str(error)]
        except BaseException as error:
            ended[name] = [f"! {type(error).__name__}", str(error)[:500]]
        watch.on = False
        took[name] = _status("VmHWM") - before
    return {"ended": ended, "took": took, "did": watch.seen, "size_bytes": size_bytes}


def serve() -> None:
    """Answer each line of JSON on stdin with one on stdout."""
    import torch

    import holdfast  # noqa: F401

    torch.set_num_threads(1)
    readers()
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.chdir(job["place"])
            sys.path.insert(0, job["place"])
            with os.fdopen(write, "w") as answer:
                json.dump(examine(job["path"], job.get("readers")), answer)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        told = json.loads(text) if text and code == 0 else {}
        died = "" if code == 0 else signal.Signals(-code).name if code < 0 else f"exit {code}"
        print(json.dumps({"died": died, **told}), flush=True)


class Guard:
    """The other end of `serve`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.guard"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def open(self, path: Path, names: list[str] | None = None) -> dict[str, Any]:
        """Have a file opened; the directory that it lies in is where its process works."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"path": str(path), "place": str(path.parent), "readers": names}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def guarded() -> Iterator[Guard]:
    """A guard for the length of a block."""
    guard = Guard()
    try:
        yield guard
    finally:
        guard.close()


def wrong_with(told: dict[str, Any]) -> list[str]:
    """What a reader must not have done, in words; an empty list if all is well."""
    if told["died"]:
        return [f"it ended the process: {told['died']}"]
    most = BOUND_BYTES + BOUND_TIMES * told["size_bytes"]
    found = [f"it did: {event}" for event in told["did"]]
    for name, (kind, message) in told["ended"].items():
        if kind.startswith("!"):
            found.append(f"{name} raised {kind[2:]}: {message}")
        if len(message) > 2000:
            found.append(f"{name} raised a message of {len(message)} characters")
        if told["took"][name] > most:
            found.append(f"{name} took {told['took'][name] >> 20} MiB for {told['size_bytes']} bytes")
    return found


if __name__ == "__main__":
    serve()
