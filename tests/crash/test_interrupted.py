"""Ctrl-C saves and leaves; a second one leaves at once and corrupts nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from lives import (
    INTERRUPTED,
    STOPPED,
    Life,
    assert_all_verified,
    assert_no_workers_left,
    assert_one_run,
    assert_same_end,
    assert_stopped,
    finish,
    stop,
    stopped_files,
)

INT, TERM = signal.SIGINT, signal.SIGTERM
SAID = "SIGINT: saving when this batch is done, then leaving (Ctrl-C again to leave at once)"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The run that nobody interrupts."""
    return finish(tmp_path_factory.mktemp("reference") / "run")


def test_once_saves_and_leaves(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    interrupted = stop(root, "training_step@11", INT, command=True)
    assert_stopped(interrupted, 12, INTERRUPTED)
    assert interrupted.said("left") == [["received_sigterm=False", "handlers_kept=True"]]
    assert interrupted.said("told") == [["of", "Interrupted"]]
    said = [line for line in interrupted.log.splitlines() if "SIGINT" in line or "Ctrl-C" in line]
    assert said == [SAID]
    assert_one_run(reference, [interrupted, finish(root)])


@pytest.mark.parametrize("moment", ["sanity_step@0", "on_train_start@0"])
def test_before_the_first_batch(tmp_path: Path, moment: str) -> None:
    interrupted = stop(tmp_path / "run", moment, INT)
    assert (interrupted.code, interrupted.steps) == (INTERRUPTED, []), interrupted.log
    assert "Traceback" not in interrupted.log
    assert list(interrupted.root.rglob("*.ckpt")) == []


@pytest.mark.parametrize("moment", ["training_step@11", "validation_step@8", "on_train_epoch_end@8"])
def test_twice_leaves_at_once(tmp_path: Path, reference: Life, moment: str) -> None:
    """What there was stays, and nobody saves any more; the run goes on from there."""
    root = tmp_path / "run"
    interrupted = stop(root, moment, INT, INT, on_exception=str(root / "exceptions"))
    assert (interrupted.code, interrupted.last_step) == (-INT, int(moment[-2:].strip("@"))), interrupted.log
    assert interrupted.said("told") == [["of", "KeyboardInterrupt"]]
    assert interrupted.said("left") == [["received_sigterm=False", "handlers_kept=True"]]
    assert stopped_files(root) == [] and not (root / "exceptions").exists()
    assert_all_verified(root)
    assert_goes_on(reference, root)


def assert_goes_on(reference: Life, root: Path) -> None:
    """The next start loses an interval at most, and ends as the run that nobody interrupted."""
    finished = finish(root)
    assert finished.first_step in (5, 8, 10)
    assert finished.steps == reference.steps[finished.first_step :]
    assert_all_verified(root)
    assert_same_end(reference.root, root)


@pytest.mark.parametrize(
    "point",
    [
        "temp-created",
        "before-directory",
        "synced",
        "renamed",
        "link-made",
        "link-renamed",
        "directory-synced",
    ],
)
def test_twice_in_the_save_of_a_model_checkpoint(tmp_path: Path, reference: Life, point: str) -> None:
    """The file has its name and its further name or not; a later start makes up for what is missing."""
    root = tmp_path / "run"
    interrupted = stop(root, f"{point}@10", INT, INT, background=False)
    assert (interrupted.code, interrupted.last_step) == (-INT, 10), interrupted.log
    assert_all_verified(root, tidy=False)
    assert_goes_on(reference, root)


@pytest.mark.parametrize("point", ["on_save_checkpoint", "temp-created", "before-directory", "synced"])
def test_a_second_one_cuts_the_save_off(tmp_path: Path, reference: Life, point: str) -> None:
    root = tmp_path / "run"
    life = Life(root, pause=["training_step@11", f"{point}@12"])
    life.reach("training_step@11").send(INT).go()
    interrupted = life.reach(f"{point}@12").send(INT).go().end()
    assert (interrupted.code, interrupted.last_step) == (-INT, 12), interrupted.log
    assert stopped_files(root) == []
    assert_all_verified(root)
    assert_goes_on(reference, root)


def test_a_second_one_behind_the_rename_leaves_the_new_file_whole(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    life = Life(root, pause=["training_step@11", "renamed@12"])
    life.reach("training_step@11").send(INT).go()
    interrupted = life.reach("renamed@12").send(INT).go().end()
    assert interrupted.code == -INT, interrupted.log
    assert stopped_files(root) == ["stopped.ckpt"]
    assert_all_verified(root)
    assert_one_run(reference, [interrupted, finish(root)])


def test_a_second_one_in_a_later_stop_leaves_the_earlier_file(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    first = stop(root, "training_step@11", INT)
    life = Life(root, pause=["training_step@12", "synced@13"])
    life.reach("training_step@12").send(INT).go()
    interrupted = life.reach("synced@13").send(INT).go().end()
    assert interrupted.code == -INT, interrupted.log
    assert_stopped(first, 12, INTERRUPTED)
    assert_one_run(reference, [first, finish(root)])


def test_a_third_one_ends_whatever_the_second_one_met(tmp_path: Path) -> None:
    """Here a callback that hears of the end hangs."""
    root = tmp_path / "run"
    life = Life(root, pause=["training_step@11", "on_exception@11"])
    life.reach("training_step@11").send(INT, INT)
    killed = life.reach("on_exception@11").send(INT).end()
    assert killed.code == -INT
    assert killed.said("left") == [], "it ended where it hung"
    assert_all_verified(root)


@pytest.mark.parametrize("signals, code", [((TERM, INT), STOPPED), ((INT, TERM), INTERRUPTED)])
def test_beside_sigterm(
    tmp_path: Path, reference: Life, signals: tuple[signal.Signals, ...], code: int
) -> None:
    """Whichever comes first says the code; and one Ctrl-C alone never loses a step."""
    root = tmp_path / "run"
    stopped = stop(root, "training_step@11", *signals)
    assert_stopped(stopped, 12, code)
    assert_one_run(reference, [stopped, finish(root)])


@pytest.mark.parametrize("catch", ["KeyboardInterrupt", "SystemExit"])
def test_the_scripts_own_except_clause(tmp_path: Path, reference: Life, catch: str) -> None:
    """It is caught as either, and the script goes on: here, to train on."""
    root = tmp_path / "run"
    life = stop(root, "training_step@11", INT, catch=catch)
    assert (life.code, life.done) == (0, True), life.log
    assert life.said("caught") == [["Interrupted", str(INTERRUPTED)]]
    assert_one_run(reference, [life])


def test_a_terminals_ctrl_c_leaves_workers_to_the_run(tmp_path: Path, reference: Life) -> None:
    root, two = tmp_path / "run", {"workers": 2}
    options = {"loader": two, "val_loader": two}
    interrupted = stop(root, "validation_step@8", INT, group=True, **options)
    assert_stopped(interrupted, 8, INTERRUPTED)
    assert_no_workers_left(interrupted)
    assert_one_run(reference, [interrupted, finish(root, **options)])


def test_a_terminals_second_ctrl_c_leaves_no_workers_behind(tmp_path: Path) -> None:
    two = {"workers": 2}
    life = stop(tmp_path / "run", "validation_step@8", INT, INT, group=True, loader=two, val_loader=two)
    assert life.code == -INT, life.log
    assert "DataLoader worker" not in life.log
    assert_no_workers_left(life)
    assert_all_verified(life.root)


def test_too_late_for_a_safe_point_it_acts_when_the_fit_has_ended(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    interrupted = stop(root, "on_fit_end@24", INT)
    assert (interrupted.code, interrupted.steps) == (-INT, reference.steps), interrupted.log
    assert_all_verified(root)
