"""Which files in a checkpoint directory are a run's own, across all the times it was killed and resumed.

A run gets an id when it starts fresh; the id is in every file that its callback writes and in the
callback's state, so a resumed run knows its own files from those of other runs in the same directory.
Only files with the id are ever overwritten, ranked again or swept up.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from typing import Any

from holdfast.checkpoint import catalog
from holdfast.checkpoint.retention import Found
from holdfast.errors import CheckpointError
from holdfast.utilities.rank_zero import rank_zero_warn


def new_run_id() -> str:
    """Return an id that no other run has, without touching any generator that training draws from."""
    return os.urandom(8).hex()


def summary_extra(state_key: str, *, run: str | None, name: str, score: float | None) -> dict[str, Any]:
    """Say in a file's summary which callback and run it belongs to, and what it was ranked on.

    Args:
        state_key: The callback's state key.
        run: The run's id; None for a file that retention shall have nothing to do with.
        name: The path that is ranked; other names of the same content, such as ``last``, are not.
        score: The value that it was ranked on; None if it wasn't.
    """
    # JSON has no form for infinities and NaN; a string brings every float back exactly.
    text = None if score is None else repr(float(score))
    return {"callback": state_key, "run": run, "name": os.path.basename(name), "score": text}


def describe(path: str) -> Found | None:
    """Read one file's tail; None when it isn't a whole checkpoint of ours."""
    try:
        summary = catalog.read_summary(path)
    except (CheckpointError, OSError):
        return None
    extra = summary.values
    score = extra.get("score")
    ranked = score is not None and extra.get("name") == os.path.basename(path)
    return Found(
        path=os.path.abspath(path),
        step=int(summary.step or 0),
        run=extra.get("run"),
        score=float(str(score)) if ranked else None,
    )


def describe_all(directory: str, *, also: Iterable[str] = (), recursive: bool = False) -> dict[str, Found]:
    """Read the tails of all whole checkpoints under ``directory``, and of the files in ``also``.

    Those that something else than holdfast wrote are there with no run and no score.
    """
    found: dict[str, Found] = {}
    paths = [os.path.abspath(path) for path in also]
    if os.path.isdir(directory):
        paths += [os.path.abspath(entry.path) for entry in catalog.scan(directory, recursive=recursive)]
    for path in dict.fromkeys(paths):
        one = describe(path)
        if one is not None:
            found[path] = one
        elif os.path.isfile(path) and zipfile.is_zipfile(path):
            found[path] = Found(path, step=0)
    return found


def remove(path: str, *, inside: str, protected: str | None) -> bool:
    """Delete one checkpoint file and tell whether it was deleted.

    Left alone are directories, whatever is not inside the directory ``inside``, and every name of the
    file ``protected``.
    """
    directory = os.path.realpath(os.path.dirname(path))
    root = os.path.realpath(inside)
    if os.path.commonpath([directory, root]) != root:
        return False
    if os.path.isdir(path) and not os.path.islink(path):
        return False
    if is_same_file(path, protected):
        return False
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        rank_zero_warn(f"{path} should have made way for a newer checkpoint, but: {error}.")
        return False
    return True


def is_same_file(path: str, other: str | None) -> bool:
    """Tell whether both are names of one file, through links of any kind."""
    if other is None or not os.path.exists(path) or not os.path.exists(other):
        return False
    return os.path.samefile(path, other)
