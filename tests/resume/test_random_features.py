"""Exactness over all features of a trainer that can live together: stopped anywhere, started again, compared.

Each example is a seed. A long search: HOLDFAST_FEATURES_EXAMPLES=2000 HOLDFAST_FEATURES_SEED=100000 pytest
tests/resume/test_random_features.py. A failure names the smallest plan that still fails.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import holdfast as pl
from holdfast.checkpoint.load import load

from .feature_callbacks import Stopped
from .feature_data import Plan
from .feature_plans import CHOICES, draw, fitted
from .features import make
from .harness import first_difference

EXAMPLES = int(os.environ.get("HOLDFAST_FEATURES_EXAMPLES", "30"))
FIRST = int(os.environ.get("HOLDFAST_FEATURES_SEED", "30"))

# Times of day and of the run, names that a run gives itself, lengths of event files, and in how many parts it
# is counted how often something was logged.
INCIDENTAL = {
    "saved_at", "run", "time_elapsed", "since_validation_s", "files",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + EXAMPLES))
def test_a_run_stopped_anywhere_ends_as_if_it_never_was(seed: int, tmp_path: Path) -> None:
    plan = draw(seed)
    found = differences(plan, tmp_path / "drawn")
    if found:
        small = shrunk(plan, lambda one: bool(differences(one, tmp_path / "small")))
        told = {name: value for name, value in small.items() if value != CHOICES.get(name, [None])[0]}
        again = differences(small, tmp_path / "small")
        pytest.fail("\n  ".join([f"seed {seed}:", *found[:4], f"and in small, {told}:", *again[:4]]))


def differences(plan: Plan, base: Path) -> list[str]:
    """Train whole; train stopped as often as the plan says, and on to the end; say where these differ."""
    shutil.rmtree(base, ignore_errors=True)
    whole, cut = base / "whole", base / "cut"
    whole.mkdir(parents=True), cut.mkdir()
    try:
        trainer, names = fit(plan, whole)
        expected = outcome(plan, trainer, whole)
        stop(plan, cut, names)
        path = exact_file(plan, cut) if plan["path"] else None
        trainer, _ = fit(plan, cut, ckpt_path=path or "auto")
        resumed = (cut / "resumed.log").read_text() if (cut / "resumed.log").exists() else ""
        if "False" in resumed:
            # Nothing but what an exception left was there to go on from: that is not exact.
            return [] if trainer.state.finished else ["the run did not finish"]
        seen = outcome(plan, trainer, cut)
    except Exception as error:  # to be shrunk like a difference
        return [f"raised: {''.join(traceback.format_exception(error))[-700:]}"]
    # What is there only a plugin of one's own knows; a run that starts anew leaves what another one left; and
    # the file that the user named stays.
    other_files = path is not None or plan["io"] in ("own", "async own") or not resumed
    if other_files:
        for one in (expected, seen):
            del one["names"], one["files"]
            forget_files(one["final"])
    if path is not None:
        expected, seen = (
            {name: value for name, value in one.items() if not name.startswith("logger")}
            for one in (expected, seen)
        )
    found = {name: first_difference(value, seen.get(name)) for name, value in expected.items()}
    return [f"{name}{where}"[:600] for name, where in found.items() if where is not None]


def stop(plan: Plan, root: Path, names: list[str]) -> None:
    """End the run in a hook, by an exception or a kill, and the one that goes on from it, and so on."""
    for number in range(plan["stops"]):
        hooks = len(names) if number == 0 else max(1, len(names) // 2)
        at = 1 + int(plan["places"][number] * hooks)
        if plan["stop_kind"] == "kill" and hasattr(os, "fork"):
            stopped = killed(plan, root, at)
        else:
            stopped = interrupted(plan, root, at)
        if not stopped:
            return


def interrupted(plan: Plan, root: Path, at: int) -> bool:
    try:
        fit(plan, root, at, "interrupt" if plan["stop_kind"] == "interrupt" else "error")
    except (Stopped, KeyboardInterrupt, SystemExit):
        return True
    return False


def killed(plan: Plan, root: Path, at: int) -> bool:
    """Train in a process of its own, which SIGKILL ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads, which the child never meets
        child = os.fork()
    if child == 0:
        try:
            fit(plan, root, at, "kill")
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run that was to be killed raised"
    return os.WIFSIGNALED(status)


def fit(
    plan: Plan, root: Path, at: int | None = None, kind: str = "error", ckpt_path: Any = "auto"
) -> tuple[pl.Trainer, list[str]]:
    """Start the run's command; returns the hooks that it went through."""
    pl.seed_everything(7, verbose=False)
    trainer, module, stopper, arguments = make(plan, root, at, kind)
    trainer.fit(module, ckpt_path=ckpt_path, **arguments)
    return trainer, stopper.names


def exact_file(plan: Plan, root: Path) -> Path | None:
    """One of the checkpoints to go on from, or None where there is none."""
    files = sorted(path for path in root.rglob("*.ckpt") if path.parent.name != "exceptions")
    exact = [path for path in files if read(plan, path)["holdfast"]["exact"]]
    return exact[int(plan["places"][2] * len(exact))] if exact else None


def read(plan: Plan, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path) if plan["io"] in ("own", "async own") else load(path)
    return found


def outcome(plan: Plan, trainer: pl.Trainer, root: Path) -> dict[str, Any]:
    """All that a run leaves, in memory and on disk."""
    final = root / "final.ckpt"
    trainer.save_checkpoint(final)
    trainer.strategy.checkpoint_io.teardown()
    found: dict[str, Any] = {
        "final": plain(read(plan, final), root),
        "counters": [trainer.global_step, trainer.current_epoch, trainer.should_stop],
        "callback metrics": dict(trainer.callback_metrics),
        "logged metrics": dict(trainer.logged_metrics),
        "modes": {name: child.training for name, child in trainer.lightning_module.named_modules()},
    }
    final.unlink()
    for number, logger in enumerate(trainer.loggers):
        found[f"logger {number}"] = logged(Path(logger.log_dir or ""))
    files = {plain(str(path), root): read(plan, path) for path in kept(trainer, root)}
    exact = {
        name: payload
        for name, payload in files.items()
        if payload["holdfast"]["kind"] == "weights" or payload["holdfast"]["exact"]
    }
    found["names"], found["files"] = list(exact), plain(exact, root)
    found["draws"] = [torch.rand(2), numpy.random.rand(2).tolist(), random.random()]
    return found


def kept(trainer: pl.Trainer, root: Path) -> list[Path]:
    """The run's checkpoints; a start that was killed before its first save has left another version."""
    mine = str(trainer.loggers[0].log_dir) + os.sep if trainer.loggers else ""
    files = [path for path in sorted(root.rglob("*.ckpt")) if path.parent.name != "exceptions"]
    return [path for path in files if "version_" not in str(path) or str(path).startswith(mine)]


def logged(directory: Path) -> dict[str, Any]:
    """The rows and the points of a logger's directory."""
    hparams = directory / "hparams.yaml"
    found: dict[str, Any] = {"hparams": hparams.read_text() if hparams.exists() else None}
    if (directory / "metrics.csv").exists():
        return {**found, "rows": (directory / "metrics.csv").read_text().splitlines()}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    points = {tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {**found, "points": dict(sorted(points.items()))}


def plain(value: Any, root: Path) -> Any:
    """The value without what differs between any two runs, and with its keys in order."""
    if isinstance(value, dict):
        pairs = {
            plain(key, root): "N" if key == "version" and isinstance(inner, int) else plain(inner, root)
            for key, inner in value.items()
            if key not in INCIDENTAL and not str(key).startswith("owner:")
        }
        return dict(sorted(pairs.items(), key=lambda pair: str(pair[0])))
    if type(value) in (list, tuple):
        return type(value)(plain(inner, root) for inner in value)
    if isinstance(value, (str, Path)):
        return re.sub(r"version_\d+", "version_N", str(value).replace(str(root), "<root>"))
    return value


def forget_files(payload: dict[str, Any]) -> None:
    states = payload["callbacks"]
    payload["callbacks"] = {k: v for k, v in states.items() if not str(k).startswith("ModelCheckpoint")}
    for name in ("loggers", "types", "summary"):
        payload["holdfast"].pop(name, None)


def shrunk(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """A smaller plan that fails too: one feature after the other goes back to its default."""
    for name, values in CHOICES.items():
        if plan[name] != values[0]:
            smaller = fitted({**plan, name: values[0]})
            # With fewer hooks, the same place is another one.
            for places in (plan["places"], *([n / 7, n / 5, n / 6] for n in range(1, 5))):
                if fails({**smaller, "places": places}):
                    plan = {**smaller, "places": places}
                    break
    return plan
