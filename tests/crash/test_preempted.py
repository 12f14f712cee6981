"""A training process that is told to stop saves at its next safe point, leaves with 143, and loses not one batch.

Each life is a process of its own that gets real signals at exact moments; started again by the same command it
goes on in the same version directory, and the lives together are bit for bit the run that nobody stopped.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from lives import (
    STOPPED,
    Life,
    assert_all_verified,
    assert_one_run,
    assert_same_end,
    assert_stopped,
    files,
    finish,
    stop,
    stopped_file,
    stopped_files,
)

from holdfast.checkpoint.load import load

TERM, USR1, USR2, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT
STEPS, EPOCH = 24, 8


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The run that nobody stops."""
    return finish(tmp_path_factory.mktemp("reference") / "run")


# Where the signal comes, and how many steps are in the file that it leads to.
MOMENTS = {
    "training_step@0": 1,  # before there is any other file
    "training_step@9": 10,  # inside a batch; a ModelCheckpoint saves behind the same one
    "training_step@11": 12,
    "training_step@7": 8,  # inside an epoch's last batch, which validation follows
    "training_step@23": STEPS,  # inside the last batch of all
    "validation_step@8": 8,
    "on_validation_end@8": 8,
    "on_train_epoch_end@8": 8,
    "on_train_epoch_start@8": 9,
    "on_save_checkpoint@10": 10,
    "temp-created@10": 10,  # here and below: in a save in the foreground
    "written@10": 10,
    "renamed@10": 10,
    "link-made@10": 10,
    "directory-synced@10": 10,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stops_behind_the_batch_and_goes_on_as_if_never_stopped(
    tmp_path: Path, reference: Life, moment: str
) -> None:
    root = tmp_path / "run"
    stopped = stop(root, moment, TERM, background=not moment.endswith("@10"))
    assert_stopped(stopped, MOMENTS[moment])
    assert stopped.said("left") == [["received_sigterm=True", "handlers_kept=True"]]
    assert stopped.said("told") == [["of", "Preempted"]]
    what = "validation" if "validation" in moment else "batch"
    assert stopped.log.splitlines().count(f"SIGTERM: saving when this {what} is done, then leaving") == 1
    path = stopped_file(root)
    finished = finish(root)
    assert finished.resumed_from == str(path)
    assert_one_run(reference, [stopped, finished])


def test_the_real_command(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    stopped = stop(root, "training_step@11", TERM, command=True)
    assert_stopped(stopped, 12)
    finished = Life(root, command=True).end()
    assert finished.code == 0 and finished.done
    assert_one_run(reference, [stopped, finished])


def test_in_the_hooks_of_the_last_epoch_all_is_trained(tmp_path: Path, reference: Life) -> None:
    """The next start finds nothing left to train; no later save takes the file's place, so it stays."""
    root = tmp_path / "run"
    stopped = stop(root, f"on_train_epoch_end@{STEPS}", TERM)
    assert_stopped(stopped, STEPS)
    path = stopped_file(root)
    finished = Life(root).end()
    assert (finished.code, finished.done, finished.steps) == (0, True, []), finished.log
    assert stopped.steps == reference.steps
    path.unlink()
    assert_same_end(reference.root, root)


@pytest.mark.parametrize("moment", ["setup@0", "sanity_step@0", "on_train_start@0"])
def test_before_the_first_batch_nothing_is_trained_and_nothing_saved(
    tmp_path: Path, reference: Life, moment: str
) -> None:
    root = tmp_path / "run"
    stopped = stop(root, moment, TERM)
    assert (stopped.code, stopped.steps) == (STOPPED, []), stopped.log
    assert "nothing is saved: nothing was trained yet" in stopped.log.splitlines()
    assert "Traceback" not in stopped.log
    assert list(root.rglob("*.ckpt")) == []
    assert finish(root).steps == reference.steps


@pytest.mark.parametrize("moment", ["setup@0", "on_train_start@12"])
def test_before_the_first_batch_of_a_second_life_the_file_it_came_from_stays(
    tmp_path: Path, reference: Life, moment: str
) -> None:
    root = tmp_path / "run"
    stopped = stop(root, "training_step@11", TERM)
    before = file_numbers(root)
    again = stop(root, moment, TERM)
    assert (again.code, again.steps) == (STOPPED, []), again.log
    assert "nothing is saved: nothing was trained since stopped.ckpt" in again.log.splitlines()
    assert file_numbers(root) == before
    finished = finish(root)
    assert finished.steps == reference.steps[12:]
    assert_one_run(reference, [stopped, finished])


def file_numbers(root: Path) -> dict[str, tuple[int, int]]:
    """The inode and time of each checkpoint: the same only where nothing was written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*.ckpt")}


@pytest.mark.parametrize("moment", [f"on_train_end@{STEPS}", f"on_fit_end@{STEPS}", f"teardown@{STEPS}"])
def test_too_late_for_a_safe_point_the_fit_ends_and_then_the_signal_acts(
    tmp_path: Path, reference: Life, moment: str
) -> None:
    root = tmp_path / "run"
    killed = stop(root, moment, TERM)
    assert (killed.code, killed.steps, killed.done) == (-TERM, reference.steps, False), killed.log
    assert_all_verified(root)
    assert [name for name in files(reference.root) if name != "final.pt"] == files(root)


@pytest.mark.parametrize("point, step", {"written": 10, "synced": 10, "renamed": 12}.items())
def test_killed_in_the_save_because_the_time_to_leave_was_over(
    tmp_path: Path, reference: Life, point: str, step: int
) -> None:
    """A scheduler that has sent SIGTERM sends SIGKILL after a while: it costs an interval, as ever."""
    root = tmp_path / "run"
    life = Life(root, pause=["training_step@11", f"{point}@12"])
    life.reach("training_step@11").send(TERM).go()
    assert life.reach(f"{point}@12").send(signal.SIGKILL).end().code == -signal.SIGKILL
    finished = finish(root)
    assert (finished.first_step, finished.steps) == (step, reference.steps[step:])
    assert_all_verified(root)
    assert_same_end(reference.root, root)


def test_an_exception_before_the_safe_point(tmp_path: Path) -> None:
    """It is shown, for nothing else tells of it; then the signal acts, and nobody thinks that it is saved."""
    root = tmp_path / "run"
    killed = stop(root, "training_step@11", TERM, raise_at="on_after_backward@11")
    assert (killed.code, killed.last_step) == (-TERM, 11), killed.log
    assert "RuntimeError: raised at on_after_backward@11" in killed.log
    assert stopped_files(root) == []
    assert_all_verified(root)


def test_in_the_last_step_of_all(tmp_path: Path) -> None:
    """What comes behind the last batch is still to do; no later save takes the file's place, so it stays."""
    root, options = tmp_path / "run", {"trainer": {"max_steps": 12}}
    reference = finish(tmp_path / "reference", **options)
    stopped = stop(root, "training_step@11", TERM, **options)
    assert_stopped(stopped, 12)
    finished = finish(root, **options)
    stopped_file(root).unlink()
    assert_one_run(reference, [stopped, finished])


@pytest.mark.parametrize(
    "moment, options",
    {
        "training_step@3": {"accumulate_grad_batches": 3},  # the first batch of three
        "validation_step@5": {"val_check_interval": 5},
        "on_train_epoch_start@8": {"reload_dataloaders_every_n_epochs": 1},
    }.items(),
)
def test_with_other_schedules(tmp_path: Path, moment: str, options: dict[str, int]) -> None:
    reference = finish(tmp_path / "reference", trainer=options)
    stopped = stop(tmp_path / "run", moment, TERM, trainer=options)
    assert_stopped(stopped, stopped.last_step)
    assert_one_run(reference, [stopped, finish(tmp_path / "run", trainer=options)])


# -- more than one signal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_several_times_is_once(tmp_path: Path, reference: Life, count: int) -> None:
    root = tmp_path / "run"
    stopped = stop(root, "training_step@11", *[TERM] * count)
    assert_stopped(stopped, 12)
    assert_one_run(reference, [stopped, finish(root)])


@pytest.mark.parametrize("point", ["on_save_checkpoint", "temp-created", "before-directory", "renamed"])
def test_again_in_the_save_that_it_led_to(tmp_path: Path, reference: Life, point: str) -> None:
    root = tmp_path / "run"
    life = Life(root, pause=["training_step@11", f"{point}@12"])
    life.reach("training_step@11").send(TERM).go()
    stopped = life.reach(f"{point}@12").send(TERM, TERM).go().end()
    assert_stopped(stopped, 12)
    assert_one_run(reference, [stopped, finish(root)])


def test_preempted_again_and_again_until_done(tmp_path: Path, reference: Life) -> None:
    """At random moments, one after the other in the epochs, until the run has ended."""
    root = tmp_path / "run"
    chance = random.Random(4)
    lives: list[Life] = []
    moments = []
    for step in range(1, STEPS):
        if step % EPOCH == 0:
            moments += [f"validation_step@{step}", f"on_train_epoch_end@{step}"]
        moments.append(f"training_step@{step}")
    for number in sorted(chance.sample(range(len(moments)), 6)):
        moment = moments[number]
        life = Life(root, pause=[moment])
        lives.append(life.reach(moment).send(TERM).go().end())
        assert_stopped(life, life.last_step)
    assert_one_run(reference, [*lives, finish(root)])


def test_stopped_in_a_validation_that_a_stop_came_before(tmp_path: Path, reference: Life) -> None:
    """The second life resumes between a batch and its validation, and trains no batch of its own."""
    root = tmp_path / "run"
    lives = [stop(root, "training_step@7", TERM), stop(root, "validation_step@8", TERM)]
    assert [life.code for life in lives] == [STOPPED, STOPPED]
    assert lives[1].steps == []
    assert_one_run(reference, [*lives, finish(root)])


def test_its_own_file_goes_once_a_later_save_is_durable(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    stop(root, "training_step@11", TERM)
    life = Life(root, pause=["training_step@13", "renamed@15", "training_step@15"], background=False)
    life.reach("training_step@13")
    assert stopped_files(root) == ["stopped.ckpt"], "nothing newer is there yet"
    life.go().reach("renamed@15")
    assert stopped_files(root) == ["stopped.ckpt"], "the newer one has its name, and may not be on disk yet"
    life.go().reach("training_step@15")
    assert stopped_files(root) == []
    life.go().end()
    assert life.code == 0, life.log


def test_a_file_that_was_given_by_its_path_is_never_deleted(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    stop(root, "training_step@11", TERM)
    path = stopped_file(root)
    content = path.read_bytes()
    finished = finish(root, ckpt_path=str(path))
    assert finished.steps == reference.steps[12:]
    assert path.read_bytes() == content


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    """Neither the file of a stopped run nor that of another is ever written over or deleted by the other."""
    shared, options = tmp_path / "shared", {"dirpath": str(tmp_path / "shared"), "ckpt_path": None}
    stop(tmp_path / "one", "training_step@11", TERM, **options)
    first = (shared / "stopped.ckpt").read_bytes()
    stop(tmp_path / "two", "training_step@13", TERM, **options)
    assert stopped_files(shared) == ["stopped-v1.ckpt", "stopped.ckpt"]
    assert load(shared / "stopped-v1.ckpt")["global_step"] == 14
    # The second goes on from its own file, stops again, and ends: by then it has replaced what is its own.
    options["ckpt_path"] = "auto"
    stop(tmp_path / "two", "training_step@16", TERM, **options)
    assert stopped_files(shared) == ["stopped-v1.ckpt", "stopped.ckpt"]
    assert load(shared / "stopped-v1.ckpt")["global_step"] == 17
    finish(tmp_path / "two", **options)
    assert stopped_files(shared) == ["stopped.ckpt"]
    assert (shared / "stopped.ckpt").read_bytes() == first


# -- which signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [USR1, USR2])
def test_other_signals_stop_it_where_it_was_told_so(
    tmp_path: Path, reference: Life, number: signal.Signals
) -> None:
    root = tmp_path / "run"
    options = {"trainer": {"stop_signals": ["SIGUSR1", int(USR2)]}}
    stopped = stop(root, "training_step@11", number, **options)
    assert_stopped(stopped, 12)
    assert stopped.said("left") == [["received_sigterm=True", "handlers_kept=True"]]
    assert_one_run(reference, [stopped, finish(root, **options)])


def test_a_signal_that_is_not_among_them_acts_as_ever(tmp_path: Path) -> None:
    options = {"trainer": {"stop_signals": ["SIGUSR1"]}}
    killed = stop(tmp_path / "run", "training_step@11", TERM, **options)
    assert (killed.code, killed.last_step) == (-TERM, 11)
    assert stopped_files(killed.root) == []


def test_without_stop_signals_everything_is_left_to_python(tmp_path: Path) -> None:
    options = {"trainer": {"stop_signals": []}}
    killed = stop(tmp_path / "one", "training_step@11", TERM, **options)
    assert (killed.code, killed.last_step) == (-TERM, 11)
    interrupted = stop(tmp_path / "two", "training_step@11", INT, **options)
    assert (interrupted.code, interrupted.last_step) == (-INT, 11)
    assert "KeyboardInterrupt" in interrupted.log
    assert stopped_files(tmp_path) == []


@pytest.mark.parametrize("number", [TERM, USR1])
def test_the_scripts_own_handler_is_called_too_and_is_back_afterwards(
    tmp_path: Path, reference: Life, number: signal.Signals
) -> None:
    root = tmp_path / "run"
    options = {"own_handlers": [number.name], "trainer": {"stop_signals": ["SIGTERM", "SIGUSR1"]}}
    stopped = stop(root, "training_step@11", number, **options)
    assert_stopped(stopped, 12)
    assert stopped.said("own") == [[number.name]]
    assert stopped.said("left") == [["received_sigterm=True", "handlers_kept=True"]]
    # A signal that comes too late reaches it a second time: as it would have without the fit around it.
    late = stop(root, f"on_fit_end@{STEPS}", number, **options)
    assert (late.code, late.done) == (0, True)
    assert late.said("own") == [[number.name]] * 2
    assert_one_run(reference, [stopped, late])


def test_an_exit_that_is_caught_leaves_a_process_that_can_train_on(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    life = stop(root, "training_step@11", TERM, catch="SystemExit")
    assert (life.code, life.done) == (0, True), life.log
    assert life.said("caught") == [["Preempted", str(STOPPED)]]
    assert [line[1] for line in life.said("left")] == ["handlers_kept=True"] * 2
    assert_one_run(reference, [life])


def test_outside_of_fit_it_acts_as_ever(tmp_path: Path) -> None:
    killed = stop(tmp_path / "run", "validation_step@0", TERM, validate=True)
    assert killed.code == -TERM, killed.log


def test_in_a_thread_fit_leaves_signals_alone(tmp_path: Path, reference: Life) -> None:
    """Only the main thread may handle signals."""
    root = tmp_path / "run"
    killed = stop(root, "training_step@11", TERM, thread=True)
    assert (killed.code, killed.last_step) == (-TERM, 11)
    assert stopped_files(root) == []
    assert finish(root, thread=True).last_step == STEPS


# -- other ends --------------------------------------------------------------------------------------------------


def test_time_is_up_saves_the_same_file_and_ends_well(tmp_path: Path, reference: Life) -> None:
    root = tmp_path / "run"
    short, long = {"max_time": {"minutes": 30}}, {"max_time": {"hours": 30}}
    timed = Life(root, time_is_up_at=11, trainer=short).end()
    assert (timed.code, timed.done, timed.last_step) == (0, True, 12), timed.log
    assert timed.said("left") == [["received_sigterm=False", "handlers_kept=True"]]
    assert_all_verified(root)
    assert load(stopped_file(root))["global_step"] == 12
    # By the same command there is no time left; the file stays.
    again = Life(root, trainer=short).end()
    assert (again.code, again.steps) == (0, []), again.log
    assert stopped_files(root) == ["stopped.ckpt"]
    finished = finish(root, trainer=long)
    assert_one_run(reference, [timed, finished])


@pytest.mark.parametrize("moment", ["training_step@11", "on_train_epoch_end@12", "on_train_end@12"])
def test_a_signal_when_time_is_up(tmp_path: Path, reference: Life, moment: str) -> None:
    """Whether it comes before the save that time asks for or behind it, the file is the same."""
    root, short = tmp_path / "run", {"max_time": {"minutes": 30}}
    stopped = stop(root, moment, TERM, time_is_up_at=11, trainer=short)
    assert stopped.code == (-TERM if moment == "on_train_end@12" else STOPPED), stopped.log
    assert stopped_files(root) == ["stopped.ckpt"]
    assert_all_verified(root)
    assert_one_run(reference, [stopped, finish(root, trainer={"max_time": {"hours": 30}})])


def test_an_exception_keeps_a_file_of_its_own(tmp_path: Path, reference: Life) -> None:
    root, other = tmp_path / "run", tmp_path / "exceptions"
    options = {"on_exception": str(other)}
    stopped = stop(root, "training_step@11", TERM, **options)
    assert_stopped(stopped, 12)
    kept = {path.name for path in root.rglob("*.ckpt")}
    assert not other.exists(), "leaving in good order is no exception"

    failed = Life(root, raise_at="training_step@13", **options).end()
    assert failed.code == 1 and "raised at training_step@13" in failed.log
    of_its_own = {path.name for path in root.rglob("*.ckpt")} - kept
    assert len(of_its_own) == 1 and [path.name for path in other.iterdir()] == ["on_exception.ckpt"]
    assert load(stopped_file(root))["global_step"] == 12

    # What an exception left is not exact, so the run goes on from the file that is.
    shutil.rmtree(other)
    finished = finish(root, **options)
    assert (finished.first_step, finished.steps) == (12, reference.steps[12:])


def test_without_checkpoints_it_leaves_all_the_same_and_says_so(tmp_path: Path) -> None:
    options = {"trainer": {"enable_checkpointing": False}}
    stopped = stop(tmp_path / "run", "training_step@11", TERM, **options)
    assert (stopped.code, stopped.last_step) == (STOPPED, 12), stopped.log
    assert list(stopped.root.rglob("*.ckpt")) == []
    said = stopped.log.splitlines()
    assert "SIGTERM: leaving when this batch is done" in said
    assert "nothing is saved: the trainer has no checkpoint callback" in said


def test_a_trial_run_saves_nothing(tmp_path: Path) -> None:
    stopped = stop(tmp_path / "run", "training_step@1", TERM, trainer={"fast_dev_run": 4})
    assert (stopped.code, stopped.last_step) == (STOPPED, 2), stopped.log
    assert list(stopped.root.rglob("*.ckpt")) == []


def test_a_save_that_fails_is_an_error_and_no_stop(tmp_path: Path, reference: Life) -> None:
    """Whoever told it to stop must not think that it is saved; what there was before is untouched."""
    root = tmp_path / "run"
    failed = stop(root, "training_step@11", TERM, disk_full_at="written@12")
    assert (failed.code, failed.last_step) == (1, 12), failed.log
    assert "No space left on device" in failed.log
    assert stopped_files(root) == []
    assert_all_verified(root)
    finished = finish(root)
    assert (finished.first_step, finished.steps) == (10, reference.steps[10:])
