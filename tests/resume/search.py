"""A long search for a resumed run that is not the one that never stopped: ``python -m tests.resume.search``.

It goes on until its time is over: rounds of seeds, each round in a process of its own, which is watched. A
failure is made smaller, told at once as a plan to paste into `feature_failures`, and the search goes on. The exit
code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Search; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.resume.search", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to search (default: 60)")
    parser.add_argument("--seed", type=int, default=1000, help="where to start (default: 1000)")
    parser.add_argument("--round", type=int, default=12, help="seeds in one process (default: 12)")
    parser.add_argument("--rounds", type=int, help="how many processes at the most (default: any number)")
    parser.add_argument(
        "--limit", type=int, default=300, help="seconds until one counts as hung (default: 300)"
    )
    parser.add_argument(
        "--shrinks", type=int, default=4, help="how many failures to make smaller (default: 4)"
    )
    parser.add_argument("--out", type=Path, help="a file for the plans that failed; always appended to")
    given = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * given.minutes
    report = Report(given.out)
    number, rounds = given.seed, 0
    with tempfile.TemporaryDirectory(prefix="search-") as scratch:
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < ends and not report.broken and rounds != given.rounds:
                one_round(number, given.round, given.limit, ends, Path(scratch), report, given.shrinks)
                number, rounds = number + given.round, rounds + 1
    report.say_all()
    print(f"seeds {given.seed} to {number - 1}", flush=True)
    return 1 if report.failures or report.broken else 0


class Report:
    """What the search has covered and found."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.began_s = self.said_s = time.monotonic()
        self.done = 0
        self.failures: list[dict[str, Any]] = []
        self.again = 0
        self.broken = False
        """A round ended without a single example: nothing can be searched."""
        self.counts: Counter[tuple[str, str]] = Counter()

    def example(self, told: dict[str, Any]) -> None:
        """Count one."""
        self.done += 1
        self.again += told["again"]
        self.counts.update((name, value) for name, value in told["covers"])
        if time.monotonic() - self.said_s > 60:
            self.said_s = time.monotonic()
            print(self.line(), flush=True)

    def failure(self, seed: int, plan: str, differences: list[str]) -> None:
        """Tell of one, and write it down."""
        self.failures.append({"plan": plan, "seed": seed})
        lines = "\n".join(f"    # {line}" for one in differences[:4] for line in one.splitlines())
        text = f"\n    # seed {seed}\n{lines}\n    {plan},\n"
        print(f"FAILED{text}", flush=True)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(text)

    def line(self) -> str:
        """Where the search stands, in one line."""
        minutes = (time.monotonic() - self.began_s) / 60
        kinds = [
            f"{value} {count}" for (name, value), count in sorted(self.counts.items()) if name == "ended by"
        ]
        resumed = [
            f"{value} {count}" for (name, value), count in sorted(self.counts.items()) if name == "went on"
        ]
        features = len({pair for pair in self.counts if pair[0] not in ("ended by", "ended in", "went on")})
        return (
            f"{minutes:5.1f} min: {self.done} configurations, {len(self.failures)} failed"
            f"{f' (and {self.again} like them)' if self.again else ''}; {features} features; stops: "
            f"{', '.join(kinds)}; went on: {', '.join(resumed)}"
        )

    def say_all(self) -> None:
        """Print how often each value of each feature was covered."""
        by_name: dict[str, list[str]] = {}
        for (name, value), count in sorted(self.counts.items(), key=lambda pair: (pair[0][0], -pair[1])):
            by_name.setdefault(name, []).append(f"{value} {count}")
        for name, values in by_name.items():
            print(f"  {name}: {', '.join(values)}")
        print(self.line())
        for failure in self.failures:
            print(f"  failed, seed {failure['seed']}: {failure['plan']}")


def one_round(
    seed: int, seeds: int, limit_s: float, ends: float, scratch: Path, report: Report, shrinks: int
) -> None:
    """Run one process for some seeds, and end it if it says nothing for too long or the time is over."""
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as place:
        said, write = os.pipe()
        job = {
            "seed": seed,
            "seeds": seeds,
            "known": [failure["plan"] for failure in report.failures],
            "shrinks": shrinks - len(report.failures),
            "pipe": write,
        }
        with open(os.path.join(place, "log"), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.resume.search_round", json.dumps(job)],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": place, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                start_new_session=True,
            )
        os.close(write)
        try:
            finished = listen(said, limit_s, ends, seed, report)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(said)
        if not finished:
            tail = Path(place, "log").read_text(errors="replace")[-3000:]
            print(f"seed {seed}: the process of this round ended early:\n{tail}", flush=True)


def listen(said: int, limit_s: float, ends: float, seed: int, report: Report) -> bool:
    """Read what the round tells; False if its process ended without the last word."""
    begun, text, examples = "", b"", 0
    while True:
        now = time.monotonic()
        if now >= ends:
            return True
        ready, _, _ = select.select([said], [], [], min(limit_s, ends - now))
        if not ready:
            if time.monotonic() < ends:
                report.failure(seed, begun, [f"it hung for {limit_s} s, and was killed"])
            return True
        chunk = os.read(said, 65536)
        if not chunk:
            report.broken = not examples
            if begun:
                report.failure(seed, begun, ["its process died"])
            return False
        *lines, text = (text + chunk).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if told["what"] == "begins":
                begun = told["plan"]
            elif told["what"] == "example":
                examples += 1
                report.example(told)
            elif told["what"] == "failure":
                report.failure(told["seed"], told["plan"], told["differences"])
            else:
                return True


if __name__ == "__main__":
    sys.exit(main())
