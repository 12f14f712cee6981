"""Names that are loaded when they are first used."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys, torch
{before}
collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
import holdfast
before = len(collected)
holdfast.Trainer
print(len(collected) - before, gc.isenabled())
"""


def in_a_child(before: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def test_loading_a_name_has_the_collector_pass_over_nothing() -> None:
    assert in_a_child("") == ["0", "True"]


def test_a_collector_that_is_off_stays_off() -> None:
    assert in_a_child("gc.disable()") == ["0", "False"]
