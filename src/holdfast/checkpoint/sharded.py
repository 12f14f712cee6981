"""Checkpoints of models that no process holds whole: a directory, into which each process writes its shards.

    split, join          a payload into the tensors and the rest, and back
    save                 all ranks: the directory, whole and durable under its name, or not there
    load_rest            what is not a sharded tensor
    tensor_info          which tensors there are
    load_into            tensors into live ones, however many processes wrote it and read it
    load                 all of it in one process
    merge                all of it as one ordinary file
    verify, is_sharded, remove

The shards are files of `torch.distributed.checkpoint`, whose own `load` opens the directory too. holdfast
reads none of its pickles: see docs/format.md.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from holdfast.checkpoint import commit, directories, sharded_bytes, sharded_load, sharded_write
from holdfast.checkpoint.directories import is_sharded as is_sharded
from holdfast.checkpoint.merge import merge as merge
from holdfast.checkpoint.report import SaveReport
from holdfast.checkpoint.sharded_payload import join as join
from holdfast.checkpoint.sharded_payload import split as split
from holdfast.checkpoint.tensors import mover
from holdfast.checkpoint.verify import EVERY_BYTE, VerifyReport
from holdfast.errors import CheckpointNotFound, HoldfastError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def save(
    path: str | os.PathLike[str],
    rest: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    world_size: int,
    group: ProcessGroup | None = None,
    summary: Mapping[str, Any] | None = None,
    names: Sequence[str | os.PathLike[str]] = (),
) -> SaveReport | None:
    """Save a payload that `split` took apart: each rank writes what it alone has, and rank 0 commits.

    What several ranks have is written by one of them. Of plain tensors it is rank 0's that is saved. Two
    keys of one tensor (tied weights) share its bytes.

    Args:
        path: the directory. Its parents are made; a checkpoint of that name, a file too, is replaced as a
            whole, and is whole until then.
        rest: the rest of the payload; what other ranks than 0 give is ignored.
        tensors: Tensors and DTensors by their keys, which nothing changes meanwhile: a snapshot.
        rank: this process's number in ``group``.
        world_size: how many processes take part.
        group: a process group on the host (gloo) that nobody else uses meanwhile; None for the default one.
        summary: plain values that a listing shows; rank 0's counts.
        names: further names, each a directory of its own that shares the files where the file system can.

    Ranks: all.
    Blocks: until it is durable under its name and all further ones, or has failed on all ranks.
    On return: a report on rank 0, None elsewhere.

    Raises:
        StorageError: a disk refused, whichever rank's; the same on all. All names are as they were, unless it
            is about a further name: then ``path`` has the new checkpoint already.
        ConfigError: the summary is not plain values.
        RuntimeError: a process of the group is gone.
    """
    return sharded_write.save(
        path, rest, tensors,
        rank=rank, world_size=world_size, group=group, summary=summary, names=names,
    )  # fmt: skip


def load_rest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what is not in the shards, every byte of it checked; None stands where `join` puts a tensor.

    Raises:
        CheckpointNotFound: there is no such directory.
        CheckpointError: it is not whole, or that part of it is damaged.
        StorageError: it cannot be read.
    """
    return sharded_load.load_rest(path)


def tensor_info(path: str | os.PathLike[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor in the shards, by its key; no shard is read.

    Raises:
        CheckpointError, StorageError: as `load_rest` does.
    """
    return sharded_load.tensor_info(path)


def load_into(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], *, group: ProcessGroup | None = None
) -> None:
    """Read tensors into live Tensors and DTensors, whatever the number of processes that saved them.

    Each rank reads the files that it needs something of, and nothing is written into a tensor on any rank
    before every rank has checked all of these. A tensor of another dtype is converted.

    Args:
        path: the directory.
        tensors: where to, by key: any of those in the checkpoint.
        group: the processes that load together; None for this one alone.

    Ranks: all of ``group``.
    Blocks: until this rank's tensors are read.
    Memory: a few megabytes.

    Raises:
        CheckpointIncompatible: it has no such tensor, or one of another shape. No tensor was changed.
        CheckpointError: it is not there, not whole, or damaged, as a rank sees it; the same on all ranks. No
            tensor was changed.
        StorageError: it cannot be read.
    """
    sharded_load.load_into(path, tensors, group=group)


def load(
    path: str | os.PathLike[str], *, map_location: Any = "cpu", skip: Collection[str] = ()
) -> dict[str, Any]:
    """Read all of it, with every tensor whole, as `holdfast.load` reads a file.

    Args:
        path: the directory.
        map_location: where tensors go, as `torch.load` takes it.
        skip: top-level keys to leave out.

    Raises:
        CheckpointError, StorageError: as `load_rest` does.
    """
    return sharded_load.load(path, mover(map_location, os.fspath(path)), skip=skip)


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Check every byte; returns only if all are as they were written, and nothing else is in the directory.

    Raises:
        CheckpointNotFound: there is none.
        CheckpointError: a file is missing, cut short, changed, another's, or too much; it is named, and the
            tensors in it are.
        StorageError: it cannot be read.
    """
    found = sharded_bytes.verify(path)
    return VerifyReport(os.fspath(path), found.files, found.size_bytes, found.seconds, EVERY_BYTE)


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a checkpoint, directory or file: whoever reads it meanwhile finds all of it or none.

    Raises:
        CheckpointNotFound: there is none.
        StorageError: the disk refused, or there is something else in the directory.
    """
    name = os.fspath(path)
    try:
        directories.remove(name)
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"There is no checkpoint {name}.", path=name) from error
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise commit.storage_error(name, "delete", error) from error
