"""Which checkpoint of a directory is meant: where "auto" starts, which is the best, which are one file.

Pure decisions about what `catalog.scan` found; needs no torch.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint import directories, ownership
from holdfast.checkpoint.catalog import Entry
from holdfast.checkpoint.retention import Ranked, best_first

_OWNER = "owner:"
_MONITORED = re.compile(
    r"""\{'monitor': ('(?:[^'\\]|\\.){0,500}'|"(?:[^"\\]|\\.){0,500}"), 'mode': '(min|max)'"""
)


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """Sort by the time of the save, then by the step, then by name."""
    return sorted(entries, key=lambda e: (e.saved_at, -1 if e.step is None else e.step, e.path), reverse=True)


def auto_order(entries: Iterable[Entry], *, for_fit: bool = True) -> list[Entry]:
    """The order in which ``ckpt_path="auto"`` tries checkpoints, those that are not whole included.

    A file that was saved inside a hook goes on from somewhere near, an older one from a safe point goes on
    exactly: so the inexact ones come last. What is not whole, or turns out to be damaged, is passed over.
    What a `Checkpointer` or `holdfast.save` wrote without a ``state_dict`` is no trainer's.

    Args:
        entries: what lies in the directories of a run.
        for_fit: a run shall go on from it; then files that hold weights alone are left out.
    """
    candidates = newest_first(
        entry for entry in entries if _is_a_trainers(entry) and (entry.kind != "weights" or not for_fit)
    )
    first = [entry for entry in candidates if entry.exact or entry.foreign or not entry.whole]
    chosen = {id(entry) for entry in first}
    ordered = first + [entry for entry in candidates if id(entry) not in chosen]
    # How old one is that cannot even be opened nobody knows: it may be the newest, so it is named first.
    return sorted(ordered, key=lambda entry: entry.whole or entry.saved_at > 0)


def auto(entries: Iterable[Entry]) -> Entry | None:
    """Where ``ckpt_path="auto"`` starts, if its bytes are as whole as its structure; None for afresh.

    None also where not one candidate is whole: then "auto" refuses to start.
    """
    return next((entry for entry in auto_order(entries) if entry.whole), None)


def restore(entries: Iterable[Entry]) -> Entry | None:
    """Where `Checkpointer.restore` starts, if that file's bytes are as whole as its structure.

    Args:
        entries: what lies in its directory.
    """
    owned = [one for one in map(ownership.owned, entries) if one is not None]
    newest = max(
        owned, key=lambda o: (o.order, o.entry.saved_at, o.entry.step or 0, o.entry.path), default=None
    )
    return None if newest is None else newest.entry


def last(entries: Iterable[Entry]) -> Entry | None:
    """The newest that is whole and holds more than weights: for a trainer, ``ckpt_path="last"``."""
    candidates = (entry for entry in newest_first(entries) if _is_a_trainers(entry))
    return next((entry for entry in candidates if entry.whole and entry.kind != "weights"), None)


def _is_a_trainers(entry: Entry) -> bool:
    """Whether a trainer could go on from it, as far as its tail tells."""
    return entry.kind != "state" and (not entry.contents or "state_dict" in entry.contents)


@dataclass(frozen=True)
class Standing:
    """What a file says that a callback ranked it on."""

    monitor: str
    mode: str
    score: float


def standings(entry: Entry) -> list[Standing]:
    """Read off a file's summary what it was ranked on, by each callback that saved it.

    A further name of a file, such as ``last.ckpt``, is not ranked, nor is a file that somebody renamed.
    """
    found = []
    for key, owner in entry.values.items():
        if not key.startswith(_OWNER) or not isinstance(owner, dict):
            continue
        names, score = owner.get("names"), _number(owner.get("score"))
        told = _MONITORED.search(str(owner.get("callback"))[:2000])
        if (
            told
            and score is not None
            and isinstance(names, list)
            and names[:1] == [os.path.basename(entry.path)]
        ):
            try:
                found.append(Standing(ast.literal_eval(told[1]), told[2], score))
            except (ValueError, SyntaxError):  # a name that no repr() wrote
                continue
    return found


def best(scores: Sequence[tuple[Entry, float]], mode: str) -> Entry | None:
    """The best of some whole checkpoints by a score; of equals the oldest, and never one with NaN.

    Args:
        scores: each with its score.
        mode: "min" or "max": which end is better.
    """
    by_path = {entry.path: entry for entry, _ in scores}
    oldest_first = reversed(newest_first(by_path.values()))
    of = {entry.path: score for entry, score in scores}
    ranked = best_first([Ranked(entry.path, of[entry.path]) for entry in oldest_first], mode)
    return by_path[ranked[0].path] if ranked and ranked[0].score == ranked[0].score else None


def second_names(entries: Sequence[Entry], first: Iterable[str] = ()) -> dict[str, str]:
    """Which names are further names of another one's file: each with that other one.

    Args:
        entries: what was found.
        first: paths that are to be the name of their file, where there is a choice.
    """
    wanted = set(first)
    groups: dict[tuple[int, int], list[str]] = {}
    for entry in entries:
        try:
            groups.setdefault(identity(entry.path), []).append(entry.path)
        except OSError:
            continue
    found: dict[str, str] = {}
    for paths in groups.values():
        paths.sort(key=lambda path: (path not in wanted, os.path.islink(path), _is_last(path), path))
        found |= dict.fromkeys(paths[1:], paths[0])
    return found


def identity(path: str) -> tuple[int, int]:
    """What two names of one checkpoint have in common: the file, or of a directory the manifest in it.

    Raises:
        OSError: there is none.
    """
    status = os.stat(directories.standing(path))
    if directories.is_sharded(path):
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(directories.standing(path), directories.MANIFEST))
    return status.st_dev, status.st_ino


def _is_last(path: str) -> bool:
    return os.path.basename(path).startswith("last")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
