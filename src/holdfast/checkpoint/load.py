"""Reading a checkpoint back: every byte is checked before anything of it is returned, and no code runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch

from holdfast.checkpoint import commit, container, foreign, integrity, origin, payload, pickling
from holdfast.checkpoint.integrity import Damage, Job, Manifest
from holdfast.checkpoint.origin import Source
from holdfast.checkpoint.reachable import reachable
from holdfast.checkpoint.tensors import Mover, memory, mover, new_storage
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointUnsafe,
    HoldfastError,
)


def load(
    source: Source,
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
        source: a path, a URL (``https://``, or any that fsspec knows) or a file opened with mode "rb", which
            is read from where it stands. A URL is fetched whole before any of it is read.
        map_location: where tensors go, as `torch.load` takes it; None means the device that each was saved
            on where this machine has it, else the CPU.
        skip: top-level keys to leave out; tensors that only they hold are neither read nor checked.
        verify: False leaves the tensors' checksums uncompared; the structure is checked all the same.

    Raises:
        CheckpointNotFound: there is no such file; names the nearest names in that directory.
        CheckpointIncomplete: the file was cut short, or is not a checkpoint.
        CheckpointCorrupt: bytes differ from those written; names the record and the tensors in it.
        CheckpointIncompatible: the file was written by a newer holdfast, or ``map_location`` asks for a
            device that is not there.
        CheckpointUnsafe: the file asks for code or for absurd amounts of memory.
        ConfigError: the source is none of these, such as a file opened in text mode.
        StorageError: the disk or the connection failed.
    """
    where = mover(map_location, origin.title(source))
    try:
        with origin.opened(source) as found, pickling.uncollected():
            return _load(found, where, frozenset(skip), verify)
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise commit.storage_error(origin.title(source), "read", error) from error


def _load(found: origin.Origin, where: Mover | None, skip: frozenset[str], verify: bool) -> Any:
    name, fd = found.name, found.file.fileno()
    try:
        tail = _own_tail(found, fd)
        if tail is None:
            return foreign.load(name, fd, where, skip, verify)
        return _load_own(name, fd, tail, where, skip, verify)
    except Damage as damage:
        raise CheckpointCorrupt(
            f"{os.path.basename(name)} is corrupt: {damage}.{_newest(found)}", path=name
        ) from None
    except pickling.UnsafeGlobal as unsafe:
        raise CheckpointUnsafe(
            f"{os.path.basename(name)} asks for {unsafe.name}, which opening a checkpoint never gives. "
            "Nothing was run. Do not use this file unless you know who wrote it.",
            path=name,
        ) from None


def is_holdfast(path: str | os.PathLike[str]) -> bool:
    """Whether holdfast wrote the file, whole or not.

    Raises:
        CheckpointNotFound: there is no such file.
    """
    with origin.open_local(os.fspath(path)) as file:
        try:
            container.read_tail(file.fileno())
        except container.NotWhole as problem:
            return problem.ours or container.has_mark(file.fileno())
    return True


def _newest(found: origin.Origin) -> str:
    return origin.newest_beside(found.name) if found.local else ""


def _own_tail(found: origin.Origin, fd: int) -> container.Tail | None:
    name = found.name
    try:
        tail = container.read_tail(fd)
    except container.NotWhole as problem:
        if problem.ours or container.has_mark(fd):
            raise CheckpointIncomplete(
                f"{os.path.basename(name)} is not a whole checkpoint: {problem.reason}.{_newest(found)}",
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
    name: str, fd: int, tail: container.Tail, move: Mover | None, skip: frozenset[str], verify: bool
) -> Any:
    manifest = integrity.read_manifest(fd, tail)
    pickled = _read_pickle(fd, manifest, verify)
    with _unsafe(name):
        pickling.scan(pickled)
        wanted = reachable(pickled, skip) if skip else None
    storages = _read_rest(fd, manifest, wanted, verify)
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
