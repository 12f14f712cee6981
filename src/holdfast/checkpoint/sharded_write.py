"""A sharded checkpoint written: each process its shards, and when all are on disk one of them commits.

The shards are files of torch.distributed.checkpoint (DCP), with its ``.metadata`` beside them, planned by
DCP's own planner. What holdfast goes by is ``manifest.json``, written last, and ``tensors.json``.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from holdfast.checkpoint import catalog, commit, directories, sharded_tensors
from holdfast.checkpoint.agreed import Round
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.directories import MANIFEST, METADATA, PAYLOAD, TENSORS, sharded_point
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.plain_summary import plain_summary
from holdfast.checkpoint.report import SaveReport
from holdfast.checkpoint.shard_file import Shard, ShardFile, put_item
from holdfast.checkpoint.sharded_manifest import manifest_bytes
from holdfast.checkpoint.sharded_plan import LocalPlan, SavePlan, local_plan
from holdfast.checkpoint.sharded_tensors import Part
from holdfast.errors import StorageError

_PIECE_BYTES = 4 << 20


class Task(NamedTuple):
    """What a process is to write.

    Attributes:
        temporary: the name of the directory that it goes into.
        chunks: (key, offsets, sizes) of the chunks that it alone writes.
        needed_bytes: how much all of them write.
    """

    temporary: str
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    needed_bytes: int


def save(
    path: str | os.PathLike[str],
    rest: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    world_size: int,
    group: Any,
    summary: Mapping[str, Any] | None,
    names: Sequence[str | os.PathLike[str]] = (),
) -> SaveReport | None:
    """See `holdfast.checkpoint.sharded.save`."""
    final = os.path.abspath(os.fspath(path))
    further = tuple(dict.fromkeys(os.path.abspath(os.fspath(name)) for name in names))
    others = tuple(name for name in further if name != final)
    saving = _Saving(final, others, rank, world_size, dict(summary or {}))
    try:
        return saving.run(rest, tensors, Round(final, "write", rank=rank, world_size=world_size, group=group))
    finally:
        saving.end()


class _Saving:
    """One save in one process; what is rank 0's alone to do is marked so."""

    def __init__(
        self, path: str, names: tuple[str, ...], rank: int, world_size: int, summary: dict[str, Any]
    ) -> None:
        self.path, self.names, self.rank = path, names, rank
        self.own_part = "write" if world_size == 1 else f"write rank {rank}'s part of"
        self.about = plain_summary(summary) if rank == 0 else {}
        self.began = time.monotonic()
        self.temporary = ""
        self.held: int | None = None
        self.plan = SavePlan()
        self.rest_part: Part | None = None
        self.omissions: list[tuple[str, str]] = []

    def run(self, rest: Any, tensors: Mapping[str, torch.Tensor], together: Round) -> SaveReport | None:
        local = {key: tensor.detach() for key, tensor in tensors.items()}
        task = together(lambda: local_plan(local), self.begin)
        return together(lambda: self.write(task, local, rest), self.commit)

    def end(self) -> None:
        """Let go of the directory; what was not committed is removed, on rank 0."""
        if self.held is not None:
            os.close(self.held)
        if self.temporary:
            shutil.rmtree(self.temporary, ignore_errors=True)

    # -- rank 0 ----------------------------------------------------------------------------------------------

    def begin(self, plans: list[LocalPlan]) -> list[Task]:
        """Make the directory, and settle who writes what. Ranks: 0."""
        chunks = self.plan.settle(plans)
        parent = os.path.dirname(self.path)
        commit.make_directories(parent)
        with contextlib.suppress(StorageError):  # saving matters more
            commit.remove_stray_temp_files(parent)
        with _named(self.path, "create a directory beside"):
            if os.path.lexists(self.path):
                directories.check_replaceable(self.path)
            self.temporary, self.held = directories.create_temporary(self.path)
        sharded_point("directory-begun")
        needed = self.plan.needed_bytes
        if commit.free_bytes(self.path) < needed:
            raise self.problem("write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed)
        return [Task(os.path.basename(self.temporary), own, needed) for own in chunks]

    def commit(self, shards: list[Shard]) -> list[SaveReport | None]:
        """Write what describes the shards, the manifest last, and give the directory its name. Ranks: 0."""
        assert self.rest_part is not None and self.held is not None
        with _named(self.path, "write"):
            entries = self.plan.entries(shards)
            files = {PAYLOAD: self.rest_part}
            files |= {shard.file: shard.part for shard in shards if shard.file and shard.part}
            described = {
                TENSORS: sharded_tensors.tensors_bytes(entries),
                METADATA: pickle.dumps(self.plan.metadata(shards, entries), protocol=2),
            }
            for name, data in described.items():
                files[name] = Part(len(data), crc32(data))
                self._put(name, data)
            sharded_tensors.parse(described[TENSORS], files)  # as a reader is going to
            summary = catalog.read_summary(os.path.join(self.temporary, PAYLOAD)).values
            manifest = manifest_bytes(summary, files, len(shards))
            self._put(MANIFEST, manifest)
            os.fsync(self.held)
        sharded_point("manifest-written")
        with _named(self.path, "rename a directory to"):
            old = directories.replace(self.temporary, self.path)
        self.temporary = ""
        sharded_point("directory-renamed")
        with _named(self.path, "fsync the directory of", in_place=True):
            commit.fsync_directory(os.path.dirname(self.path))
        sharded_point("directory-in-place")
        write_s = time.monotonic() - self.began
        if old is not None:
            with contextlib.suppress(
                OSError
            ):  # it has lost its name, and goes with the next save at the latest
                directories.discard(old)
        links = tuple(commit.add_name(self.path, name) for name in self.names)
        spent = time.monotonic() - self.began
        size = sum(part.size_bytes for part in files.values()) + len(manifest)
        report = SaveReport(
            self.path, self.names, size, spent, spent, self.omissions, links, write_s=write_s
        )  # fmt: skip
        return [report, *[None] * (len(shards) - 1)]

    def _put(self, name: str, data: bytes) -> None:
        fd = os.open(
            os.path.join(self.temporary, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
        )
        try:
            commit.write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)

    # -- every rank ------------------------------------------------------------------------------------------

    def write(self, task: Task, tensors: Mapping[str, torch.Tensor], rest: Any) -> Shard:
        """Write this process's shard, durably; on rank 0 the rest of the payload too."""
        place = os.path.join(os.path.dirname(self.path), task.temporary)
        if self.rank == 0:
            self._write_rest(rest)
        else:
            self._join(place)
        if not task.chunks:
            return Shard(None, None, [])
        name = f"__{self.rank}_0.distcp"
        least = sum(math.prod(sizes) * tensors[key].element_size() for key, _, sizes in task.chunks)
        try:
            with ShardFile(os.path.join(place, name), least) as file:
                written = []
                for number, (key, offsets, sizes) in enumerate(task.chunks):
                    if number == len(task.chunks) // 2:
                        sharded_point("shard-writing")
                    written.append(put_item(file, name, key, tensors[key], offsets, sizes))
                file.end()
        except OSError as error:
            raise self.problem(self.own_part, error, task.needed_bytes) from error
        sharded_point("shard-synced")
        return Shard(name, Part(file.position, file.checksum), written)

    def _join(self, place: str) -> None:
        try:
            self.held = directories.hold(place)
        except FileNotFoundError:
            raise StorageError(
                f"Could not write {self.path}: rank {self.rank} does not see the directory "
                f"{os.path.basename(place)} that rank 0 has made beside it. All ranks write into one "
                "directory: save to a file system that they share.",
                path=self.path,
            ) from None

    def _write_rest(self, rest: Any) -> None:
        target = os.path.join(self.temporary, PAYLOAD)
        try:
            report = CheckpointEngine().save(rest, target, summary=self.about)
            self.omissions = report.omissions
            with open(target, "rb", buffering=0) as file:
                size = checksum = 0
                while piece := file.read(_PIECE_BYTES):
                    size, checksum = size + len(piece), crc32(piece, checksum)
        except OSError as error:
            code = error.errno or errno.EIO
            raise self.problem(
                self.own_part, OSError(code, os.strerror(code)), self.plan.needed_bytes
            ) from error
        self.rest_part = Part(size, checksum)

    def problem(self, operation: str, error: OSError, needed_bytes: int) -> StorageError:
        """The error for what the file system refused."""
        about = commit.Replacement(self.path, "", -1)
        about.needed_bytes = needed_bytes
        return commit.storage_error(self.path, operation, error, about)


@contextlib.contextmanager
def _named(path: str, operation: str, *, in_place: bool = False) -> Any:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise commit.storage_error(path, operation, error, in_place=in_place) from error
