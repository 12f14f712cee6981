"""Reading a checkpoint back: every byte is checked before anything of it is returned, and no code runs."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch

from holdfast.checkpoint import catalog, commit, container, foreign, integrity, payload, pickling
from holdfast.checkpoint.integrity import Damage, Job, Manifest
from holdfast.checkpoint.reachable import reachable
from holdfast.checkpoint.tensors import memory, mover, new_storage
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsafe,
)


def load(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    skip: Collection[str] = (),
    verify: bool = True,
) -> Any:
    """Read a checkpoint: the payload, equal to what was saved, each byte of it checked first.

    Tensors own their memory: nothing refers to the file afterwards. Opening a checkpoint runs no code that
    the file names. Checkpoints of torch.save and PyTorch Lightning are read too: their unknown classes
    become inert `foreign.Opaque` objects.

    Args:
        path: the file.
        map_location: where tensors go, as `torch.load` takes it.
        skip: top-level keys to leave out; tensors that only they hold are neither read nor checked.
        verify: False leaves the tensors' checksums uncompared; the structure is checked all the same.

    Raises:
        CheckpointNotFound: there is no such file; names the nearest names in that directory.
        CheckpointIncomplete: the file was cut short, or is not a checkpoint.
        CheckpointCorrupt: bytes differ from those written; names the record and the tensors in it.
        CheckpointIncompatible: the file was written by a newer holdfast, or ``map_location`` asks for a
            device that is not there.
        CheckpointUnsafe: the file asks for code or for absurd amounts of memory.
        StorageError: the disk failed.
    """
    name = os.fspath(path)
    try:
        with _open(name) as file, pickling.uncollected():
            tail = _own_tail(name, file.fileno())
            if tail is None:
                return foreign.load(name, file.fileno(), map_location, frozenset(skip), verify)
            return _load_own(name, file.fileno(), tail, map_location, frozenset(skip), verify)
    except Damage as damage:
        raise CheckpointCorrupt(
            f"{os.path.basename(name)} is corrupt: {damage}.{newest(name)}", path=name
        ) from None
    except pickling.UnsafeGlobal as unsafe:
        raise CheckpointUnsafe(
            f"{os.path.basename(name)} asks for {unsafe.name}, which opening a checkpoint never gives. "
            "Nothing was run. Do not use this file unless you know who wrote it.",
            path=name,
        ) from None
    except OSError as error:
        if isinstance(error, CheckpointNotFound):
            raise
        raise commit.storage_error(name, "read", error) from error


def is_holdfast(path: str | os.PathLike[str]) -> bool:
    """Whether holdfast wrote the file, whole or not.

    Raises:
        CheckpointNotFound: there is no such file.
    """
    with _open(os.fspath(path)) as file:
        try:
            container.read_tail(file.fileno())
        except container.NotWhole as problem:
            return problem.ours or container.has_mark(file.fileno())
    return True


def _open(name: str) -> Any:
    try:
        if os.path.exists(name) and not os.path.isdir(name) and not os.path.isfile(name):
            # Opening a pipe would wait for somebody to write to it.
            raise CheckpointIncomplete(f"{name} is not a regular file, so not a checkpoint.", path=name)
        return open(name, "rb", buffering=0)
    except IsADirectoryError:
        raise CheckpointIncomplete(f"{name} is a directory, not a checkpoint file.", path=name) from None
    except FileNotFoundError:
        directory, wanted = os.path.split(os.path.abspath(name))
        if not os.path.isdir(directory):
            hint = f"There is no directory {directory} either."
        else:
            there = sorted(entry for entry in os.listdir(directory) if not entry.startswith("."))
            there = [entry for entry in there if entry.endswith(catalog.SUFFIX)] or there
            near = difflib.get_close_matches(wanted, there, n=3, cutoff=0.3) or there[:3]
            hint = "That directory has no checkpoints."
            if near:
                hint = f"The nearest names there: {', '.join(near)}."
        raise CheckpointNotFound(f"There is no checkpoint {name}. {hint}", path=name) from None


def newest(name: str) -> str:
    """A line that names the newest whole checkpoint beside a file that is not, or nothing."""
    directory = os.path.dirname(os.path.abspath(name))
    try:
        for entry in catalog.scan(directory):
            if entry.whole and not entry.foreign and not os.path.samefile(entry.path, name):
                return f"\nNewest whole checkpoint in {directory}: {os.path.basename(entry.path)}."
    except (CheckpointError, OSError):  # this is for the message of an error that says more
        pass
    return ""


def _own_tail(name: str, fd: int) -> container.Tail | None:
    try:
        tail = container.read_tail(fd)
    except container.NotWhole as problem:
        if problem.ours or container.has_mark(fd):
            raise CheckpointIncomplete(
                f"{os.path.basename(name)} is not a whole checkpoint: {problem.reason}.{newest(name)}",
                path=name,
            ) from None
        return None
    version = tail.summary["format"]
    if version > container.FORMAT:
        raise CheckpointIncompatible(
            f"{os.path.basename(name)} has format {version}; this holdfast reads formats up to "
            f"{container.FORMAT}. Update holdfast to read it.",
            path=name,
        )
    return tail


def _load_own(
    name: str, fd: int, tail: container.Tail, map_location: Any, skip: frozenset[str], verify: bool
) -> Any:
    manifest = integrity.read_manifest(fd, tail)
    pickled = _read_pickle(fd, manifest, verify)
    with _unsafe(name):
        pickling.scan(pickled)
        wanted = reachable(pickled, skip) if skip else None
    storages = _read_rest(fd, manifest, wanted, verify)
    move = mover(map_location, name)
    moved: set[str] = set()

    def storage(key: str, location: str) -> torch.UntypedStorage:
        found = storages.get(f"data/{key}")
        if found is None:
            raise pickling.PickleError(f"there is no record data/{key}")
        if move is not None and key not in moved and (wanted is None or key in wanted):
            moved.add(key)
            found = storages[f"data/{key}"] = move(found, location)
        return found

    with _unsafe(name):
        tree = pickling.SafeUnpickler(pickled, storage).load()
        _check_lengths(manifest, storages)
        return payload.decode(tree, manifest.types, skip)


def _check_lengths(manifest: Manifest, storages: dict[str, torch.UntypedStorage]) -> None:
    """Refuse storages that have grown: a pickle can have `Tensor.set_` called once a tensor is made."""
    for record in manifest.records:
        storage = storages.get(record.entry.name)
        if storage is not None and storage.nbytes() != record.entry.length:
            raise pickling.PickleError(f"a tensor reaches beyond its record {record.title}")


@contextlib.contextmanager
def _unsafe(name: str) -> Iterator[None]:
    """Say of whatever a pickle leads to what it means: its checksum is right, so holdfast didn't write it."""
    try:
        yield
    except (pickling.UnsafeGlobal, CheckpointError, OSError, Warning):
        raise
    except Exception as error:
        raise CheckpointUnsafe(f"{os.path.basename(name)} cannot be read: {error}.", path=name) from error


def _read_pickle(fd: int, manifest: Manifest, verify: bool) -> bytes:
    found = [record for record in manifest.records if record.entry.name == "data.pkl"]
    pickled = bytearray(sum(record.entry.length for record in found))
    integrity.read_records(fd, [Job(record, memoryview(pickled)) for record in found], verify=verify)
    return bytes(pickled)


def _read_rest(
    fd: int, manifest: Manifest, wanted: set[str] | None, verify: bool
) -> dict[str, torch.UntypedStorage]:
    storages: dict[str, torch.UntypedStorage] = {}
    jobs: list[Job] = []
    for record in manifest.records:
        entry = record.entry
        kind, _, key = entry.name.partition("/")
        if kind != "data":
            if entry.name != "data.pkl":
                jobs.append(Job(record, memoryview(bytearray(entry.length))))
        elif wanted is not None and key not in wanted:
            storages[entry.name] = new_storage(entry.length, "meta")
        else:
            storage = storages[entry.name] = new_storage(entry.length)
            jobs.append(Job(record, memory(storage.data_ptr(), entry.length, writable=True)))
    integrity.read_records(fd, jobs, verify=verify)
    return storages
