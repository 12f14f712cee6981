"""torchrun starts a job again, and it ends with the bits of one that nothing happened to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from holdfast.checkpoint.load import load
from holdfast.strategies.attempts import attempt_store

from . import elastic_job
from .ranks import run_ranks, start_ranks

SCRIPT = Path(__file__).with_name("elastic_job.py")


class Torchrun:
    """A job under torchrun, with the lines that it says."""

    def __init__(self, root: Path, *wishes: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "--max-restarts=2", str(SCRIPT), str(root), *wishes,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def read_to(self, what: str) -> None:
        """Read on until a line has ``what``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if what in line:
                return
        raise AssertionError(f"it never said {what!r}:\n{self.output}")

    def end(self) -> int:
        """Read to the end; returns the exit code."""
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            self.lines += stdout
        return self.process.wait()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)  # the agent's processes go with it
            self.process.communicate()


@pytest.fixture
def torchrun() -> Iterator[Any]:
    jobs: list[Torchrun] = []

    def start(root: Path, *wishes: str) -> Torchrun:
        jobs.append(Torchrun(root, *wishes))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


def until_both_wait(root: Path, alive: Callable[[], bool]) -> None:
    while alive() and len(list(root.glob("reached-*"))) < 2:
        threading.Event().wait(0.01)


def assert_same_end(root: Path, other: Path) -> None:
    ours, theirs = (load(at / "final.ckpt") for at in (root, other))
    for key in ("state_dict", "optimizer_states"):
        for (path, mine), (_, its) in zip(tensors(ours[key]), tensors(theirs[key]), strict=True):
            assert torch.equal(mine, its), (key, path)


def tensors(value: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    return [one for key, item in items for one in tensors(item, f"{path}/{key}")]


def test_a_killed_rank_and_a_damaged_file_cost_nothing_but_time(tmp_path: Path, torchrun: Any) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = torchrun(killed, "kill", "damage")
    assert run_ranks(elastic_job.train, str(whole)) == [0, 0]
    assert job.end() == 0, job.output
    assert "failed (exitcode: -9) local_rank: 1" in job.output
    # Step 12 was the newest, and is spoilt.
    assert "step=9.ckpt  step 9  restored" in job.output, job.output
    assert "step=12.ckpt" in job.output.partition("step=9.ckpt  step 9  restored")[2], job.output
    assert_same_end(killed, whole)


def test_torchrun_that_is_asked_to_end_leaves_a_file_to_go_on_from(tmp_path: Path, torchrun: Any) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    job = torchrun(stopped, "wait")
    assert run_ranks(elastic_job.train, str(whole)) == [0, 0]
    until_both_wait(stopped, lambda: job.process.poll() is None)
    job.process.send_signal(signal.SIGTERM)  # which the agent hands on, and waits 30 seconds
    job.read_to("SIGTERM: saving")
    (stopped / "go").touch()
    assert job.end() != 0
    assert "closing signal SIGTERM" in job.output
    assert "SIGKILL" not in job.output
    assert (stopped / "checkpoints" / "stopped.ckpt").exists(), job.output
    began = run_ranks(elastic_job.train, str(stopped))
    assert began[0] == began[1] >= elastic_job.AT
    assert not (stopped / "checkpoints" / "stopped.ckpt").exists()
    assert_same_end(stopped, whole)


def test_a_rank_whose_peer_is_dead_writes_nothing_and_ends(tmp_path: Path) -> None:
    """What torchrun's agent does to the rest of a job: SIGTERM, when one of it has died already."""
    whole, root = tmp_path / "whole", tmp_path / "killed"
    job = start_ranks(elastic_job.train, str(root), "wait", env={"TORCHELASTIC_RESTART_COUNT": "0"})
    until_both_wait(root, lambda: all(process.is_alive() for process in job.processes))
    before = {path.name: path.read_bytes() for path in (root / "checkpoints").iterdir()}
    job.kill(1)
    job.processes[1].join()
    job.kill(0, signal.SIGTERM)
    (root / "go").touch()
    survivor, dead = job.wait(timeout_s=60)
    assert dead.code == -signal.SIGKILL
    assert survivor.code != 0
    assert "rank 1" in survivor.error + survivor.output
    assert "hung" not in survivor.error
    assert {path.name: path.read_bytes() for path in (root / "checkpoints").iterdir()} == before
    assert run_ranks(elastic_job.train, str(root)) == [12, 12]
    run_ranks(elastic_job.train, str(whole))
    assert_same_end(root, whole)


# -- each attempt has a store of its own ---------------------------------------------------------------------


def meet(patience_s: float = 60) -> tuple[str, bytes]:
    """What rank 0 has put into the store of this attempt, and that nothing was there before."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = attempt_store(rank, world_size, timedelta(seconds=patience_s))
    if rank == 0:
        assert not store.check(["who"])
        store.set("who", os.urandom(8).hex())
    found = store.get("who")
    store.add("done", 1)
    while store.add("done", 0) < world_size:
        pass
    return str(store), found


@pytest.fixture
def agent() -> tuple[Any, dict[str, str]]:
    """The store that torchrun's agent keeps for all attempts, and what it tells processes of it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_every_attempt_has_a_store_of_its_own(agent: Any) -> None:
    store, env = agent
    found = [run_ranks(meet, ranks=ranks, env=env) for ranks in (3, 2, 3)]
    for attempt in found:
        assert len({one[1] for one in attempt}) == 1
    assert len({attempt[0][1] for attempt in found}) == 3
    store.add("holdfast/attempts/asked", 1)  # a process died at the moment when it was to ask
    (after,) = {one[1] for one in run_ranks(meet, ranks=2, env=env)}
    assert after not in {attempt[0][1] for attempt in found}


def come_alone() -> str:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["RANK_THAT_COMES"], "3"
    try:
        meet(patience_s=0.1)
    except TimeoutError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("rank", "missing"), [("0", "2 of 3 processes"), ("2", "rank 0")])
def test_who_waits_in_vain_says_for_whom(agent: Any, rank: str, missing: str) -> None:
    store, env = agent
    (said,) = run_ranks(come_alone, ranks=1, env={**env, "RANK_THAT_COMES": rank})
    assert said == (
        f"{missing} did not come within the strategy's timeout. All processes of the job have to reach "
        f"MASTER_ADDR=127.0.0.1, MASTER_PORT={store.port}. See what they have said."
    )


def test_where_no_agent_keeps_a_store_there_is_nothing_to_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert attempt_store(0, 2, timedelta(seconds=1)) is None
