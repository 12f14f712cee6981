"""docs/command.md shows what the command really prints, and names every key of its JSON.

``python -m tests.cli.test_command_page`` writes the outputs into the page anew.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from tests.cli.command import ROOT, a_run, as_json, holdfast
from tests.cli.test_command import COMMANDS

PAGE = ROOT / "docs" / "command.md"
BLOCK = re.compile(r"```console\n\$ (holdfast [^\n]*)\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def alike(text: str) -> list[str]:
    """The lines without what is another from day to day: sizes, seconds, checksums, and the room these take."""
    text = re.sub(r"\d+(\.\d+)? ([kMG]?B)\b", "SIZE", text)
    text = re.sub(r"\d+\.\d\d s\b", "SECONDS", text)
    text = re.sub(r"\b[0-9a-f]{8}\b", "CHECKSUM", text)
    return [re.sub(r" +", " ", line).strip() for line in text.splitlines()]


def output(command: str, cwd: Path) -> str:
    ran = holdfast(*shlex.split(command)[1:], cwd=cwd)
    assert ran.stderr == ""
    return ran.stdout


def test_every_command_is_there() -> None:
    commands = [command for command, _ in BLOCKS]
    assert [f"holdfast {name} --help" for name in COMMANDS] == [
        c for c in commands if re.search(r" \w+ --help", c)
    ]
    assert {command.split()[1] for command in commands} == {"--help", *COMMANDS}


@pytest.mark.parametrize(("command", "shown"), BLOCKS)
def test_what_it_shows_is_what_is_printed(
    command: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    a_run(tmp_path)
    assert alike(output(command, tmp_path)) == alike(shown)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ls", "runs/a"], 0),
        (["inspect", "runs/a/last.ckpt", "--tensors"], 0),
        (["verify", "runs"], 1),
        (["diff", "runs/a/epoch=0-step=100.ckpt", "runs/a/last.ckpt", "--tensors"], 1),
        (["merge", "sharded/last.ckpt", "last.ckpt"], 0),
    ],
)
def test_every_key_is_told(tmp_path: Path, arguments: list[str], code: int) -> None:
    a_run(tmp_path)
    found = as_json(*arguments, cwd=tmp_path, code=code)
    section = (
        PAGE.read_text(encoding="utf-8").partition(f"## `holdfast {arguments[0]}`")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(found)


def rewrite() -> None:
    """Put what the command prints into the page."""
    os.environ["COLUMNS"] = "80"
    with tempfile.TemporaryDirectory() as directory:
        a_run(Path(directory))
        text = PAGE.read_text(encoding="utf-8")
        made = BLOCK.sub(
            lambda block: f"```console\n$ {block[1]}\n{output(block[1], Path(directory))}```", text
        )
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
