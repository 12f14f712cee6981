"""What a sharded checkpoint holds, for those who look at it: no tensor is read before somebody asks for it.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from holdfast.checkpoint import catalog, contents, sharded_bytes
from holdfast.checkpoint.contents import Contents, Place
from holdfast.checkpoint.directories import PAYLOAD
from holdfast.checkpoint.inert import TensorFacts
from holdfast.checkpoint.sharded_bytes import Reader
from holdfast.checkpoint.sharded_manifest import Bad
from holdfast.checkpoint.sharded_payload import join
from holdfast.checkpoint.sharded_tensors import TensorEntry
from holdfast.errors import CheckpointUnsafe


@dataclasses.dataclass
class ShardedContents(Contents):
    """What a sharded checkpoint holds.

    Attributes:
        tensors: those in the shards, by the keys of their storages.
        reader: reads them.
    """

    tensors: dict[str, TensorEntry] = dataclasses.field(default_factory=dict)
    reader: Reader | None = None

    def read(self, key: str, at: int, into: memoryview) -> bool:
        """Read bytes of a storage, wherever they lie."""
        entry = self.tensors.get(key)
        if entry is None or self.reader is None:
            return super().read(key, at, into)
        if at + len(into) > entry.size_bytes:
            return False
        self.reader.read(entry, at, into)
        return True


@contextlib.contextmanager
def opened(name: str) -> Iterator[Contents]:
    """See `contents.opened`."""
    with sharded_bytes.opened(name) as directory, Reader(directory) as reader:
        directory.check(PAYLOAD)
        with contents.opened(os.path.join(directory.place, PAYLOAD)) as rest:
            manifest = directory.manifest
            known = vars(rest) | {
                "name": name,
                "size_bytes": manifest.size_bytes,
                "form": f"format {manifest.format}, {manifest.world_size} shard"
                + ("s" if manifest.world_size > 1 else ""),
                "summary": catalog.summary_from({"format": manifest.format} | manifest.summary),
            }
            made = ShardedContents(**known, reader=reader)
            first: dict[Any, str] = {}
            facts = {}
            for key, entry in directory.tensors().items():
                storage = first.setdefault((entry.dtype, entry.shape, entry.chunks), key)
                facts[key] = TensorFacts(entry.dtype, entry.shape, stride=_dense(entry.shape), key=storage)
                made.tensors[key] = entry
                made.storages[key] = Place(0, entry.size_bytes)
            try:
                made.value = join(rest.value, facts)
            except (ValueError, TypeError) as error:
                raise Bad(CheckpointUnsafe, f"its tensors do not fit its {PAYLOAD} ({error})") from error
            yield made


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(1, length)
    return tuple(reversed(stride))
