"""All that a run leaves, in memory and on disk, in a form in which two runs can be compared."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy
import torch

import holdfast as pl
from holdfast.checkpoint import catalog
from holdfast.checkpoint.load import load
from holdfast.errors import CheckpointError

from .feature_data import Plan

# Times of day and of the run, names that a run gives itself, lengths of event files, and in how many parts it
# is counted how often something was logged.
INCIDENTAL = frozenset(
    {"saved_at", "run", "time_elapsed", "since_validation_s", "files", "mark", "_base_seed"}
)
# With how many workers the batches were loaded, how far those were ahead, and whether torchdata's had been asked
# for one row more after the last.
OF_WORKERS = frozenset({"workers", "drawn", "ended", "fetcher_ended"})
# In the middle of an epoch: with what says how much was drawn, it comes back to the same row, however far workers were ahead.
OWN_GENERATORS = "the loader's own generators"
# What the run that was stopped had less of, and what followed from it: its epoch was cut short and saved.
# Where nothing was due by then, `last` was saved at its end: files of later lives know of it sooner.
OF_TIME = frozenset({"limits", "should_stop", "evict", "last_model_path"})


def read(plan: Plan, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path) if plan["io"] in ("own", "async own") else load(path)
    return found


def exact_file(plan: Plan, root: Path) -> Path | None:
    """One of the checkpoints to go on from, or None where there is none."""
    files = sorted(path for path in root.rglob("*.ckpt") if path.parent.name != "exceptions")
    exact = [path for path in files if read(plan, path)["holdfast"]["exact"]]
    return exact[int(plan["file"] * len(exact))] if exact else None


def outcome(plan: Plan, trainer: pl.Trainer, root: Path) -> dict[str, Any]:
    """All that a run leaves."""
    final = root / "final.ckpt"
    leave_out = INCIDENTAL | OF_WORKERS | (OF_TIME if "time" in plan["kinds"] else frozenset())
    leave_out |= {OWN_GENERATORS} if plan["other_workers"] else frozenset()
    trainer.save_checkpoint(final)
    trainer.strategy.checkpoint_io.teardown()
    found: dict[str, Any] = {
        "final": plain(read(plan, final), root, leave_out),
        "counters": [trainer.global_step, trainer.current_epoch, trainer.should_stop],
        "callback metrics": dict(trainer.callback_metrics),
        "logged metrics": dict(trainer.logged_metrics),
        "modes": {name: child.training for name, child in trainer.lightning_module.named_modules()},
    }
    final.unlink()
    for number, logger in enumerate(trainer.loggers):
        found[f"logger {number}"] = logged(Path(logger.log_dir or ""))
    files = {path: read(plan, path) for path in kept(plan, trainer, root)}
    exact = {
        plain(str(path), root): payload
        for path, payload in files.items()
        if payload["holdfast"]["exact"]
        or (payload["holdfast"]["kind"] == "weights" and not left_by_an_exception(path))
    }
    found["names"], found["files"] = list(exact), plain(exact, root, leave_out)
    found["stopped"] = overtaken(exact, root)
    found["draws"] = [torch.rand(2), numpy.random.rand(2).tolist(), random.random()]
    return found


def kept(plan: Plan, trainer: pl.Trainer, root: Path) -> list[Path]:
    """The run's checkpoints.

    Not among them are another version's, which a start that was killed before its first save has left, and what
    a signal left: the run that goes on from that deletes it with its next save, if there is one.
    """
    mine = str(trainer.loggers[0].log_dir) + os.sep if trainer.loggers else ""
    files = [path for path in sorted(root.rglob("*.ckpt")) if path.parent.name != "exceptions"]
    files = [path for path in files if not path.name.startswith("stopped")]
    if "time" in plan["kinds"]:  # a life that ended for lack of time saved its end as `last`
        files = [path for path in files if not path.name.startswith("last")]
    return [path for path in files if "version_" not in str(path) or str(path).startswith(mine)]


def overtaken(exact: dict[str, Any], root: Path) -> list[str]:
    """What a signal left, although the run has saved something newer than it since."""
    full = [payload for payload in exact.values() if payload["holdfast"]["kind"] == "full"]
    newest = max((payload["global_step"] for payload in full), default=0)
    left = [
        path
        for path in root.rglob("stopped*.ckpt")
        if plain(str(path.parent), root) in map(os.path.dirname, exact)
    ]
    return [path.name for path in left if load(path)["global_step"] < newest]


def left_by_an_exception(path: Path) -> bool:
    """Whether a stopped run has saved it on its way out; no run that goes on knows of it."""
    try:
        values = catalog.read_summary(str(path)).values
    except CheckpointError:  # a plugin's, which names no owner
        return False
    return any(str(key).startswith("exception:") for key in values)


def logged(directory: Path) -> dict[str, Any]:
    """The rows and the points of a logger's directory."""
    if not directory.exists():
        return {}
    hparams = directory / "hparams.yaml"
    found: dict[str, Any] = {"hparams": hparams.read_text() if hparams.exists() else None}
    if (directory / "metrics.csv").exists():
        return {**found, "rows": (directory / "metrics.csv").read_text().splitlines()}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    points = {tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {**found, "points": dict(sorted(points.items()))}


def plain(value: Any, root: Path, leave_out: frozenset[str] = INCIDENTAL) -> Any:
    """The value without what differs between any two runs, and with its keys in order."""
    if isinstance(value, dict):
        if OWN_GENERATORS in leave_out and "begin" in value and "now" in value:
            value = {**value, "now": plain(value["now"], root, leave_out | {"own"})}
        pairs = {
            plain(key, root): "N"
            if key == "version" and isinstance(inner, int)
            else plain(inner, root, leave_out)
            for key, inner in value.items()
            if key not in leave_out and not str(key).startswith(("owner:", "stopped:"))
        }
        return dict(sorted(pairs.items(), key=lambda pair: str(pair[0])))
    if type(value) in (list, tuple):
        return type(value)(plain(inner, root, leave_out) for inner in value)
    if isinstance(value, (str, Path)):
        return re.sub(r"version_\d+", "version_N", str(value).replace(str(root), "<root>"))
    return value


def without_files(found: dict[str, Any]) -> dict[str, Any]:
    """The outcome without the files, and without what callbacks know of files."""
    found = {name: value for name, value in found.items() if name not in ("names", "files", "stopped")}
    payload = {**found["final"], "holdfast": dict(found["final"]["holdfast"])}
    states = payload["callbacks"]
    payload["callbacks"] = {k: v for k, v in states.items() if not str(k).startswith("ModelCheckpoint")}
    for name in ("loggers", "types", "summary"):
        payload["holdfast"].pop(name, None)
    return {**found, "final": payload}


def without_loggers(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.startswith("logger")}
