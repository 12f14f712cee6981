"""A sharded checkpoint read back, by any number of processes: every file is checked before it is used."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from holdfast.checkpoint import sharded_bytes, sharded_manifest
from holdfast.checkpoint.agreed import Round
from holdfast.checkpoint.directories import PAYLOAD
from holdfast.checkpoint.load import load as load_file
from holdfast.checkpoint.sharded_bytes import Reader, fill_box
from holdfast.checkpoint.sharded_manifest import Bad, Directory
from holdfast.checkpoint.sharded_payload import is_dtensor, join
from holdfast.checkpoint.sharded_tensors import Chunk, TensorEntry
from holdfast.checkpoint.tensors import Mover, memory
from holdfast.errors import CheckpointIncompatible, CheckpointUnsafe

_PIECE_BYTES = 8 << 20


class Box(NamedTuple):
    """A part of a tensor of the checkpoint, and the memory that it goes into."""

    tensor: TensorEntry
    begin: Sequence[int]
    target: torch.Tensor


def load_rest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """See `holdfast.checkpoint.sharded.load_rest`."""
    with sharded_bytes.opened(path) as directory:
        return _rest(directory)


def _rest(directory: Directory, skip: Collection[str] = ()) -> dict[str, Any]:
    directory.check(PAYLOAD)
    rest = load_file(os.path.join(directory.place, PAYLOAD), skip=skip)
    if not isinstance(rest, dict):
        raise Bad(CheckpointUnsafe, f"{PAYLOAD} holds a {type(rest).__name__}, not a dict")
    return rest


def tensor_info(path: str | os.PathLike[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """See `holdfast.checkpoint.sharded.tensor_info`."""
    with sharded_bytes.opened(path) as directory:
        return {key: (torch.Size(entry.shape), _dtype(entry)) for key, entry in directory.tensors().items()}


def _dtype(entry: TensorEntry) -> torch.dtype:
    known = getattr(torch, entry.dtype, None)
    if not isinstance(known, torch.dtype):
        text = f"holds {entry.title}, whose dtype {entry.dtype} this torch does not have: update torch"
        raise Bad(CheckpointIncompatible, text)
    return known


def load(
    path: str | os.PathLike[str], move: Mover | None = None, *, skip: Collection[str] = ()
) -> dict[str, Any]:
    """See `holdfast.checkpoint.sharded.load`; ``move`` puts storages where they belong."""
    with sharded_bytes.opened(path) as directory, Reader(directory) as reader:
        rest = _rest(directory, skip)
        wanted = {key: one for key, one in directory.tensors().items() if one.path[0] not in skip}
        made: dict[Any, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        boxes = []
        for key, entry in wanted.items():
            who = (entry.dtype, entry.shape, entry.chunks) if entry.size_bytes else key
            if who not in made:
                made[who] = torch.empty(entry.shape, dtype=_dtype(entry))
                boxes.append(Box(entry, (0,) * len(entry.shape), made[who]))
            tensors[key] = made[who]
        sharded_bytes.check(directory, _files(boxes))
        for box in boxes:
            _read(reader, *box)
        if move is not None:
            elsewhere = {id(tensor): moved(tensor, move) for tensor in made.values()}
            tensors = {key: elsewhere[id(tensor)] for key, tensor in tensors.items()}
        try:
            return join(rest, tensors)
        except ValueError as error:
            raise Bad(CheckpointUnsafe, f"its tensors do not fit its {PAYLOAD} ({error})") from error


def one(directory: Directory, key: str) -> torch.Tensor:
    """Read one tensor, from the files that it lies in, which are checked first.

    Raises:
        Bad: one of them is not what was written.
        OSError: the disk failed.
    """
    entry = directory.tensors()[key]
    made = torch.empty(entry.shape, dtype=_dtype(entry))
    box = Box(entry, (0,) * len(entry.shape), made)
    sharded_bytes.check(directory, _files([box]))
    with Reader(directory) as reader:
        _read(reader, *box)
    return made


def moved(tensor: torch.Tensor, move: Mover) -> torch.Tensor:
    """The tensor on the device that its storage is moved to."""
    storage = move(tensor.untyped_storage(), "cpu")
    made = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return made.set_(storage, 0, tensor.shape, tensor.stride())


def load_into(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], *, group: Any = None
) -> None:
    """See `holdfast.checkpoint.sharded.load_into`."""
    name = os.fspath(path)
    found: list[Directory] = []
    with contextlib.ExitStack() as stack:

        def prepare() -> None:
            with sharded_bytes.telling(name, found):
                found.append(stack.enter_context(sharded_manifest.opened(name)))
                boxes.extend(_boxes(found[0], tensors))

        boxes: list[Box] = []
        _round(name, group)(prepare, lambda parts: [None] * len(parts))
        with sharded_bytes.telling(name, found), Reader(found[0]) as reader, torch.no_grad():
            for box in boxes:
                _read(reader, *box)


def _round(path: str, group: Any) -> Round:
    if group is None:
        return Round(path, "read", rank=0, world_size=1, group=None)
    import torch.distributed as dist

    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return Round(path, "read", rank=rank, world_size=world_size, group=group)


def _boxes(directory: Directory, tensors: Mapping[str, torch.Tensor]) -> list[Box]:
    """What goes where, from files that are checked."""
    entries = directory.tensors()
    name = os.path.basename(os.path.abspath(directory.path))
    for key, tensor in tensors.items():
        entry = entries.get(key)
        if entry is None:
            near = difflib.get_close_matches(key, entries, n=3, cutoff=0.3)
            hint = f" The nearest: {', '.join(near)}." if near else ""
            raise CheckpointIncompatible(f"{name} holds no tensor {key}.{hint}", path=directory.path)
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointIncompatible(
                f"{name}: {entry.title} has shape {list(entry.shape)}, what it is to be loaded into has "
                f"{list(tensor.shape)}.",
                path=directory.path,
            )
    whole = {key: tensor for key, tensor in tensors.items() if not is_dtensor(tensor)}
    boxes = [Box(entries[key], (0,) * tensor.dim(), tensor.detach()) for key, tensor in whole.items()]
    parts = {key: tensor for key, tensor in tensors.items() if key not in whole}
    if parts:
        boxes += _boxes_of_shards(entries, parts)
    sharded_bytes.check(directory, _files(boxes))
    return boxes


def _boxes_of_shards(
    entries: Mapping[str, TensorEntry], tensors: Mapping[str, torch.Tensor]
) -> Iterator[Box]:
    """What of each tensor this process has, as DCP plans it: a part of a chunk, into a part of the shard."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    known: dict[str, Any] = {}
    of: dict[tuple[str, tuple[int, ...]], Chunk] = {}
    for key in tensors:
        entry = entries[key]
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
        size = torch.Size(entry.shape)
        known[key] = TensorStorageMetadata(TensorProperties(dtype=_dtype(entry)), size, chunks)
        of |= {(key, chunk.offsets): chunk for chunk in entry.chunks}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({key: tensor.detach() for key, tensor in tensors.items()}, Metadata(known), True)
    for item in planner.create_local_plan().items:
        key = item.storage_index.fqn
        assert item.storage_index.offset is not None
        chunk = of[key, tuple(item.storage_index.offset)]
        begin = [at + step for at, step in zip(chunk.offsets, item.storage_offsets, strict=True)]
        yield Box(entries[key], begin, planner.resolve_tensor(item).detach())


def _files(boxes: Sequence[Box]) -> set[str]:
    """The files in which what the boxes need lies."""
    return {
        chunk.file
        for tensor, begin, target in boxes
        for chunk in tensor.chunks
        if all(
            max(at, place) < min(at + length, place + size)
            for at, length, place, size in zip(begin, target.shape, chunk.offsets, chunk.sizes, strict=True)
        )
    }


def _read(reader: Reader, tensor: TensorEntry, begin: Sequence[int], target: torch.Tensor) -> None:
    """Read a box into memory of any kind: at once where it lies in a run, else piece by piece."""
    sizes, length = tuple(target.shape), target.numel() * tensor.itemsize
    if length == 0:
        return
    dtype = _dtype(tensor)
    if target.is_cpu and target.is_contiguous() and target.dtype == dtype and not target.is_neg():
        fill_box(reader, tensor, begin, sizes, memory(target.data_ptr(), length, writable=True))
        return
    if length <= _PIECE_BYTES:
        data = torch.empty(sizes, dtype=dtype)
        fill_box(reader, tensor, begin, sizes, memory(data.data_ptr(), length, writable=True))
        target.copy_(data)
        return
    dim = next(dim for dim, size in enumerate(sizes) if size > 1)
    rows = max(1, _PIECE_BYTES // (length // sizes[dim]))
    for at in range(0, sizes[dim], rows):
        place = [one + at if index == dim else one for index, one in enumerate(begin)]
        _read(reader, tensor, place, target.narrow(dim, at, min(rows, sizes[dim] - at)))
