"""Who writes which chunk of which tensor, by the planner of torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from holdfast.checkpoint import sharded_tensors
from holdfast.checkpoint.shard_file import Shard, local_part
from holdfast.checkpoint.sharded_tensors import Chunk, TensorEntry

_DCP_VERSION = "1.0.0"
_AROUND_BYTES = 1024  # of zip and pickle, for each chunk


class LocalPlan(NamedTuple):
    """What a process could write.

    Attributes:
        plan: DCP's plan of it.
        same: for each key the first one whose tensor is the very same; "" where there are no bytes to tell.
    """

    plan: Any
    same: dict[str, str]


def local_plan(tensors: Mapping[str, torch.Tensor]) -> LocalPlan:
    """What this process could write of the tensors that it has."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=False)
    first: dict[Any, str] = {}
    same = {}
    for key, tensor in tensors.items():
        local = local_part(tensor)
        who = (local.data_ptr(), local.shape, local.stride(), local.dtype, local.device, tensor.shape)
        same[key] = first.setdefault(who, key) if local.numel() else ""
    return LocalPlan(planner.create_local_plan(), same)


class SavePlan:
    """Who writes what, settled on rank 0."""

    def __init__(self) -> None:
        self.needed_bytes = 0
        self.same: dict[str, str] = {}
        self._metadata: Any = None

    def settle(self, plans: list[LocalPlan]) -> list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
        """The chunks of each rank: every element once, and a tensor with two names once.

        What all ranks have is written by one of them, DTensors by whichever has least to write, and plain
        tensors by the first: where they differ, as BatchNorm's statistics do, it is rank 0's that counts.
        """
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.planner import WriteItemType

        self.same = _same_on_all([one.same for one in plans])
        plain: set[str] = set()
        wanted = []
        for one in plans:
            items = []
            for item in one.plan.items:
                key, data = item.index.fqn, item.tensor_data
                if key in self.same or (data.chunk.sizes.numel() == 0 and data.size.numel()):
                    continue
                if item.type == WriteItemType.TENSOR:
                    if key in plain:
                        continue
                    plain.add(key)
                items.append(item)
            wanted.append(dataclasses.replace(one.plan, items=items))
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        settled, self._metadata = planner.create_global_plan(wanted)
        chunks = []
        for plan in settled:
            boxes: list[Any] = [(item.index.fqn, item.tensor_data) for item in plan.items]
            chunks.append([(key, tuple(data.chunk.offsets), tuple(data.chunk.sizes)) for key, data in boxes])
        known = self._metadata.state_dict_metadata
        self.needed_bytes = sum(one.size.numel() * one.properties.dtype.itemsize for one in known.values())
        self.needed_bytes += _AROUND_BYTES * sum(map(len, chunks))
        return chunks

    def entries(self, shards: list[Shard]) -> list[TensorEntry]:
        """All tensors and where they lie, those with two names under both."""
        chunks: dict[str, list[Chunk]] = {}
        for shard in shards:
            for one in shard.written:
                chunks.setdefault(one.key, []).append(one.chunk)
        known = self._metadata.state_dict_metadata
        names = _dcp_names([*known, *self.same])
        made = []
        for key in [*known, *self.same]:
            first = self.same.get(key, key)
            about, path = known[first], tuple(_path(key))
            own = tuple(sorted(chunks.get(first, ()), key=lambda chunk: chunk.offsets))
            dtype = str(about.properties.dtype)[6:]
            made.append(TensorEntry(path, dtype, tuple(about.size), names[key], own))
        return made

    def metadata(self, shards: list[Shard], entries: list[TensorEntry]) -> Any:
        """What DCP's own reader goes by."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

        items = {
            (one.key, one.chunk.offsets): (shard.file, one.at, one.length)
            for shard in shards
            for one in shard.written
            if shard.file is not None
        }
        about: dict[str, Any] = {}
        where: dict[Any, Any] = {}
        paths = {}
        for entry in entries:
            key = sharded_tensors.key_of(entry.path)
            first = self.same.get(key, key)
            known = about[entry.name] = self._metadata.state_dict_metadata[first]
            paths[entry.name] = entry.path
            for number, chunk in enumerate(known.chunks):
                index = MetadataIndex(entry.name, chunk.offsets, number)
                where[index] = _StorageInfo(*items[first, tuple(chunk.offsets)])
        return Metadata(about, paths, where, StorageMeta(), _DCP_VERSION)


def _same_on_all(told: list[dict[str, str]]) -> dict[str, str]:
    """The keys that are further names of another one's tensor on every rank that has bytes of it."""
    found: dict[str, str] = {}
    everywhere: dict[str, set[str]] = {}
    for one in told:
        for key, first in one.items():
            everywhere.setdefault(key, set()).add(first)
    for key, firsts in everywhere.items():
        firsts.discard("")
        if len(firsts) == 1 and key not in firsts:
            (first,) = firsts
            if everywhere[first] - {""} == {first} and all((key in one) == (first in one) for one in told):
                found[key] = first
    return found


def _path(key: str) -> list[str | int]:
    path: list[str | int] = json.loads(key)
    return path


def _dcp_names(keys: list[str]) -> dict[str, str]:
    """DCP's own names, the path's parts with dots between; of two that are alike, the keys themselves."""
    dotted = {key: ".".join(map(str, _path(key))) for key in keys}
    taken: dict[str, int] = {}
    for name in dotted.values():
        taken[name] = taken.get(name, 0) + 1
    return {key: name if taken[name] == 1 else key for key, name in dotted.items()}
