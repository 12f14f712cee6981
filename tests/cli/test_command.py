"""The command as a whole: help, errors, exit codes, pipes, interrupts, colours, and names that attack a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import holdfast as package
from holdfast.cli import main
from tests.cli.command import a_payload, a_run, a_save, child, environment, holdfast, save

COMMANDS = ("ls", "inspect", "verify", "diff", "merge")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]m")


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def in_terminal(*arguments: object, width: int = 80, **more: str) -> str:
    """What the command writes to a terminal."""
    terminal = Terminal()
    with mock.patch.dict(os.environ, {"COLUMNS": str(width), "TERM": "xterm-256color", **more}):
        for name in {"NO_COLOR", "FORCE_COLOR"} - set(more):
            os.environ.pop(name, None)
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            main(list(map(str, arguments)))
    return terminal.getvalue()


def in_real_terminal(*arguments: object, cwd: Path) -> tuple[str, int]:
    """Run the command in a process with a pseudo-terminal; returns what it wrote and its exit code."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "holdfast", *map(str, arguments)]
    env = environment(TERM="xterm-256color")
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=cwd)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Linux's word for the end of a terminal
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    return text.decode().replace("\r\n", "\n"), process.wait()


# -- help and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_fits_a_screen(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = holdfast(*arguments)
    lines = ran.stdout.splitlines()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "examples:" in lines


def test_no_command_shows_the_help() -> None:
    ran = holdfast()
    assert (ran.returncode, ran.stdout) == (2, holdfast("--help").stdout)


def test_version() -> None:
    assert child("--version").stdout == f"holdfast {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["lss"],
        ["ls", "--mode", "best"],
        ["diff", "a"],
        ["inspect"],
        ["verify"],
        ["merge", "a"],
        ["ls", "--rec"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    ran = holdfast(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("usage: holdfast")


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "There is no checkpoint"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.write_bytes(b""), "it is empty."),
        (lambda path: path.write_bytes(b"text"), "it begins with b'text'."),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_one_message_and_no_traceback(tmp_path: Path, command: str, make: object, reason: str) -> None:
    path = tmp_path / "x.pt"
    make(path)  # type: ignore[operator]
    ran = holdfast(command, *([path, path] if command == "diff" else [path]))
    said = ran.stdout + ran.stderr
    assert ran.returncode in ((1, 2) if command == "verify" else (2,))
    assert "Traceback" not in said
    if command != "verify":
        assert ran.stderr.startswith("holdfast: ")
        assert reason in ran.stderr


def test_a_damaged_file_names_the_newest_beside_it(tmp_path: Path) -> None:
    good = a_save(tmp_path / "good.ckpt", 10)
    (tmp_path / "bad.ckpt").write_bytes(good.read_bytes()[:-30])
    ran = holdfast("inspect", tmp_path / "bad.ckpt")
    assert ran.returncode == 2
    lines = ran.stderr.splitlines()
    assert lines[0] == "holdfast: bad.ckpt is not a whole checkpoint: it does not end with a zip directory."
    assert lines[1] == (
        f"Newest whole checkpoint in {tmp_path}: good.ckpt. Check them all: holdfast verify {tmp_path}"
    )


def test_without_torch(tmp_path: Path) -> None:
    """In one process all that looks at files: a hundred are listed, one is described, verified and compared."""
    payload = {"state_dict": {f"layers.{i}.weight": torch.zeros(2) for i in range(20)}}
    for step in range(100):
        save(tmp_path / f"{step}.ckpt", payload, step=step, metrics={"loss": 1.0})
    torch.save(payload, tmp_path / "foreign.pt")
    code = (
        "import sys; from holdfast.cli import main; here = sys.argv[1]; "
        "codes = [main(['ls', here]), main(['inspect', f'{here}/7.ckpt']), main(['inspect', f'{here}/foreign.pt']), "
        "main(['verify', here, f'{here}/foreign.pt']), main(['diff', f'{here}/7.ckpt', f'{here}/8.ckpt'])]; "
        "print(codes, sorted({'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment(), check=True
    )
    assert ran.stdout.splitlines()[0].startswith(f"{tmp_path}  100 checkpoints, ")
    assert ran.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0] []"


# -- pipes, signals, colours ---------------------------------------------------------------------------------


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """As with ``| head``: nobody reads any more before the first line is written."""
    a_save(tmp_path / "a.ckpt", 10)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        ran = subprocess.run(
            [sys.executable, "-m", "holdfast", "ls", tmp_path],
            stdout=gone, stderr=subprocess.PIPE, env=environment(), check=False,
        )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_ctrl_c_is_quiet() -> None:
    """While a server that was asked for a file says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ckpt"
        process = subprocess.Popen(
            [sys.executable, "-m", "holdfast", "inspect", url],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(no_proxy="*"),
        )  # fmt: skip
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1000).startswith(b"GET /a.ckpt ")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 130


def test_a_pipe_gets_whole_lines_without_colours(tmp_path: Path) -> None:
    name = "a-long-name-" * 15 + ".ckpt"
    a_save(tmp_path / name, 10, metrics={f"metric_{i}": float(i) for i in range(20)})
    for command in ("ls", "verify"):
        ran = child(command, tmp_path)
        assert "\x1b" not in ran.stdout
        assert [line for line in ran.stdout.splitlines() if name in line]
    assert "metric_19" in child("ls", tmp_path).stdout


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_is_filled_and_not_overrun(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["ls", "runs/a"], ["inspect", "runs/a/last.ckpt"], ["verify", "runs/b"],
        ["diff", "runs/a/epoch=0-step=100.ckpt", "runs/a/last.ckpt"],
    ):  # fmt: skip
        text = in_terminal(*arguments, width=width)
        assert ESCAPE.search(text), arguments
        assert max(len(ESCAPE.sub("", line)) for line in text.splitlines()) <= width


def test_no_color(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert COLOUR.search(in_terminal("ls", tmp_path / "runs/a"))
    assert not COLOUR.search(in_terminal("ls", tmp_path / "runs/a", NO_COLOR="1"))


def test_a_real_terminal(tmp_path: Path) -> None:
    a_run(tmp_path)
    text, code = in_real_terminal("ls", "runs/a", cwd=tmp_path)
    assert code == 0
    assert COLOUR.search(text)
    assert "epoch=1-step=200.ckpt" in text


# -- what a file says is not obeyed --------------------------------------------------------------------------

EVIL = "\x1b]0;title\x07\x1b[2J\r\n\u202e[red]x"


def evil_files(directory: Path) -> Path:
    payload = {
        "state_dict": {EVIL: torch.ones(2), f"a.{EVIL}": torch.ones(1)},
        "hyper_parameters": {EVIL: EVIL},
        EVIL: torch.ones(2),
        "callbacks": {EVIL: {}},
        "f": {EVIL: open},
    }
    path = save(directory / f"{EVIL.replace('/', '')}.ckpt", payload, step=1, metrics={EVIL: 0.5}, exact=True)
    other = directory / "other.ckpt"
    save(
        other,
        {**payload, "state_dict": {EVIL: torch.zeros(2), "b": torch.ones(1)}, "hyper_parameters": {EVIL: 1}},
    )
    return path


@pytest.mark.parametrize("terminal", [False, True])
def test_a_hostile_name_does_not_drive_the_terminal(tmp_path: Path, terminal: bool) -> None:
    path = evil_files(tmp_path)
    bad = tmp_path / f"bad{path.name}"
    bad.write_bytes(path.read_bytes()[:-1])
    commands = [
        ["ls", tmp_path], ["ls", tmp_path, "--monitor", EVIL], ["inspect", path, "--tensors"], ["verify", tmp_path],
        ["diff", path, tmp_path / "other.ckpt", "--tensors"], ["inspect", bad], ["ls", tmp_path / EVIL],
        ["ls", tmp_path, "--json"], ["inspect", path, "--json"], ["verify", tmp_path, "--json"],
    ]  # fmt: skip
    for arguments in commands:
        if terminal:
            text = re.sub(r"\x1b\[[0-9;]*m", "", in_terminal(*arguments, width=200))
        else:
            ran = holdfast(*arguments)
            assert "Traceback" not in ran.stderr
            text = ran.stdout + ran.stderr
        assert not [c for c in text if not c.isprintable() and c != "\n"], arguments
        assert "title" in text, arguments


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.ckpt"
    os.rename(a_save(tmp_path / "a.ckpt", 10), path)
    ran = child("ls", tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\\udcff.ckpt" in ran.stdout


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path) -> None:
    save(tmp_path / "größe.ckpt", a_payload(100, 0.1), step=1)
    ran = subprocess.run(
        [sys.executable, "-m", "holdfast", "ls", tmp_path],
        capture_output=True, env=environment(PYTHONIOENCODING="ascii"), check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe.ckpt" in ran.stdout
