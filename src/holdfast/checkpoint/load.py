"""Reading a checkpoint back: every byte is checked before anything of it is returned, and no code runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

from holdfast.checkpoint import commit, container, foreign, integrity, origin, payload, pickling
from holdfast.checkpoint.directories import is_sharded
from holdfast.checkpoint.integrity import Damage, Job, Manifest, Placed
from holdfast.checkpoint.mapped import Loaded, MappedFile, can_map
from holdfast.checkpoint.origin import Source
from holdfast.checkpoint.own_file import corrupt, own_tail
from holdfast.checkpoint.pickle_scan import printable
from holdfast.checkpoint.reachable import leads_to_meta, reachable
from holdfast.checkpoint.tensors import Mover, memory, mover, new_storage
from holdfast.errors import CheckpointError, CheckpointUnsafe, HoldfastError
from holdfast.utilities.collector import uncollected

_SMALL_BYTES = 64 << 10  # a record up to this is read rather than mapped,
_SMALL_IN_ALL_BYTES = 32 << 20  # until they are so many


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
    become inert `foreign.Opaque` objects. Of a sharded checkpoint, a directory, every tensor is read whole.

    Args:
        source: a path, a URL (``https://``, or any that fsspec knows) or a file opened with mode "rb", which
            is read from where it stands. A URL is fetched whole before any of it is read.
        map_location: where tensors go, as `torch.load` takes it; None means the device that each was saved
            on where this machine has it, else the CPU. NumPy arrays are always in memory.
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
    wish = _Wish(mover(map_location, origin.title(source)), frozenset(skip), verify, None)
    return _read(source, wish).payload


def load_mapped(
    source: Source, *, map_location: Any = "cpu", skip: Collection[str] = (), own: Collection[str] = ()
) -> Loaded:
    """As `load`, for a payload that is copied into something live and then done with.

    Large tensors stay in the file, where that is one on a disk of this machine: verified, but without memory
    of their own until the `Loaded` is released.

    Args:
        source: as `load` takes it.
        map_location: as `load` takes it.
        skip: as `load` takes it.
        own: top-level keys whose tensors are going to be kept, and are read into memory at once.

    Raises:
        CheckpointError, ConfigError, StorageError: as `load` does.
    """
    where = mover(map_location, origin.title(source))
    return _read(source, _Wish(where, frozenset(skip), True, frozenset(own)))


class _Wish(NamedTuple):
    """What is wanted of a file, and where."""

    move: Mover | None
    skip: frozenset[str]
    verify: bool
    own: frozenset[str] | None
    """The top-level keys that are read into memory; None for all, with nothing mapped."""


def _read(source: Source, wish: _Wish) -> Loaded:
    if isinstance(source, (str, os.PathLike)) and not origin.is_url(source) and is_sharded(source):
        from holdfast.checkpoint import sharded_load  # which reads a part of it as a file

        return Loaded(os.fspath(source), sharded_load.load(source, wish.move, skip=wish.skip))
    try:
        with origin.opened(source) as found, uncollected():
            return _read_found(found, wish)
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise commit.storage_error(origin.title(source), "read", error) from error


def _read_found(found: origin.Origin, wish: _Wish) -> Loaded:
    name, fd = found.name, found.file.fileno()
    try:
        tail = own_tail(found)
        if tail is None:
            return Loaded(name, foreign.load(name, fd, wish.move, wish.skip, wish.verify))
        return _read_own(found, tail, wish)
    except Damage as damage:
        raise corrupt(found, damage) from None
    except pickling.UnsafeGlobal as asked:
        raise CheckpointUnsafe(
            f"{os.path.basename(name)} asks for {asked.name}, which opening a checkpoint never gives. "
            "Nothing was run. Do not use this file unless you know who wrote it.",
            path=name,
        ) from None


def _read_own(found: origin.Origin, tail: container.Tail, wish: _Wish) -> Loaded:
    fd = found.file.fileno()
    # Before anything is read, so that a change from now on shows.
    mapping = _mapped(fd) if wish.own is not None and found.local else None
    manifest = integrity.read_manifest(fd, tail)
    pickled = read_pickle(fd, manifest, wish.verify)
    reading = _Reading(fd, manifest, pickled, wish, mapping)
    with unsafe(found.name):
        pickling.scan(pickled)
    reading.fetch(_by_name(manifest, wish.skip) if wish.skip else None)
    with unsafe(found.name):
        tree = reading.tree()
        shared = reachable(pickled, wish.skip) if wish.skip and _lacks(tree, wish.skip) else None
    if shared is not None:
        # The manifest names what two keys share under the first alone.
        reading.fetch(shared)
    with unsafe(found.name):
        tree = tree if shared is None else reading.tree()
        with pickling.allowance(16 * len(pickled) + 4 * tail.directory + (1 << 16)):
            return Loaded(found.name, payload.decode(tree, manifest.types, wish.skip), mapping)


def _mapped(fd: int) -> MappedFile | None:
    if not can_map(fd):
        return None
    try:
        return MappedFile(fd)
    except OSError:  # such as no room among the addresses: then it is read
        return None


def _lacks(tree: Any, skip: frozenset[str]) -> bool:
    kept = [value for key, value in tree.items() if key not in skip] if isinstance(tree, dict) else tree
    return leads_to_meta(kept)


def _by_name(manifest: Manifest, skip: frozenset[str]) -> set[str]:
    """The keys of the storages that hold anything besides what lies under ``skip``."""
    left_out = set(map(_first_part, skip))
    return {
        record.entry.name.removeprefix("data/")
        for record in manifest.records
        if not left_out.issuperset(_tops(record))
    }


def _first_part(key: object) -> str:
    """A top-level key as it begins a tensor's name in the manifest."""
    return str(key).replace("~", "~0").replace("/", "~1")


def _tops(record: Placed) -> list[str]:
    return [tensor.partition("/")[0] for tensor in record.tensors]


class _Reading:
    """One file of ours on its way into memory."""

    def __init__(
        self, fd: int, manifest: Manifest, pickled: bytes, wish: _Wish, mapping: MappedFile | None
    ) -> None:
        self._fd, self._manifest, self._pickled = fd, manifest, pickled
        self._wish, self._mapping = wish, mapping
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._small_bytes = 0

    def fetch(self, wanted: set[str] | None) -> None:
        """Read and check the storages with these keys, or all, and whatever else the file has."""
        jobs: list[Job] = []
        own = set(map(_first_part, self._wish.own or ()))
        for record in self._manifest.records:
            kind, _, key = record.entry.name.partition("/")
            if kind != "data":
                jobs += [Job(record, None)] if kind != "data.pkl" else []
            elif wanted is not None and key not in wanted:
                self._storages[key] = new_storage(record.entry.length, "meta")
            else:
                self._storages[key], job = self._place(record, own)
                jobs.append(job)
        integrity.read_records(self._fd, jobs, verify=self._wish.verify)

    def _place(self, record: Placed, own: set[str]) -> tuple[torch.UntypedStorage, Job]:
        length = record.entry.length
        if self._mapping is not None and own.isdisjoint(_tops(record)):
            self._small_bytes += length if length <= _SMALL_BYTES else 0
            if length > _SMALL_BYTES or self._small_bytes > _SMALL_IN_ALL_BYTES:
                job = Job(record, None)
                return self._mapping.storage(job), job
        storage = new_storage(length)
        return storage, Job(record, memory(storage.data_ptr(), length, writable=True))

    def tree(self) -> Any:
        """What the pickle says, made of the storages that were fetched."""
        tree, vanished = self._unpickle(self._wish.move, frozenset())
        if vanished:
            # An array stays in memory, whatever becomes of the tensors; only the tree tells which are arrays.
            unmoved, _ = self._unpickle(None, frozenset())
            arrays = {one.untyped_storage()._cdata for one in _arrays(unmoved, self._manifest.types)}
            stay = frozenset(key for key, one in self._storages.items() if one._cdata in arrays)
            tree, _ = self._unpickle(self._wish.move, stay)
        return tree

    def _unpickle(self, move: Mover | None, stay: frozenset[str]) -> tuple[Any, bool]:
        placed: dict[str, torch.UntypedStorage] = {}
        vanished = False

        def storage(key: str, location: str) -> torch.UntypedStorage:
            nonlocal vanished
            if key not in placed:
                found = self._storages.get(key)
                if found is None:
                    raise pickling.PickleError(f"there is no record data/{key}")
                if move is not None and key not in stay and found.device.type != "meta":
                    found = move(found, location)
                    vanished = vanished or found.device.type == "meta"
                placed[key] = found
            return placed[key]

        tree = pickling.SafeUnpickler(self._pickled, storage).load()
        for record in self._manifest.records:
            made = placed.get(record.entry.name.removeprefix("data/"))
            # A pickle can have `Tensor.set_` called once a tensor is made.
            if made is not None and made.nbytes() != record.entry.length:
                raise pickling.PickleError(f"a tensor reaches beyond its record {record.title}")
        return tree, vanished


def _arrays(plain: Any, spec: Any) -> Iterator[torch.Tensor]:
    """The tensors that stand for NumPy arrays, as `payload.decode` is going to find them."""
    if not isinstance(spec, dict):
        return
    if spec.get("type") == "ndarray" and isinstance(plain, torch.Tensor):
        yield plain
    items = spec.get("items")
    if isinstance(items, dict) and isinstance(plain, (dict, list, tuple)):
        values = list(plain.values()) if isinstance(plain, dict) else plain
        for at, child in items.items():
            if at.isdecimal() and int(at) < len(values):
                yield from _arrays(values[int(at)], child)


@contextlib.contextmanager
def unsafe(name: str) -> Iterator[None]:
    """Say of whatever a pickle leads to what it means: its checksum is right, so holdfast didn't write it."""
    try:
        yield
    except (pickling.UnsafeGlobal, Damage, CheckpointError, OSError, Warning):
        raise
    except Exception as error:
        raise CheckpointUnsafe(
            f"{os.path.basename(name)} cannot be read: {printable(str(error), 500)}.", path=name
        ) from error


def read_pickle(fd: int, manifest: Manifest, verify: bool = True) -> bytes:
    """The bytes of ``data.pkl``, checked.

    Raises:
        Damage: they are not those that were written.
    """
    found = [record for record in manifest.records if record.entry.name == "data.pkl"]
    pickled = bytearray(sum(record.entry.length for record in found))
    integrity.read_records(fd, [Job(record, memoryview(pickled)) for record in found], verify=verify)
    return bytes(pickled)
