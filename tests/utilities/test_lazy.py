"""Names that are loaded when they are first used."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys, torch
{before}
collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]) if phase == "start" else None)
import holdfast
before = len(collected)
holdfast.Trainer
passes = len(collected) - before
print(passes, gc.isenabled())
"""


def in_a_child(before: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def test_the_collector_keeps_out_until_a_name_is_loaded() -> None:
    # One pass may come right after: over what is new, not over everything.
    passes, enabled = in_a_child("")
    assert int(passes) <= 1
    assert enabled == "True"


def test_a_collector_that_is_off_stays_off() -> None:
    assert in_a_child("gc.disable()") == ["0", "False"]
