"""Several processes that save into one directory: none loses, overwrites or deletes what is another's."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import torch
from failing_run import STEPS
from lives import STOPPED, Life, stop
from saving_child import inventory

from holdfast.checkpoint import commit
from holdfast.checkpoint.load import load


def whose(shared: Path) -> dict[str, tuple[str, int]]:
    """Which run each file is of, and of which step; every byte is checked."""
    loaded = {path.name: load(path) for path in shared.iterdir() if not commit.is_temporary(path.name)}
    return {name: (Path(held["who"]).name, held["global_step"]) for name, held in loaded.items()}


def said_saved(life: Life) -> dict[str, int]:
    """The files that a run said it has saved, and did not say it has deleted since, and the step of each."""
    kept: dict[str, int] = {}
    pattern = r"^saved (\S+)(?: \(also (\S+)\))?  step (\d+)  (?:.*?  deleted (.*))?"
    for first, second, step, deleted in re.findall(pattern, life.log, re.M):
        kept.update({name: int(step) for name in (first, second) if name})
        for name in deleted.split(", "):
            # Two that look for a free name at one moment may both go on to the next; later it is free again.
            kept.pop(name, None)
    return kept


def assert_each_has_its_own(shared: Path, *lives: Life) -> None:
    there = whose(shared)
    for life in lives:
        assert life.code == 0 and life.facts[-1]["failure"] is None, life.log
        saved = said_saved(life)
        assert {name: there[name] for name in saved} == {
            name: (life.root.name, step) for name, step in saved.items()
        }
    assert list(shared.glob(".*")) == []


def assert_goes_on_alone(root: Path, shared: Path, seed: int, reference: Path) -> None:
    """Started again on its own file, the run ends as it does in a directory that nobody else uses."""
    mine = [name for name, (who, step) in whose(shared).items() if (who, step) == (root.name, 20)]
    before = whose(shared)
    life = start(root, shared, seed, ckpt_path=str(shared / min(mine))).end()
    assert life.code == 0, life.log
    after = whose(shared)
    assert {name: of for name, of in before.items() if of[0] != root.name}.items() <= after.items()
    weights, expected = torch.load(root / "final.pt"), torch.load(reference / "final.pt")
    assert [name for name in expected if not weights[name].equal(expected[name])] == []


def start(root: Path, shared: Path, seed: int, **options: Any) -> Life:
    options = {"ckpt_path": None, **options}
    return Life(root, "failing_run", directory=str(shared), seed=seed, **options)


def test_two_runs_at_once(tmp_path: Path) -> None:
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    for seed in (1, 2):
        assert start(tmp_path / f"reference{seed}", alone / str(seed), seed).end().code == 0
    lives = [start(tmp_path / f"run{seed}", shared, seed) for seed in (1, 2)]
    for life in lives:
        life.end()
    assert_each_has_its_own(shared, *lives)
    for seed in (1, 2):
        assert_goes_on_alone(tmp_path / f"run{seed}", shared, seed, tmp_path / f"reference{seed}")


def test_a_run_that_is_held_up_in_a_save_while_another_one_takes_the_name(tmp_path: Path) -> None:
    """Whichever comes second has another name for its file, and nobody's is lost."""
    shared = tmp_path / "shared"
    slow = start(tmp_path / "slow", shared, 1, at={"6": [["hold", "synced"]]}).reach("synced")
    quick = start(tmp_path / "quick", shared, 2).end()
    slow.go().end()
    assert (slow.facts[-1]["step"], quick.facts[-1]["step"]) == (STEPS, STEPS), slow.log
    assert_each_has_its_own(shared, slow, quick)


def test_what_a_killed_save_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()

    def begin(number: int) -> Life:
        return Life(shared, "saving_child", do="hold_a_save", saver="background", number=number).hear(
            "holding"
        )

    dead, living = begin(1), begin(2)
    (of_the_dead,) = dead.said("holding")[0]
    (of_the_living,) = set(living.said("holding")[0]) - {of_the_dead}
    assert dead.kill().code == -signal.SIGKILL
    other = Life(shared, "saving_child", do="save", saver="foreground", numbers=[3]).end()
    assert other.code == 0, other.log
    assert inventory(shared) == {"a.ckpt": 3, "last.ckpt": 3, of_the_living: None}
    living.go().end()
    assert living.facts == [{"end": {"a.ckpt": 2, "last.ckpt": 2}}], living.log


def test_two_runs_that_are_told_to_stop_at_once(tmp_path: Path) -> None:
    """Each leaves a file of its own, although both had found the name free."""
    shared = tmp_path / "shared"
    options: dict[str, Any] = {"dirpath": str(shared), "ckpt_path": None}
    slow = Life(tmp_path / "slow", pause=["training_step@11", "synced@12"], **options)
    slow.reach("training_step@11").send(signal.SIGTERM).go().reach("synced@12")
    quick = stop(tmp_path / "quick", "training_step@13", signal.SIGTERM, **options)
    slow.go().end()
    assert (slow.code, quick.code) == (STOPPED, STOPPED), slow.log
    stopped = {path.name: load(path)["global_step"] for path in shared.glob("stopped*.ckpt")}
    assert stopped == {"stopped.ckpt": 12, "stopped-v1.ckpt": 14}
    assert list(shared.glob(".*")) == []


def test_a_run_and_a_checkpointer(tmp_path: Path) -> None:
    """Each deletes what is its own only, and goes on from what is its own."""
    shared = tmp_path / "shared"
    shared.mkdir()

    def checkpoint(*numbers: int) -> Life:
        return Life(shared, "saving_child", do="save", saver="Checkpointer", numbers=numbers)

    kept = {"every_n_train_steps": 4, "save_top_k": 1}
    run, other = start(tmp_path / "run", shared, 1, checkpoint=kept), checkpoint(*range(1, 31))
    run.end(), other.end()
    assert (run.code, other.code) == (0, 0), run.log + other.log
    assert run.facts[-1]["failure"] is None
    of_the_run = {f"epoch=2-step={STEPS}.ckpt", "last.ckpt"}
    of_the_other = {f"step={number:08d}.ckpt" for number in (28, 29, 30)}
    assert {path.name for path in shared.iterdir()} == of_the_run | of_the_other
    again = checkpoint(31).end()
    assert (again.code, again.facts) == (0, [{"restored": 30}]), again.log
    for newest in ("auto", "last"):
        run = start(tmp_path / "run", shared, 1, ckpt_path=newest, checkpoint=kept).end()
        assert (run.code, run.facts[-1]["step"], run.steps) == (0, STEPS, []), run.log
        assert "passed over" not in run.log
    assert {path.name for path in shared.iterdir()} == of_the_run | {
        f"step={number:08d}.ckpt" for number in (29, 30, 31)
    }
