"""A long search for a file that does harm when it is opened: ``python -m tests.attacks.fuzz``.

Each seed is a file (`mutations`), opened by every reader in a process that is watched (`guard`). One that ends its
process, raises what is not holdfast's, takes memory out of proportion, writes or runs anything, or opens although a
byte of it was changed, is kept and told with its seed. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .guard import Guard, guarded, wrong_with
from .mutations import Case, case

CANARY_MODULE = "open('canary', 'w')\nclass Thing: pass\n"


def main(arguments: list[str] | None = None) -> int:
    """Search; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search (default: 10)")
    parser.add_argument("--seed", type=int, default=1000, help="where to start (default: 1000)")
    parser.add_argument("--out", type=Path, help="a file for the seeds that failed; always appended to")
    given = parser.parse_args(arguments)
    report, seed = Report(given.out), given.seed
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, guarded() as guard:
        ends = time.monotonic() + 60 * given.minutes
        with contextlib.suppress(KeyboardInterrupt):
            while seed == given.seed or time.monotonic() < ends:
                report.add(seed, *examine(seed, Path(scratch), guard))
                seed += 1
    print(f"{report.line()}\nseeds {given.seed} to {seed - 1}", flush=True)
    return 1 if report.failed else 0


def examine(seed: int, scratch: Path, guard: Guard) -> tuple[Case, dict[str, Any], list[str]]:
    """Have the file of one seed opened; returns what it was, what was told of it and what is wrong."""
    place = scratch / "place"
    place.mkdir(exist_ok=True)
    (place / "canary_module.py").write_text(CANARY_MODULE)
    made = case(seed)
    made.write(place / "a.ckpt")
    told = guard.open(place / "a.ckpt")
    wrong = wrong_with(told)
    there = {entry.name for entry in place.iterdir()} - {"a.ckpt", "canary_module.py"}
    if there:
        wrong.append(f"it left {sorted(there)} behind")
        shutil.rmtree(place)
    if made.must_fail and not wrong:
        wrong += [f"{name} opened it" for name in ("load", "verify") if not told["ended"][name][0]]
    return made, told, wrong


class Report:
    """What was opened, and what was wrong."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.began_s = self.said_s = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.failed: list[int] = []

    def add(self, seed: int, made: Case, told: dict[str, Any], wrong: list[str]) -> None:
        """Count one file; tell of what is wrong with it."""
        self.counts["files"] += 1
        self.counts[made.kind] += 1
        self.counts["opened"] += not told.get("ended", {}).get("load", ["died"])[0]
        if wrong:
            self.failed.append(seed)
            text = f"seed {seed} ({made.kind}):\n" + "".join(f"    {one}\n" for one in wrong)
            print(f"FAILED {text}", end="", flush=True)
            if self.out is not None:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                with self.out.open("a") as file:
                    file.write(text)
        if time.monotonic() - self.said_s > 60:
            self.said_s = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """Where the search stands."""
        minutes = (time.monotonic() - self.began_s) / 60
        kinds = [f"{kind} {n}" for kind, n in sorted(self.counts.items()) if kind not in ("files", "opened")]
        return (
            f"{minutes:5.1f} min: {self.counts['files']} files, {self.counts['opened']} of them opened, "
            f"{len(self.failed)} failed; {', '.join(kinds)}"
        )


if __name__ == "__main__":
    sys.exit(main())
