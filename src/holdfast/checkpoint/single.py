"""One tensor out of a checkpoint: its bytes are read and checked, and no others."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from holdfast.checkpoint import (
    commit,
    container,
    directories,
    foreign,
    integrity,
    origin,
    pickle_scan,
    pickling,
    sharded_bytes,
    sharded_load,
)
from holdfast.checkpoint.directories import is_sharded
from holdfast.checkpoint.foreign_archive import Archive
from holdfast.checkpoint.integrity import Damage, Job
from holdfast.checkpoint.load import load, read_pickle, unsafe
from holdfast.checkpoint.origin import Origin, Source
from holdfast.checkpoint.own_file import corrupt, own_tail
from holdfast.checkpoint.pickling import Call, SafeUnpickler
from holdfast.checkpoint.tensors import Mover, memory, mover, new_storage
from holdfast.errors import CheckpointIncompatible, CheckpointUnsafe, HoldfastError
from holdfast.utilities.collector import uncollected

_NOTHING = object()
_MOST_NAMED = 3


def load_tensor(source: Source, name: str, *, map_location: Any = "cpu") -> torch.Tensor:
    """Read one tensor of a checkpoint, as it was saved, without reading the others.

    Of a file of holdfast, torch.save or PyTorch Lightning that tensor's bytes are read and checked, and the
    file's own description of itself; only the format of torch.save before torch 1.6 is read whole. No code
    that the file names is run. The tensor owns its memory.

    Args:
        source: A path, a URL or an open file, as `holdfast.load` takes it.
        name: Where it lies in the checkpoint, such as ``"optimizer_states/0/state/3/exp_avg"``: keys and
            indices with slashes between them. What lies in ``state_dict`` needs no more than its own name:
            ``"layers.0.weight"``.
        map_location: Where it goes, as `torch.load` takes it.

    Raises:
        CheckpointIncompatible: there is no tensor of that name; the message has the nearest names.
        CheckpointCorrupt: its bytes are not those that were written.
        CheckpointError, ConfigError, StorageError: as `holdfast.load` raises them.
    """
    move = mover(map_location, origin.title(source))
    if isinstance(source, (str, os.PathLike)) and not origin.is_url(source) and is_sharded(source):
        return _from_shards(os.fspath(source), name, move)
    try:
        with origin.opened(source) as found, uncollected():
            return _load_tensor(found, name, move, map_location)
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise commit.storage_error(origin.title(source), "read", error) from error


def _from_shards(path: str, name: str, move: Mover | None) -> torch.Tensor:
    with sharded_bytes.opened(path) as directory:
        entries = {entry.title: key for key, entry in directory.tensors().items()}
        key = entries.get(name) or entries.get(f"state_dict/{name}")
        if key is not None:
            made = sharded_load.one(directory, key)
            return made if move is None else sharded_load.moved(made, move)
        rest = os.path.join(directory.place, directories.PAYLOAD)
        names = {title.removeprefix("state_dict/") for title in entries}
        with origin.opened(rest) as found:
            try:
                return _load_tensor(found, name, move, None)
            except CheckpointIncompatible:
                short, near = os.path.basename(os.path.abspath(path)), _nearest(name, sorted(names))
                text = f"{short} holds no tensor {name!r}. The nearest names: {_listed(near)}."
                raise CheckpointIncompatible(text, path=path) from None


def _load_tensor(found: Origin, name: str, move: Mover | None, map_location: Any) -> torch.Tensor:
    fd = found.file.fileno()
    try:
        tail = own_tail(found)
        if tail is not None:
            return _from_own(found, tail, name, move)
        if not container.is_zip(fd):
            whole = load(found.file if not found.local else found.name, map_location=map_location)
            tensor: torch.Tensor = _chosen(whole, name, found, torch.Tensor)
            return tensor
        return _from_archive(found, name, move)
    except Damage as damage:
        raise corrupt(found, damage) from None
    except pickling.UnsafeGlobal as unsafe_global:
        raise CheckpointUnsafe(
            f"{os.path.basename(found.name)} asks for {unsafe_global.name}, which opening a checkpoint never "
            "gives. Nothing was run. Do not use this file unless you know who wrote it.",
            path=found.name,
        ) from None


def _from_own(found: Origin, tail: container.Tail, name: str, move: Mover | None) -> torch.Tensor:
    fd = found.file.fileno()
    manifest = integrity.read_manifest(fd, tail)
    records = {record.entry.name: record for record in manifest.records}

    def storage(key: str) -> torch.UntypedStorage:
        record = records.get(f"data/{key}")
        if record is None:
            raise pickling.PickleError(f"there is no record data/{key}")
        made = new_storage(record.entry.length)
        into = memory(made.data_ptr(), record.entry.length, writable=True)
        integrity.read_records(fd, [Job(record, into)])
        return made

    pickled = read_pickle(fd, manifest)
    with unsafe(found.name):
        pickling.scan(pickled)
        tree = _Late(pickled).load()
    later = _chosen(tree, name, found, _LateTensor)
    with unsafe(found.name):
        return _made(later, storage, move, len(pickled))


def _from_archive(found: Origin, name: str, move: Mover | None) -> torch.Tensor:
    archive = Archive(found.name, found.file.fileno(), True)

    def storage(key: str) -> torch.UntypedStorage:
        length = archive.length(key)
        made = new_storage(length)
        archive.fill(f"data/{key}", memory(made.data_ptr(), length, writable=True))
        return made

    pickled = foreign.pickled_of(found.name, archive)
    with unsafe(found.name):
        pickling.scan(pickled)
        tree = _LateForeign(pickled).load()
    later = _chosen(tree, name, found, _LateTensor)
    with unsafe(found.name):
        return _made(later, storage, move, len(pickled))


# -- tensors that are not made yet ---------------------------------------------------------------------------


class _LateTensor:
    """A tensor that the pickle describes and nobody has made yet."""

    __slots__ = ("args", "function")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """A tensor's attributes are nothing that is asked for here."""


class _LateStorage:
    """What the pickle says of a storage."""

    __slots__ = ("pid",)

    def __init__(self, pid: Any) -> None:
        self.pid = pid

    def __setstate__(self, state: Any) -> None:
        raise pickling.PickleError("it changes a storage")


class _Late(SafeUnpickler):
    """Builds the payload with descriptions in the place of tensors."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, lambda key, location: new_storage(0))

    def find_class(self, module: str, name: str) -> Any:
        known = super().find_class(module, name)
        if module == "torch._utils" and type(known) is Call:
            return Call(lambda *args: _LateTensor(known, args))
        return known

    def persistent_load(self, pid: Any) -> Any:
        return _LateStorage(pid)


class _LateForeign(foreign.Stubs, _Late):
    """As `_Late`, for files that name more than plain values and tensors."""


def _made(
    later: _LateTensor, read: Callable[[str], torch.UntypedStorage], move: Mover | None, pickled_bytes: int
) -> torch.Tensor:
    made: dict[int, Any] = {}  # what is named in many places is made once
    storages: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, location: str) -> torch.UntypedStorage:
        if key not in storages:
            found = read(key)
            storages[key] = found if move is None else move(found, location)
        return storages[key]

    maker = SafeUnpickler(b"", storage)

    def value(of: Any) -> Any:
        if type(of) is _LateStorage:
            return maker.persistent_load(of.pid)
        if type(of) not in (_LateTensor, list, tuple):
            return of
        if id(of) not in made:
            if type(of) is _LateTensor:
                made[id(of)] = of.function(*map(value, of.args))
            else:
                made[id(of)] = type(of)(map(value, of))
        return made[id(of)]

    with pickling.allowance(16 * pickled_bytes + (1 << 16)):
        tensor = value(later)
    if not isinstance(tensor, torch.Tensor):
        raise pickling.PickleError(f"what should be a tensor is a {type(tensor).__name__}")
    return tensor


# -- names ---------------------------------------------------------------------------------------------------


def _chosen(tree: Any, name: str, found: Origin, kind: type[Any]) -> Any:
    """What has that name in the payload.

    Raises:
        CheckpointIncompatible: nothing has, or it is no tensor.
    """
    there = _at(tree, name)
    if there is _NOTHING and isinstance(tree, dict) and "state_dict" in tree:
        there = _at(tree["state_dict"], name)
    if isinstance(there, kind):
        return there
    short = os.path.basename(found.name)
    if there is not _NOTHING:
        inside = list(_names(there, kind))
        what = f"{name!r} in {short} is of type {pickle_scan.printable(type(there).__name__)}, not a tensor."
        hint = f" Tensors in it: {_listed(inside)}." if inside else " holdfast.load gives it."
        raise CheckpointIncompatible(what + hint, path=found.name)
    near = _nearest(name, list(_names(tree, kind)))
    hint = f" The nearest names: {_listed(near)}." if near else " It holds no tensors at all."
    raise CheckpointIncompatible(f"{short} holds no tensor {name!r}.{hint}", path=found.name)


def _at(tree: Any, name: str) -> Any:
    if isinstance(tree, dict):
        values = {str(key): value for key, value in tree.items()}
        if name in values:
            return values[name]
    elif isinstance(tree, (list, tuple)):
        values = {str(index): value for index, value in enumerate(tree)}
        if name in values:
            return values[name]
    else:
        return _NOTHING
    head, slash, rest = name.partition("/")
    head = head.replace("~1", "/").replace("~0", "~")
    if not slash:
        return values.get(head, _NOTHING)
    return _at(values[head], rest) if head in values else _NOTHING


def _names(
    tree: Any, kind: type[Any], path: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[str]:
    """The names of all tensors; of those in ``state_dict`` the short ones; what is shared has one name."""
    seen = set() if seen is None else seen
    if isinstance(tree, kind):
        yield path.removeprefix("state_dict/")
    elif depth < 100 and isinstance(tree, (dict, list, tuple)) and id(tree) not in seen:
        seen.add(id(tree))
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            part = str(key).replace("~", "~0").replace("/", "~1")
            yield from _names(value, kind, f"{path}/{part}" if path else part, depth + 1, seen)


def _nearest(name: str, names: list[str]) -> list[str]:
    near = difflib.get_close_matches(name, names, n=_MOST_NAMED, cutoff=0.3)
    last = name.rpartition("/")[2].rpartition(".")[2]
    near += [one for one in names if one.endswith(last) and one not in near]
    return (near or names)[:_MOST_NAMED]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
