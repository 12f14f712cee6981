"""Under SLURM a run that is told to stop is requeued, once its file is durable, and the next job goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from lives import STOPPED, Life, assert_one_run, assert_stopped, finish, stop

TERM, USR1, USR2, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT

# A stand-in for SLURM's command: writes down its arguments and the checkpoints it sees, and answers as told.
SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_CALLS"
find "$SCONTROL_LOOKS_IN" -name "stopped*.ckpt" -exec basename {} \\; >> "$SCONTROL_CALLS"
test -z "$SCONTROL_FAILS" || { echo "$SCONTROL_FAILS" >&2; exit 1; }
"""


class Job:
    """A job of SLURM's: what it sets in the environment, and what `scontrol` was asked in it."""

    def __init__(self, place: Path, *, with_scontrol: bool = True, **variables: str) -> None:
        self.root = place / "run"
        self.calls_file = place / "calls"
        commands = place / "commands"
        commands.mkdir()
        if with_scontrol:
            (commands / "scontrol").write_text(SCONTROL)
            (commands / "scontrol").chmod(0o755)
        self.environment = {
            "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": "1",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NNODES": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SCONTROL_CALLS": str(self.calls_file),
            "SCONTROL_LOOKS_IN": str(self.root),
            "PATH": f"{commands}:/usr/bin:/bin",
            **variables,
        }

    def stop(self, moment: str, *signals: signal.Signals, **options: Any) -> Life:
        return stop(self.root, moment, *signals, environment=self.environment, **options)

    def finish(self, **options: Any) -> Life:
        return finish(self.root, environment=self.environment, **options)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The job that nobody stops."""
    return Job(tmp_path_factory.mktemp("reference")).finish()


@pytest.mark.parametrize("number", [USR1, TERM])
def test_requeued_once_the_file_is_durable(job: Job, reference: Life, number: signal.Signals) -> None:
    stopped = job.stop("training_step@11", number)
    assert_stopped(stopped, 12)
    assert job.calls == ["requeue 1234", "stopped.ckpt"]
    assert "SLURM starts the job again" in stopped.log.splitlines()
    assert stopped.said("left") == [["received_sigterm=True", "handlers_kept=True"]]
    job.environment["SLURM_RESTART_COUNT"] = "1"
    assert_one_run(reference, [stopped, job.finish()])
    assert len(job.calls) == 2, "a job that ends is not requeued"


@pytest.mark.parametrize(("state", "calls"), [("CANCELLED", 0), ("COMPLETING", 0), ("RUNNING", 2)])
def test_a_job_that_somebody_cancelled_does_not_come_back(job: Job, state: str, calls: int) -> None:
    """SLURM ends a cancelled job with SIGTERM too, and says of it that it is over."""
    squeue = Path(job.environment["PATH"].partition(":")[0]) / "squeue"
    squeue.write_text(f'#!/bin/sh\ntest "$*" = "--noheader --format=%T --jobs=1234" && echo {state}\n')
    squeue.chmod(0o755)
    stopped = job.stop("training_step@11", TERM)
    assert_stopped(stopped, 12)
    assert len(job.calls) == calls
    said = "not started again: SLURM says that the job was cancelled or its time was up"
    assert (said in stopped.log.splitlines()) == (calls == 0)


def test_both_signals_requeue_once(job: Job) -> None:
    """SLURM warns with one, and when the time is up it ends the job with the other."""
    stopped = job.stop("training_step@11", USR1, TERM, USR1)
    assert_stopped(stopped, 12)
    assert job.calls == ["requeue 1234", "stopped.ckpt"]


def test_a_job_of_an_array(tmp_path: Path) -> None:
    job = Job(tmp_path, SLURM_JOB_ID="1240", SLURM_ARRAY_JOB_ID="1234", SLURM_ARRAY_TASK_ID="6")
    assert_stopped(job.stop("training_step@11", USR1), 12)
    assert job.calls == ["requeue 1234_6", "stopped.ckpt"]


def test_before_the_first_batch_it_is_requeued_too(job: Job, reference: Life) -> None:
    stopped = job.stop("sanity_step@0", USR1)
    assert (stopped.code, stopped.steps) == (STOPPED, []), stopped.log
    assert job.calls == ["requeue 1234"]
    assert job.finish().steps == reference.steps


def test_a_requeue_signal_of_its_own(job: Job) -> None:
    stopped = job.stop("training_step@11", USR2, slurm={"requeue_signal": int(USR2)})
    assert_stopped(stopped, 12)
    assert job.calls == ["requeue 1234", "stopped.ckpt"]


def test_without_auto_requeue_it_saves_and_leaves(job: Job) -> None:
    stopped = job.stop("training_step@11", TERM, slurm={"auto_requeue": False})
    assert_stopped(stopped, 12)
    assert job.calls == []


def test_without_auto_requeue_the_requeue_signal_is_any_signal(job: Job) -> None:
    killed = job.stop("training_step@11", USR1, slurm={"auto_requeue": False})
    assert (killed.code, killed.last_step) == (-USR1, 11)


def test_ctrl_c_is_no_reason_to_be_started_again(job: Job) -> None:
    assert_stopped(job.stop("training_step@11", INT), 12, 130)
    assert job.calls == []


def test_an_interactive_job_is_not_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path, SLURM_JOB_NAME="bash")
    assert_stopped(job.stop("training_step@11", TERM), 12)
    assert job.calls == []


def test_scontrol_refuses(tmp_path: Path) -> None:
    job = Job(tmp_path, SCONTROL_FAILS="Requested operation is presently disabled for job 1234")
    stopped = job.stop("training_step@11", USR1)
    assert_stopped(stopped, 12)
    assert len(job.calls) == 2
    assert "Requested operation is presently disabled for job 1234" in stopped.log


def test_there_is_no_scontrol(tmp_path: Path) -> None:
    job = Job(tmp_path, with_scontrol=False)
    stopped = job.stop("training_step@11", USR1)
    assert_stopped(stopped, 12)
    assert "scontrol" in stopped.log
