"""Signals, kills and the end of a run while a save goes on in the background."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from lives import (
    INTERRUPTED,
    STOPPED,
    Life,
    assert_all_verified,
    assert_one_run,
    assert_same_end,
    assert_stopped,
    finish,
    is_alive,
    stopped_files,
)

from holdfast.checkpoint import catalog

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
POINTS = ["temp-created", "before-directory", "synced", "renamed", "link-made", "link-renamed"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The run that nobody stops."""
    return finish(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def begin(root: Path, pipe: Path, point: str) -> Life:
    """A run that is in its 12th batch, while its save of step 10 is held up at ``point``."""
    life = Life(root, pause=["training_step@11"], hold=[f"{point}@10", str(pipe)])
    life.reach("training_step@11")
    if not life.said("held"):
        life.hear("held")
    life.lines.append(["at", "training_step@11"])
    return life


def let_go(pipe: Path) -> None:
    pipe.open("w").close()


@pytest.mark.parametrize("number, code", [(TERM, STOPPED), (INT, INTERRUPTED)])
@pytest.mark.parametrize("point", POINTS)
def test_told_to_stop_it_waits_for_that_save_and_saves_what_came_after(
    tmp_path: Path, reference: Life, pipe: Path, point: str, number: signal.Signals, code: int
) -> None:
    root = tmp_path / "run"
    life = begin(root, pipe, point).send(number).go()
    let_go(pipe)
    assert_stopped(life.end(), 12, code)
    assert_one_run(reference, [life, finish(root)])


@pytest.mark.parametrize("point", POINTS)
def test_killed_it_loses_what_came_after_the_save_before(
    tmp_path: Path, reference: Life, pipe: Path, point: str
) -> None:
    """An interval and the save, at most: what is not under its name by then is not there."""
    root = tmp_path / "run"
    life = begin(root, pipe, point).send(KILL).end()
    assert (life.code, life.last_step) == (-KILL, 11)
    assert_all_verified(root, tidy=False)
    steps = [entry.step for entry in catalog.scan(root, recursive=True) if entry.kind == "full"]
    newest = 10 if point in ("renamed", "link-made", "link-renamed") else 8
    assert max(step for step in steps if step is not None) == newest
    finished = finish(root)
    assert (finished.first_step, finished.steps) == (newest, reference.steps[newest:])
    assert_all_verified(root)
    assert_same_end(reference.root, root)


def test_a_second_ctrl_c_lets_that_save_end_and_saves_nothing_more(
    tmp_path: Path, reference: Life, pipe: Path
) -> None:
    root = tmp_path / "run"
    life = begin(root, pipe, "synced").send(INT, INT)
    let_go(pipe)
    assert (life.end().code, life.last_step) == (-INT, 11), life.log
    assert stopped_files(root) == []
    assert_all_verified(root)
    finished = finish(root)
    assert (finished.first_step, finished.steps) == (10, reference.steps[10:])
    assert_same_end(reference.root, root)


def test_a_third_ctrl_c_does_not_wait_for_the_disk(tmp_path: Path, reference: Life, pipe: Path) -> None:
    """The save comes to nothing, as by a kill."""
    root = tmp_path / "run"
    life = begin(root, pipe, "synced").send(INT, INT)
    while is_alive(life.pid):  # two that come at once are one
        os.kill(life.pid, INT)
    assert (life.end().code, life.last_step) == (-INT, 11), life.log
    assert_all_verified(root, tidy=False)
    finished = finish(root)
    assert (finished.first_step, finished.steps) == (8, reference.steps[8:])
    assert_same_end(reference.root, root)
