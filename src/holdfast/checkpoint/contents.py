"""What a checkpoint file holds, whoever wrote it: its values and where its tensors lie; no tensor is read.

Needs no torch, but for files in torch's format of before 1.6. Nothing that a file names is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from holdfast.checkpoint import catalog, commit, container, integrity, origin, safetensors_header
from holdfast.checkpoint.directories import is_sharded
from holdfast.checkpoint.foreign_archive import Archive
from holdfast.checkpoint.inert import InertUnpickler, TensorFacts
from holdfast.checkpoint.own_file import corrupt, no_checkpoint, own_tail
from holdfast.checkpoint.pickle_scan import printable, scan
from holdfast.errors import (
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointUnsafe,
    HoldfastError,
)


class Place(NamedTuple):
    """Where a storage's bytes lie in the file."""

    offset: int
    length: int


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        name: its path or address.
        fd: the opened file; good within `opened` only.
        size_bytes: its length.
        maker: "holdfast", "PyTorch Lightning", "torch" or "safetensors".
        form: the format in words.
        value: the payload, with `TensorFacts` in the place of tensors.
        storages: where the bytes of each are, by the keys that tensors have.
        summary: what our own files say of themselves.
        omissions: (path, reason) of each value that could not be stored; of our own files.
        unlisted: names in the pickle beyond those of plain values and tensors.
        inert: those among them that holdfast has no plain value for.
        metadata: the text that a safetensors file carries.
    """

    name: str
    fd: int
    size_bytes: int
    maker: str = "torch"
    form: str = "zip archive of torch.save"
    value: Any = None
    storages: dict[str, Place] = field(default_factory=dict)
    summary: catalog.Summary | None = None
    omissions: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    inert: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, key: str, at: int, into: memoryview) -> bool:
        """Read bytes of a storage from its ``at``-th on, as many as there is room for; False if it has fewer.

        Raises:
            OSError: the disk failed.
        """
        place = self.storages.get(key)
        if place is None or at + len(into) > place.length:
            return False
        at += place.offset
        while into:
            got = os.preadv(self.fd, [into], at)
            if not got:
                return False
            at, into = at + got, into[got:]
        return True


@contextlib.contextmanager
def opened(source: origin.Source) -> Iterator[Contents]:
    """Read what a file holds, for the length of a block.

    Args:
        source: a path, that of a sharded checkpoint too, or a URL; a URL is fetched whole.

    Raises:
        CheckpointError: the file is not there, is not a checkpoint, is damaged where its structure is, or
            asks for absurd amounts of memory.
        StorageError: it cannot be read or fetched.
    """
    if isinstance(source, (str, os.PathLike)) and not origin.is_url(source) and is_sharded(source):
        from holdfast.checkpoint.sharded_contents import (
            opened as opened_directory,
        )  # which opens a file in it

        with opened_directory(os.fspath(source)) as found_there:
            yield found_there
        return
    with origin.opened(source) as found:
        try:
            contents = _read(found)
        except OSError as error:
            if isinstance(error, HoldfastError):
                raise
            raise commit.storage_error(found.name, "read", error) from error
        yield contents


def _read(found: origin.Origin) -> Contents:
    fd = found.file.fileno()
    made = Contents(found.name, fd, os.fstat(fd).st_size)
    tail = own_tail(found)
    if tail is None:
        _read_foreign(made)
        return made
    try:
        _read_own(made, tail)
    except integrity.Damage as damage:
        raise corrupt(found, damage) from None
    return made


def _read_own(made: Contents, tail: container.Tail) -> None:
    manifest = integrity.read_manifest(made.fd, tail)
    made.maker, made.form = "holdfast", f"format {tail.summary['format']}"
    made.summary = catalog.summary_from(tail.summary)
    made.omissions = [
        (str(one[0]), str(one[1])) for one in manifest.omissions if isinstance(one, list) and len(one) == 2
    ]
    pickled = bytearray()
    for record in manifest.records:
        kind, _, key = record.entry.name.partition("/")
        if kind == "data":
            made.storages[key] = Place(record.entry.offset, record.entry.length)
        elif kind == "data.pkl":
            pickled = bytearray(record.entry.length)
            integrity.read_records(made.fd, [integrity.Job(record, memoryview(pickled))])
    _unpickle(made, bytes(pickled))


def _read_foreign(made: Contents) -> None:
    head = os.pread(made.fd, 16, 0)
    if container.is_zip(made.fd):
        _read_zip(made)
    elif container.is_old_torch(head):
        _read_legacy(made)
    elif safetensors_header.begins(made.fd, made.size_bytes):
        _read_safetensors(made)
    else:
        raise no_checkpoint(made.name, head)
    if isinstance(made.value, dict) and "pytorch-lightning_version" in made.value:
        made.maker = "PyTorch Lightning"


def _read_zip(made: Contents) -> None:
    archive, short = Archive(made.name, made.fd, verify=True), os.path.basename(made.name)
    if "constants.pkl" in archive.records:
        raise CheckpointIncompatible(f"{short} is a TorchScript program, not a checkpoint.", path=made.name)
    if "data.pkl" not in archive.records:
        text = f"{short} is a zip archive, but not a checkpoint: it has no data.pkl."
        raise CheckpointIncomplete(text, path=made.name)
    _unpickle(made, archive.read("data.pkl"))
    for inner in archive.records:
        if inner.startswith("data/"):
            key = inner.removeprefix("data/")
            made.storages[key] = Place(archive.place(inner), archive.length(key))


def _read_legacy(made: Contents) -> None:
    from holdfast.checkpoint.foreign_legacy import LegacyFile  # needs torch

    made.form = "torch.save's format of before torch 1.6"
    with _readable(made.name):
        file = LegacyFile(made.name, made.fd)
        itemsizes = _unpickle(made, file.pickled)
        file.locate(itemsizes)
        for key in itemsizes:
            made.storages[key] = Place(file.place(key), file.length(key))


def _read_safetensors(made: Contents) -> None:
    made.maker = made.form = "safetensors"
    try:
        header = safetensors_header.read(made.fd, made.size_bytes)
    except safetensors_header.BadHeader as problem:
        text = f"{os.path.basename(made.name)} is not a whole safetensors file: {problem}."
        raise CheckpointIncomplete(text, path=made.name) from None
    made.metadata, made.value = header.metadata, {}
    for name, (dtype, shape, offset, length) in header.tensors.items():
        made.storages[name] = Place(offset, length)
        made.value[name] = TensorFacts(dtype, shape, stride=_dense(shape), key=name)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(1, length)
    return tuple(reversed(stride))


def _unpickle(made: Contents, pickled: bytes) -> dict[str, int]:
    with _readable(made.name):
        scan(pickled)
        unpickler = InertUnpickler(pickled)
        made.value = unpickler.load()
    made.unlisted, made.inert = list(unpickler.unlisted), list(unpickler.inert)
    return unpickler.itemsizes


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, OSError, Warning):
        raise
    except Exception as error:
        text = f"{os.path.basename(name)} cannot be read: {printable(str(error), 500)}."
        raise CheckpointUnsafe(text, path=name) from error
