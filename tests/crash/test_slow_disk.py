"""A disk that is slower than the saves: training goes on beside one save, and waits before the next.

The disk takes a file when the test lets it, so which of the two is faster is no matter of luck.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from failing_run import SAVE_EVERY_N_STEPS, STEPS
from lives import Life
from saving_child import inventory

SAVES = 8


def wait_until_it_waits(life: Life) -> float:
    """Return once the process's main thread has nothing to do, and when that was."""
    state = Path(f"/proc/{life.pid}/task/{life.pid}/stat")
    before = None
    while True:
        words = state.read_text().rpartition(")")[2].split()
        now = (words[0], words[11], words[12])  # what it is doing, and how long it ever did something
        if now == before and now[0] == "S":
            return time.monotonic()
        before = now
        os.sched_yield()


def test_one_save_is_under_way_and_the_next_one_waits(tmp_path: Path) -> None:
    """Nothing queues up: not in memory, not on disk; and the wait is in the report of the save that waited."""
    root = tmp_path / "run"
    root.mkdir()
    life = Life(root, "saving_child", do="slowly", saves=SAVES)
    waits = []
    for number in range(1, SAVES + 1):
        life.hear("fact")
        assert [life.facts[-1][key] for key in ("alone", "temporary")] == [True, 1]
        if number < SAVES:
            # The one that is written has let the caller go on, up to where it asks for the next one.
            if ["asks", str(number + 1)] not in life.lines:
                life.hear("asks", str(number + 1))
            waits.append(wait_until_it_waits(life))
            assert life.said("asks")[-1] == [str(number + 1)]
        life.go().hear("fact")
    life.end()
    assert life.code == 0, life.log
    held = [said for said in life.facts if "alone" in said]
    assert len(held) == SAVES
    grown_bytes = held[-1]["anonymous_bytes"] - held[1]["anonymous_bytes"]
    assert grown_bytes < 10 << 20, "less than half a state"
    assert len({said["threads"] for said in held[1:]}) == 1
    let_go = [said["let_go"] for said in life.facts if "let_go" in said]
    assert life.facts[-1]["queued_s"] >= let_go[-2] - waits[-1] > 0
    goes_on = [line for line in life.lines if line[0] in ("asks", "goes")]
    pairs = itertools.chain.from_iterable(
        (["asks", str(number)], ["goes", "on", str(number)]) for number in range(1, SAVES + 1)
    )
    assert goes_on == list(pairs)
    assert set(inventory(root)) == {"0.ckpt", "1.ckpt"}


def test_training_goes_on_beside_a_save_and_waits_before_the_next(tmp_path: Path) -> None:
    """The run trains to its next save and no batch further; what it waited is known when it has ended."""
    root = tmp_path / "run"
    life = Life(root, "failing_run", slow=True, epochs=1)
    for step in range(SAVE_EVERY_N_STEPS, STEPS, SAVE_EVERY_N_STEPS):
        life.hear("disk", "waits")
        if ["step", str(step + SAVE_EVERY_N_STEPS)] not in life.lines:
            life.hear("step", str(step + SAVE_EVERY_N_STEPS))
        began = wait_until_it_waits(life)
        assert life.last_step == step + SAVE_EVERY_N_STEPS
        life.go().hear("disk", "goes")
        let_go = float(life.lines[-1][-1])
    life.hear("disk", "waits")
    life.go().end()
    assert life.code == 0, life.log
    assert life.facts[-1]["left"].keys() == {"last.ckpt"} | {
        f"epoch=0-step={step}.ckpt" for step in range(SAVE_EVERY_N_STEPS, STEPS + 1, SAVE_EVERY_N_STEPS)
    }
    assert life.facts[-1]["queued_s"] >= let_go - began > 0
    steps = [int(words[1]) for words in life.lines if words[0] == "step"]
    assert steps == list(range(1, STEPS + 1))
