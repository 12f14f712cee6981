"""The search itself: it sees what it is for, tells it in small, and goes on whatever happens to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from . import search_round
from .feature_data import Plan, Rows
from .feature_plans import plan_of
from .feature_runs import Found, search
from .feature_stops import Stopper
from .search import ROOT, Report, listen

pytestmark = pytest.mark.filterwarnings("ignore")


def test_two_rows_that_change_places_in_a_batch_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight, setup = Rows.__getitem__, Stopper.setup

    def swapped(self: Rows, index: int) -> Any:
        return straight(self, {9: 10, 10: 9}.get(index, index))

    def setup_and_swap(self: Stopper, trainer: Any, *rest: Any) -> None:
        setup(self, trainer, *rest)
        if trainer.resumed_from is not None:
            monkeypatch.setattr(Rows, "__getitem__", swapped)

    monkeypatch.setattr(Stopper, "setup", setup_and_swap)
    found = search(plan_of({}), tmp_path / "runs")
    assert found.resumed == ["csv/version_0/checkpoints/epoch=0-step=3.ckpt True"]
    assert any(line.startswith("callback metrics/rows: ") for line in found.differences)


def told(monkeypatch: pytest.MonkeyPatch, wrong: Any, **job: Any) -> list[dict[str, Any]]:
    """What a round tells where a plan that is ``wrong`` fails."""

    def tried(plan: Plan, base: Path) -> Found:
        return Found(["it differs"] if wrong(plan) else [], ["kill on_fit_end"], ["last.ckpt True"])

    monkeypatch.setattr(search_round, "search", tried)
    with tempfile.TemporaryFile() as said:  # nobody reads in the meantime, and a pipe would be full soon
        job = {"seed": 3, "seeds": 4, "known": [], "shrinks": 4, "pipe": said.fileno(), **job}
        search_round.Round(job).run()
        said.seek(0)
        return [json.loads(line) for line in said]


def test_a_failure_is_told_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, lambda plan: plan["hyper"] and plan["metrics"])
    assert lines[-1] == {"what": "done"}
    failures = [line for line in lines if line["what"] == "failure"]
    # Once: what fails like it in the seeds that follow is counted.
    assert [(one["plan"], one["differences"]) for one in failures] == [
        ("{'metrics': True, 'hyper': True}", ["it differs"])
    ]
    assert sum(line.get("again", False) for line in lines) > 0


def test_what_failed_before_is_counted_and_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, lambda plan: plan["shuffle"], known=["{'shuffle': True, 'stops': 2}"])
    assert not [line for line in lines if line["what"] == "failure"]
    assert sum(line.get("again", False) for line in lines) > 0


def test_an_example_that_hangs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said, write = os.pipe()
    os.write(write, b'{"what": "begins", "plan": "{\'shuffle\': True}"}\n')
    report = Report(None)
    assert listen(said, 0.1, time.monotonic() + 60, 7, report)
    os.close(write), os.close(said)
    assert report.failures == [{"plan": "{'shuffle': True}", "seed": 7}]
    assert capsys.readouterr().out == (
        "FAILED\n    # seed 7\n    # it hung for 0.1 s, and was killed\n    {'shuffle': True},\n\n"
    )


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    said, write = os.pipe()
    os.write(write, b'{"what": "begins", "plan": "{\'shuffle\': True}"}\n')
    os.close(write)
    report = Report(tmp_path / "out" / "failed.txt")
    assert not listen(said, 60, time.monotonic() + 60, 7, report)
    os.close(said)
    assert (tmp_path / "out" / "failed.txt").read_text() == (
        "\n    # seed 7\n    # its process died\n    {'shuffle': True},\n"
    )


def test_the_command_says_what_it_covered_and_cleans_up() -> None:
    # Not pytest's directory, whose path is so long that workers can have no sockets in it.
    with tempfile.TemporaryDirectory() as scratch:
        ended = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.resume.search",
                "--seed=6",
                "--round=1",
                "--rounds=1",
                "--shrinks=0",
            ],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": scratch},
            capture_output=True,
            text=True,
        )
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
        assert ": 9 configurations, 0 failed; " in ended.stdout
        assert ended.stdout.endswith("seeds 6 to 6\n")
        assert os.listdir(scratch) == []
