"""What importing holdfast costs over importing torch alone: medians over fresh processes, in random order.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --rounds 15 --json

Each process imports torch first and then reads the clock around what comes on top, so that torch's own
import (seconds, and noisy) is not in the difference. ``holdfast`` alone is also timed in a process that never
imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from importlib.util import find_spec

TARGET_S = 0.10

PROGRAM = """
import sys
{before}
from time import perf_counter
known = len(sys.modules)
start = perf_counter()
{timed}
print(perf_counter() - start, len(sys.modules) - known, "torch" in sys.modules)
"""

SUBJECTS = {
    "import torch": ("", "import torch"),
    "import holdfast": ("", "import holdfast"),
    "torch, then holdfast.Trainer": ("import torch", "import holdfast; holdfast.Trainer"),
    "torch, then every public name of holdfast": (
        "import torch",
        "import holdfast; [getattr(holdfast, name) for name in holdfast.__all__]",
    ),
    "torch, then accelerate.Accelerator": ("import torch", "import accelerate; accelerate.Accelerator"),
    "torch, then lightning.pytorch.Trainer": ("import torch", "import lightning.pytorch as pl; pl.Trainer"),
}
HELD_TO_TARGET = (
    "import holdfast",
    "torch, then holdfast.Trainer",
    "torch, then every public name of holdfast",
)


def time_once(subject: str) -> tuple[float, int]:
    """Seconds and number of newly imported modules, from one fresh process."""
    before, timed = SUBJECTS[subject]
    program = PROGRAM.format(before=before, timed=timed)
    # Packages are compiled when they are installed; a checkout is at its first import, unless that is off.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    seconds, modules, _ = done.stdout.split()
    return float(seconds), int(modules)


def measure(rounds: int, shuffler: random.Random) -> list[dict[str, object]]:
    needs = {"accelerate": "accelerate", "lightning": "lightning"}
    subjects = [
        name
        for name in SUBJECTS
        if all(find_spec(package) for word, package in needs.items() if word in name)
    ]
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in subjects}
    for round_number in range(rounds + 1):  # the first round fills the page cache and is not recorded
        for name in shuffler.sample(subjects, len(subjects)):
            run = time_once(name)
            if round_number > 0:
                runs[name].append(run)
    rows: list[dict[str, object]] = []
    for name, own in runs.items():
        seconds = statistics.median(run[0] for run in own)
        target = TARGET_S if name in HELD_TO_TARGET else None
        verdict = "" if target is None else "pass" if seconds <= target else "MISS"
        rows.append(
            {"subject": name, "seconds": seconds, "modules": own[0][1], "target": target, "verdict": verdict}
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed processes a subject (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the processes")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.rounds, random.Random(arguments.seed))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("| timed | seconds | new modules | target | |\n|---|---:|---:|---:|---|")
    for row in rows:
        target = "" if row["target"] is None else f"<= {row['target']:.2f}"
        print(f"| {row['subject']} | {row['seconds']:.3f} | {row['modules']} | {target} | {row['verdict']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
