"""Which checkpoint ``ckpt_path=`` means, read and verified before anything of the run is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.kept_checkpoints import version_directory
from holdfast.checkpoint import catalog, choice, commit, directories
from holdfast.checkpoint import payload as payloads
from holdfast.checkpoint.checkpoint_io import writes_own_format
from holdfast.checkpoint.load import load_mapped
from holdfast.checkpoint.mapped import Loaded
from holdfast.checkpoint.migrate import upgrade
from holdfast.errors import (
    CheckpointError,
    CheckpointIncomplete,
    CheckpointNotFound,
    ConfigError,
    StorageError,
)
from holdfast.training.in_flight import settle
from holdfast.training.resume_together import NotEverywhere, resolve_together
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


@dataclass
class Resolved:
    """The checkpoint that a run goes on from, already read and verified.

    Its weights may lie in the file until it is released.
    """

    path: str
    payload: dict[str, Any]
    version: int | str | None = None
    """The version directory of the run root that it lies in, where "auto" found it there."""
    skipped: list[str] = field(default_factory=list)
    """One sentence for each newer candidate that was passed over."""
    loaded: Loaded | None = None

    def check(self) -> None:
        """Make sure, before weights are copied, that nobody has changed the file since it was verified.

        Raises:
            CheckpointCorrupt: somebody has.
        """
        if self.loaded is not None:
            self.loaded.check()

    def release(self) -> None:
        """Let go of the payload and of the file: all of it is in place.

        On return: nothing refers to the file; what a hook has kept of it owns its memory.

        Raises:
            CheckpointCorrupt: the file was changed while weights were copied out of it.
        """
        self.payload = {}
        if self.loaded is not None:
            self.loaded.release()

    def let_go(self) -> None:
        """Let go of payload and file, whatever has become of the file: nothing of it is used."""
        with suppress(CheckpointError):
            self.release()


def resolve(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None, *, for_fit: bool) -> Resolved | None:
    """Find and read the checkpoint; None means a fresh start.

    Ranks: all; rank 0 finds it, and an error of one is raised on all. Blocks: until every rank has read it.

    Args:
        trainer: Whose callbacks and loggers say where checkpoints are.
        ckpt_path: A path, "best", "last", "auto" or None.
        for_fit: A run will go on from it; otherwise only its weights are wanted.

    Raises:
        CheckpointNotFound: an explicit path does not exist.
        CheckpointCorrupt: an explicit file is damaged; no other is taken instead.
        CheckpointIncomplete: with "auto": there are candidates, and not one is whole and verified.
        ConfigError: "best" without a callback that saved one; some ranks were given a path and others none.
    """
    read = partial(_read, trainer, for_fit=for_fit)
    if trainer.world_size > 1:
        settle(trainer)
        find = partial(_resolve, trainer, ckpt_path, for_fit)
        return resolve_together(trainer, ckpt_path, find, read)
    if ckpt_path is None:
        return None
    settle(trainer)
    return _resolve(trainer, ckpt_path, for_fit, read)


def _resolve(
    trainer: Trainer,
    ckpt_path: str | os.PathLike[str] | None,
    for_fit: bool,
    read: Callable[[str], Resolved],
) -> Resolved | None:
    if ckpt_path is None:
        return None
    if ckpt_path == "auto":
        return _newest_verified(trainer, for_fit, read)
    if ckpt_path == "best":
        path = _best(trainer)
    elif ckpt_path == "last":
        found = _last(trainer)
        if found is None:
            rank_zero_warn(
                f'ckpt_path="last": there is no checkpoint in {_listed(trainer)}. '
                + ("Starting from scratch." if for_fit else "The weights stay as they are.")
            )
            return None
        path = found
    elif ckpt_path == "hpc" and not os.path.exists("hpc"):
        raise ConfigError(
            'ckpt_path="hpc" is not there yet. ckpt_path="auto" goes on from the newest checkpoint of this '
            "run, also after a requeue."
        )
    else:
        path = os.fspath(ckpt_path)
    return read(path)


def _read(trainer: Trainer, path: str, for_fit: bool) -> Resolved:
    """Read a checkpoint: through the user's plugin or strategy where there is one."""
    strategy = trainer.strategy
    if strategy.own_checkpoint_io is None and not is_overridden("load_checkpoint", strategy):
        if directories.is_sharded(path):
            return _read_directory(trainer, path)
        # The optimizers keep the tensors that they are given, and the run its own part until it is over. Of a
        # state that is sharded each rank copies no more than its part.
        kept = () if strategy.shards_model else ("optimizer_states",)
        loaded = load_mapped(
            path,
            skip=() if for_fit or _is_shown(trainer) else ("optimizer_states",),
            own=(*kept, "holdfast"),
        )
        loaded.payload = payload = upgrade(loaded.payload, source=path)
        return Resolved(path, payload, loaded=loaded)
    return Resolved(path, upgrade(_through_plugin(trainer, path), source=path))


def _read_directory(trainer: Trainer, path: str) -> Resolved:
    """Read a sharded checkpoint: whole tensors, or for a sharded run what is not in tensors."""
    from holdfast.training import sharded_loading

    return Resolved(path, upgrade(sharded_loading.read(trainer, path), source=path))


def _through_plugin(trainer: Trainer, path: str) -> Any:
    strategy = trainer.strategy
    found = strategy.load_checkpoint(path)
    if not isinstance(found, dict):
        raise CheckpointIncomplete(
            f"{type(strategy.checkpoint_io).__name__}.load_checkpoint({path!r}) must return the checkpoint "
            f"as a dict, found {type(found).__name__}.",
            path=path,
        )
    own = found.get("holdfast")
    types = own.pop("types", None) if isinstance(own, dict) else None
    return found if types is None else payloads.decode(found, types)


def _is_shown(trainer: Trainer) -> bool:
    """Whether a hook gets to see the checkpoint, and may want any part of it."""
    return any(
        is_overridden("on_load_checkpoint", owner) for owner in (trainer.model, trainer.datamodule)
    ) or any(callback.uses_hook("on_load_checkpoint") for callback in trainer.callbacks)


def run_directories(trainer: Trainer) -> list[str]:
    """Where this run's checkpoints may be: callbacks' own directories, and all versions of the root."""
    directories: list[str] = []
    callbacks: list[Any] = [c for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]
    directories += [os.path.abspath(c.dirpath) for c in callbacks]
    if not callbacks or len(callbacks) < len(trainer.checkpoint_callbacks):
        root, version = version_directory(trainer)
        directories.append(os.path.abspath(root if version else os.path.join(root, "checkpoints")))
    return list(dict.fromkeys(directories))


def _listed(trainer: Trainer) -> str:
    return ", ".join(os.path.relpath(directory) for directory in run_directories(trainer))


def _candidates(trainer: Trainer) -> list[catalog.Entry]:
    """Newest first, each name of a file by itself: if one is gone, another may be there."""
    entries: list[catalog.Entry] = []
    own = [getattr(callback, "FILE_EXTENSION", catalog.SUFFIX) for callback in trainer.checkpoint_callbacks]
    for directory in run_directories(trainer):
        if os.path.isdir(directory):
            entries += catalog.scan(directory, recursive=True, suffix=(catalog.SUFFIX, *own))
    # One of these directories may lie inside of another; and a Checkpointer's files are no trainer's.
    return choice.newest_first({entry.path: entry for entry in entries if entry.kind != "state"}.values())


def _last(trainer: Trainer) -> str | None:
    candidates = _candidates(trainer)
    if writes_own_format(trainer.strategy.own_checkpoint_io):
        # Only the plugin can tell what is in it.
        return next((entry.path for entry in candidates), None)
    newest = choice.last(candidates)
    return None if newest is None else newest.path


def _best(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "best_model_path", "")
    if not path:
        raise ConfigError(
            'ckpt_path="best": no checkpoint callback of this trainer has saved a best model. Run fit with a '
            "ModelCheckpoint first, or give the path."
        )
    return str(path)


def _tidy_up(trainer: Trainer) -> None:
    """Remove what a killed process had half written, also in versions that this run will not write to."""
    for directory in run_directories(trainer):
        for place, _, _ in os.walk(directory):
            commit.remove_stray_temp_files(place)


def _newest_verified(trainer: Trainer, for_fit: bool, read: Callable[[str], Resolved]) -> Resolved | None:
    if for_fit:
        _tidy_up(trainer)
    ordered = choice.auto_order(_candidates(trainer), for_fit=for_fit)
    if not ordered:
        rank_zero_info(f'ckpt_path="auto": no checkpoint in {_listed(trainer)} yet; starting from scratch')
        return None
    plugin_reads = writes_own_format(trainer.strategy.own_checkpoint_io)
    skipped: list[str] = []
    bad_inodes: set[tuple[int, int]] = set()
    put_off: list[catalog.Entry] = []
    for entry in ordered:
        name = os.path.relpath(entry.path)
        if not entry.whole and not plugin_reads:
            skipped.append(f"{name}: {entry.reason}")
            continue
        try:
            info = os.stat(entry.path)
            if (info.st_dev, info.st_ino) in bad_inodes:
                skipped.append(f"{name}: the same file as one above")
                continue
            found = read(entry.path)
            if for_fit and plugin_reads and "optimizer_states" not in found.payload:
                continue  # weights only, which no listing could tell
            if plugin_reads and entry not in put_off and _is_inexact(found.payload):
                put_off.append(entry)
                ordered.append(entry)
                continue
            found.version, found.skipped = _version_of(trainer, entry.path), skipped
            return found
        except NotEverywhere:
            raise
        except CheckpointNotFound:
            continue  # deleted between the listing and now
        except (CheckpointError, StorageError) as error:
            bad_inodes.add((info.st_dev, info.st_ino))
            skipped.append(f"{name}: {error}")
        except Exception as error:  # a plugin reads it, and may raise anything
            if not plugin_reads:
                raise
            skipped.append(f"{name}: {type(trainer.strategy.checkpoint_io).__name__} raised {error!r}")
    if skipped:
        raise_none_whole(skipped)
    rank_zero_info(f'ckpt_path="auto": no checkpoint in {_listed(trainer)} yet; starting from scratch')
    return None


def _is_inexact(payload: dict[str, Any]) -> bool:
    """Whether a file of ours was saved in a hook, which no listing could tell where a plugin wrote it."""
    return "summary" in payload["holdfast"] and not payload["holdfast"].get("exact")


def raise_none_whole(skipped: list[str]) -> None:
    """Refuse to start from step 0 where checkpoints exist that cannot be used."""
    raise CheckpointIncomplete(
        'ckpt_path="auto": there are checkpoints, but not one is whole and verified, and starting from '
        "step 0 would bury them:\n  "
        + "\n  ".join(skipped)
        + "\nMove them away, or give a path, or ckpt_path=None to start anew."
    )


def _version_of(trainer: Trainer, path: str) -> int | str | None:
    """The version, as ``version_N`` or by name, in whose own "checkpoints" directory ``path`` lies."""
    root, version = version_directory(trainer)
    parts = os.path.relpath(os.path.abspath(path), os.path.abspath(root)).split(os.sep)
    if version and len(parts) > 2 and parts[0] != ".." and parts[1] == "checkpoints":
        match = re.fullmatch(r"version_(\d+)", parts[0])
        return int(match.group(1)) if match else parts[0]
    return None
