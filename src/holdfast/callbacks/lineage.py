"""Which files in a checkpoint directory are a run's own, across all the times it was killed and resumed.

A run gets an id when it starts fresh. The id is in the summary of every file that its callback writes, with
the names that the callback gave to that file, and it is in the callback's state: so a resumed run knows its
own files from those of other runs, and of other callbacks, in the same directory. Only its own files are
ever written over, ranked again or swept up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint import catalog, commit, directories
from holdfast.checkpoint.retention import Found
from holdfast.errors import CheckpointError
from holdfast.utilities.rank_zero import rank_zero_warn

_OWNER = "owner:"
_ON_EXCEPTION = "exception:"
_STOPPED = "stopped:"
_LONGEST_NAME_BYTES = 255  # of every file system in use


def new_run_id() -> str:
    """Return an id that no other run has, without touching any generator that training draws from."""
    return os.urandom(8).hex()


def summary_extra(state_key: str, *, run: str, names: Sequence[str], score: float | None) -> dict[str, Any]:
    """Say in a file's summary whose it is under which names, and what it was ranked on.

    Several callbacks may save into one file; each says it under a key of its own.

    Args:
        state_key: The callback's state key.
        run: The run's id.
        names: The paths that the callback gives to the file; only the first is ranked.
        score: The value that it was ranked on; None if it wasn't.
    """
    # JSON has no form for infinities and NaN; a string brings every float back exactly.
    text = None if score is None else repr(float(score))
    named = [os.path.basename(name) for name in names]
    return {f"{_OWNER}{run}": {"callback": state_key, "names": named, "score": text}}


def exception_extra(state_key: str, *, run: str) -> dict[str, Any]:
    """Say in a file's summary that an exception made a run save it.

    It names no owner, so such a file is never ranked and never swept up.
    """
    return {f"{_ON_EXCEPTION}{run}": {"callback": state_key}}


def stopped_extra(run: str, path: str, batches: int) -> dict[str, Any]:
    """Say in a file's summary that a run was stopped there, and under which name that is its own.

    Args:
        run: The run's id.
        path: Where the file goes.
        batches: How many batches are trained in it.
    """
    return {f"{_STOPPED}{run}": {"names": [os.path.basename(path)], "batches": batches}}


def stopped_in(summary: Mapping[str, Any], name: str, run: str | None) -> int | None:
    """Tell from a file's summary how many batches are in it; None unless ``run`` was stopped with it."""
    owner = summary.get(f"{_STOPPED}{run}")
    batches = owner.get("batches") if isinstance(owner, dict) and name in _names(owner) else None
    return batches if isinstance(batches, int) else None


def stopped_at(path: str, run: str | None) -> int | None:
    """Do as `stopped_in` from the file's tail; None also when it isn't a whole checkpoint of ours."""
    try:
        summary = catalog.read_summary(path)
    except (CheckpointError, OSError):
        return None
    return stopped_in(summary.values, os.path.basename(path), run)


def describe(path: str, run: str | None = None) -> Found | None:
    """Read one file's tail; None when it isn't a whole checkpoint of ours.

    Args:
        path: The file.
        run: The run whose it is, if that is among those it is; others may have a file of this name elsewhere.
    """
    try:
        summary = catalog.read_summary(path)
    except (CheckpointError, OSError):
        return None
    place, name = os.path.abspath(path), os.path.basename(path)
    owners = [key for key in summary.values if key.startswith(_OWNER)]
    for key in sorted(owners, key=lambda key: key != f"{_OWNER}{run}"):
        owner = summary.values[key]
        names = _names(owner)
        if name in names:
            score = _score(owner) if name == names[0] else None
            return Found(place, int(summary.step or 0), key.removeprefix(_OWNER), score)
    return Found(place, int(summary.step or 0))


def _names(owner: Any) -> list[str]:
    """The names that a file says it has: in its own directory, since the file may come from anywhere."""
    names = owner.get("names") if isinstance(owner, dict) else None
    return names if isinstance(names, list) and all(map(_is_name, names)) else []


def _is_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name:
        return False
    try:
        return len(os.fsencode(name)) <= _LONGEST_NAME_BYTES
    except UnicodeEncodeError:
        return False


def _score(owner: dict[str, Any]) -> float | None:
    try:
        return float(owner["score"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def give_missing_names(path: str, run: str, step: int, directory: str) -> list[str]:
    """Give a file the names that a kill came before, and return those.

    A name that is free is given, and one that an older file of the same run has.

    Args:
        path: A checkpoint of the run.
        run: The run's id.
        step: The global step that it was saved at.
        directory: Where the run's names are; with another callback's in common, the file may lie elsewhere.
    """
    try:
        names = _names(catalog.read_summary(path).values.get(_OWNER + run))
    except (CheckpointError, OSError):
        return []
    given = []
    elsewhere = os.path.realpath(os.path.dirname(path)) != os.path.realpath(directory)
    if names and (elsewhere or names[0] == os.path.basename(path)):
        for name in (os.path.join(directory, one) for one in (names if elsewhere else names[1:])):
            there = describe(name, run)
            if not os.path.lexists(name) or (there is not None and there.run == run and there.step < step):
                commit.add_name(path, name)
                given.append(name)
    return given


def describe_all(
    directory: str,
    *,
    also: Iterable[str] = (),
    recursive: bool = False,
    suffix: str = catalog.SUFFIX,
    run: str | None = None,
) -> dict[str, Found]:
    """Read the tails of all whole checkpoints ``*suffix`` under ``directory``, and of the files in ``also``.

    Those that something else than holdfast wrote are there with no run and no score; for ``run`` see
    `describe`.
    """
    found: dict[str, Found] = {}
    paths = [os.path.abspath(path) for path in also]
    if os.path.isdir(directory):
        entries = catalog.scan(directory, recursive=recursive, suffix=suffix)
        paths += [os.path.abspath(entry.path) for entry in entries]
    for path in dict.fromkeys(paths):
        one = describe(path, run)
        if one is None:
            entry = catalog.entry(path)
            one = Found(path, step=0) if entry.foreign and entry.whole else None
        if one is not None:
            found[path] = one
    return found


def written_since(path: str, found: Mapping[str, Found], step: int) -> set[str]:
    """Tell which files of the checkpoint's own step were written after it: its run has yet to get there.

    Args:
        path: A checkpoint of the run.
        found: What there is, by path.
        step: The global step that the checkpoint was saved at.
    """
    at = catalog.entry(path).saved_at
    same_step = [place for place, one in found.items() if one.step == step]
    return {place for place in same_step if at and catalog.entry(place).saved_at > at}


@dataclass(frozen=True)
class Claims:
    """Where one save may put a file, and where it must not.

    Args:
        run: The run's id.
        step: The global step of the save.
        used: The files that the callback keeps.
        reserved: Paths that other callbacks are about to write in this same save.
        protected: A file that has to stay as it is.
        keeps_all: Whether older files of the run are there to stay although nothing lists them.
    """

    run: str | None
    step: int
    used: frozenset[str]
    reserved: frozenset[str] = frozenset()
    protected: str | None = None
    keeps_all: bool = False

    def allow(self, path: str, free: Iterable[str] = ()) -> bool:
        """Tell whether a ranked file may be put at ``path``; ``free`` are those that make way for it."""
        if path in self.reserved:
            return False
        if not os.path.lexists(path) or (path in free and not is_same_file(path, self.protected)):
            return True
        if path in self.used or is_same_file(path, self.protected):
            return False
        found = self._mine(path)
        # Of this step or a later one it is from an earlier life of this run, which lives that time again.
        if found is not None and (found.step >= self.step or not self.keeps_all):
            return True
        return self._saved_on_exception(path)

    def allow_on_exception(self, path: str) -> bool:
        """Tell whether the state that an exception left may be put at ``path``: over no good file."""
        if path in self.reserved:
            return False
        if not os.path.lexists(path):
            return True
        return (
            path not in self.used
            and not is_same_file(path, self.protected)
            and self._saved_on_exception(path)
        )

    def allow_last(self, path: str, last_model_path: str) -> bool:
        """Tell whether the newest save may be put at ``path``, a name that is there to be written over."""
        if path in self.reserved:
            return False
        if path == last_model_path or not os.path.lexists(path):
            return True
        return path not in self.used and self._mine(path) is not None

    def _saved_on_exception(self, path: str) -> bool:
        """Whether the run saved it on an exception and has got there again: the state now is no older."""
        try:
            summary = catalog.read_summary(path)
        except (CheckpointError, OSError):
            return False
        return f"{_ON_EXCEPTION}{self.run}" in summary.values and (summary.step or 0) <= self.step

    def _mine(self, path: str) -> Found | None:
        found = describe(path, self.run)
        return found if found is not None and self.run is not None and found.run == self.run else None


def remove(
    path: str, *, inside: str, protected: str | None, delete: Callable[[str], Any] | None = None
) -> bool:
    """Delete one checkpoint and tell whether it was deleted.

    Left alone are directories that are no checkpoint, whatever is not inside the directory ``inside``, and
    every name of the file ``protected``.

    Args:
        path: The file.
        inside: The directory that nothing is deleted outside of.
        protected: A file that stays.
        delete: What deletes it, where that is the user's own plugin: it knows what its checkpoints are,
            directories or not.
    """
    directory = os.path.realpath(os.path.dirname(path))
    root = os.path.realpath(inside)
    if os.path.commonpath([directory, root]) != root:
        return False
    if delete is None and os.path.isdir(path) and not (os.path.islink(path) or directories.is_sharded(path)):
        return False
    if is_same_file(path, protected):
        return False
    try:
        (delete or directories.remove)(path)
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
