"""A signal for the whole process group: the loaders' workers live on until the run has saved, and no longer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from lives import (
    STOPPED,
    Life,
    assert_no_workers_left,
    assert_one_run,
    assert_stopped,
    finish,
    is_alive,
    stop,
)

TERM = signal.SIGTERM
EPOCH = 8


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The run that nobody stops; it has no workers, which changes nothing."""
    return finish(tmp_path_factory.mktemp("reference") / "run")


TWO = {"workers": 2}
PERSISTENT = {"workers": 2, "persistent_workers": True}
GROUPS = {
    "in a batch": ("training_step@11", 12, TWO, {}),
    "in a validation": ("validation_step@8", 8, TWO, TWO),
    "persistent": ("validation_step@8", 8, PERSISTENT, PERSISTENT),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_signal_for_the_whole_group_leaves_workers_to_the_run(
    tmp_path: Path, reference: Life, case: str
) -> None:
    moment, step, train, val = GROUPS[case]
    root, options = tmp_path / "run", {"loader": train, "val_loader": val}
    stopped = stop(root, moment, TERM, TERM, group=True, **options)
    assert_stopped(stopped, step)
    assert_no_workers_left(stopped)
    assert_one_run(reference, [stopped, finish(root, **options)])


def test_a_signal_for_the_whole_group_while_workers_start(tmp_path: Path, reference: Life) -> None:
    """The second epoch's worker gets it before any code of the loader runs there; its first batch is awaited."""
    root, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    life = Life(root, loader={"workers": 1, "multiprocessing_context": "spawn", "pipe": str(pipe)})
    life.hear("sent", "to")
    pipe.write_text("go\n")
    life.hear("step", str(EPOCH)).hear("sent", "to")
    os.killpg(life.pid, TERM)
    pipe.write_text("go\n")
    assert_stopped(life.end(), EPOCH + 1)
    assert not any(is_alive(int(pid)) for _, pid in life.said("sent"))
    assert_one_run(reference, [life, finish(root)])


def test_another_process_of_the_script_is_left_to_itself(tmp_path: Path, reference: Life) -> None:
    """Forked during fit, it does with the signal what it would have done without the fit."""
    root = tmp_path / "run"
    stopped = stop(root, "training_step@11", TERM, group=True, helper=True)
    assert_stopped(stopped, 12)
    assert stopped.said("helper") == [[str(-TERM)]]
    assert_one_run(reference, [stopped, finish(root)])


def test_workers_and_the_sanity_check(tmp_path: Path) -> None:
    options = {"loader": TWO, "val_loader": TWO}
    stopped = stop(tmp_path / "run", "sanity_step@0", TERM, group=True, **options)
    assert (stopped.code, stopped.steps) == (STOPPED, []), stopped.log
    assert "DataLoader worker" not in stopped.log
    assert_no_workers_left(stopped)
