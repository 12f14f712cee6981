"""Hostile files, opened by every reader: no code runs, nothing is written, memory stays in proportion, and each file
either opens harmlessly or is refused by an error that names it and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .files import FILES, File
from .guard import Guard, guarded, wrong_with
from .hostile import build, torch_file
from .programs import CODE, HARMLESS, PROGRAMS, Program

CANARY_MODULE = "open('canary', 'w')\nclass Thing: pass\nDict = dict\n"
ASKS = "which opening a checkpoint never gives. Nothing was run. Do not use this file unless you know who wrote it."


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    with guarded() as made:
        yield made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the file lies and its reader works; a module lies there that no file may have imported."""
    path = tmp_path / "place"
    path.mkdir()
    (path / "canary_module.py").write_text(CANARY_MODULE)
    return path / "a.ckpt"


def opened(guard: Guard, path: Path) -> tuple[str, str]:
    """How `load` ended, once it is sure that no reader did what it must not."""
    told = guard.open(path)
    assert wrong_with(told) == []
    assert {entry.name for entry in path.parent.iterdir()} == {"a.ckpt", "canary_module.py"}
    kind, message = told["ended"]["load"]
    return kind, message


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch.save's"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.what)
def test_a_hostile_pickle(program: Program, ours: bool, place: Path, guard: Guard) -> None:
    if ours:
        build(place, pickled=program.data, storages=program.storages)
    else:
        torch_file(place, program.data, program.storages)
    kind, message = opened(guard, place)
    verdict = program.own if ours else program.foreign
    if verdict == HARMLESS:
        assert (kind, message) == ("", "")
    elif verdict == CODE:
        assert kind == "CheckpointUnsafe"
        assert message.startswith("a.ckpt asks for ") and message.endswith(ASKS)
    else:
        assert kind in ("CheckpointUnsafe", "CheckpointCorrupt")
        assert message in (f"a.ckpt cannot be read: {verdict}.", f"a.ckpt is corrupt: {verdict}.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.what)
def test_a_hostile_file(file: File, place: Path, guard: Guard) -> None:
    file.write(place)
    assert opened(guard, place) == (file.error, file.message)


def test_the_guard_sees_what_it_is_for(place: Path, guard: Guard) -> None:
    """Files that are opened by readers which do wrong: without this a guard that sees nothing would pass."""
    build(place, value={"a": 1})
    seen = {
        name: wrong_with(guard.open(place, [name]))
        for name in ("! writes", "! runs", "! takes", "! dies", "! fails")
    }
    assert seen["! writes"] == ["it did: open 'canary' 'w'"]
    assert seen["! runs"] == ["it did: os.system (b'true',)"]
    assert seen["! takes"][0].startswith("! takes took ")
    assert seen["! dies"] == ["it ended the process: SIGSEGV"]
    assert seen["! fails"] == ["! fails raised IndexError: list index out of range"]
