"""The bytes on the disk are the same however they get there: in blocks past the cache, through it, from an image."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import commit, container, direct, payload, pickling, writing
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.container import Entry
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.load import load
from holdfast.checkpoint.tensors import Plan
from holdfast.errors import StorageError

BATCH = 64 << 10


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers so small that a few hundred kilobytes go through all of them several times."""
    monkeypatch.setattr(writing, "BATCH_BYTES", BATCH)
    monkeypatch.setattr(writing, "PIECE_BYTES", 24 << 10)
    monkeypatch.setattr(writing, "DIRECT_BYTES", 1)


def content(value: Any) -> writing.Content:
    encoded = payload.encode(value)
    plan = Plan(encoded.tensors)
    pickled = pickling.dumps(encoded.tree, plan)
    return writing.Content(Layout(plan.records), pickled, encoded.types, encoded.omissions, {"step": 3})


def written(value: Any, path: Path, *, from_image: bool = False) -> bytes:
    made = content(value)
    with commit.replacing(str(path)) as file:
        size = writing.write(file, made, image_of(made.layout) if from_image else None)
    data = path.read_bytes()
    assert len(data) == size
    return data


def image_of(layout: Layout) -> memoryview:
    memory = direct.aligned(max(1, layout.image_bytes))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for record, entry in zip(layout.records, layout.entries, strict=True):
        record.copy_to(address + entry.offset)
    return memoryview(memory)


def expected(value: Any) -> bytes:
    """The file, put together one record after the other."""
    made = content(value)
    data = bytearray()
    entries = []

    def add(name: str, record: bytes) -> Entry:
        header = container.local_header(name, len(data), len(record), crc32(record))
        entries.append(Entry(name, len(data), len(data) + len(header), len(record), crc32(record)))
        data.extend(header + record)
        return entries[-1]

    for record in made.layout.records:
        add(record.name, b"".join(ctypes.string_at(*piece) for piece in record.pieces()))
    add("data.pkl", made.pickled)
    add("version", b"3\n")
    add("byteorder", b"little")
    manifest = container.records_bytes(entries, made.layout.tensors, made.types, made.omissions)
    placed = add(container.RECORDS, manifest)
    add(container.SUMMARY, container.summary_bytes(made.about, placed))
    return bytes(data) + container.directory(entries, len(data))


def some(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


HEADER = 64  # before the first record's data
STATES: dict[str, Callable[[], Any]] = {
    "no tensors": lambda: {"step": 1},
    "an empty tensor": lambda: some(0),
    "one byte": lambda: some(1),
    "64 bytes": lambda: some(64),
    "a block less its header": lambda: some(4096 - HEADER),
    "a block": lambda: some(4096),
    "a buffer less its header": lambda: some(BATCH - HEADER),
    "a byte more": lambda: some(BATCH - HEADER + 1),
    "a buffer": lambda: some(BATCH),
    "several buffers": lambda: some(7 * BATCH + 77),
    "more than the ring": lambda: [some(9 * BATCH, 1), some(5, 2), some(11 * BATCH + 4095, 3), some(0)],
    "long ones side by side": lambda: [some(2 * BATCH - n, n) for n in range(6)],
    "ends at every place of a block": lambda: [some(BATCH // 2 + 61 * n, n) for n in range(70)],
    "many small ones": lambda: [some(n % 90, n) for n in range(3000)],
    "made dense": lambda: [
        torch.arange(400_000.0)[::5],
        torch.arange(60_000).view(300, 200)[:, ::50],
        some(9),
    ],
    "views of one": lambda: (lambda base: [base, base[7:50_000], base[::3]])(torch.arange(90_000.0)),
}


@pytest.mark.parametrize("name", STATES)
def test_every_way_of_writing_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = STATES[name]()
    right = expected(value)
    assert written(value, tmp_path / "direct.ckpt") == right
    assert written(value, tmp_path / "image.ckpt", from_image=True) == right
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_DIRECT", 0)
        assert written(value, tmp_path / "cached.ckpt") == right
        assert written(value, tmp_path / "cached-image.ckpt", from_image=True) == right
        patch.setattr(direct, "_fallocate", None)
        patch.setattr(direct, "_sync_file_range", None)
        assert written(value, tmp_path / "elsewhere.ckpt") == right
    monkeypatch.setattr(writing, "DIRECT_BYTES", 1 << 30)
    monkeypatch.setattr(writing, "BATCH_BYTES", 1 << 30)
    assert written(value, tmp_path / "at-once.ckpt") == right


@pytest.mark.parametrize("name", ["more than the ring", "many small ones", "made dense", "views of one"])
def test_torch_zip_tools_and_holdfast_open_what_went_out_in_blocks(name: str, tmp_path: Path) -> None:
    value = STATES[name]()
    written(value, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
    for read in (
        load(tmp_path / "a.ckpt"),
        torch.load(tmp_path / "a.ckpt", weights_only=True),
        torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True),
    ):
        assert all(map(torch.equal, read, value))


@pytest.mark.parametrize("threshold", [100, 3 * BATCH])
def test_zip64_fields_in_a_file_of_several_buffers(
    threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "ZIP64_BYTES", threshold)
    value = [some(3, 1), some(5 * BATCH, 2), some(9, 3)]
    assert written(value, tmp_path / "a.ckpt") == expected(value)
    assert all(map(torch.equal, torch.load(tmp_path / "a.ckpt", weights_only=True), value))


class Disk:
    """What `os.pwritev` is asked for, and a say in what it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = os.pwritev
        self.calls: list[tuple[bool, int, int, int]] = []  # direct, address, length, offset
        self.before: Callable[[int, bool], None] = lambda number, is_direct: None
        self.most = 1 << 40
        self._lock = threading.Lock()
        monkeypatch.setattr(os, "pwritev", self.pwritev)

    def pwritev(self, fd: int, parts: list[Any], at: int) -> int:
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
        with self._lock:
            number = len(self.calls)
            first = memoryview(parts[0])
            address = 0 if first.readonly else ctypes.addressof(ctypes.c_char.from_buffer(first))
            self.calls.append((is_direct, address, sum(memoryview(part).nbytes for part in parts), at))
            self.before(number, is_direct)
        if first.nbytes > self.most:
            parts = [first[: self.most]]
        return self.whole(fd, parts, at)


def test_blocks_go_past_the_page_cache_where_the_file_system_lets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "probe", "wb") as probe:
        if not direct.set_direct(probe.fileno(), True):
            pytest.skip("this file system has no O_DIRECT")
    for from_image in (False, True):
        with monkeypatch.context() as patch:
            disk = Disk(patch)
            value = STATES["more than the ring"]()
            data = written(value, tmp_path / "a.ckpt", from_image=from_image)
            end = content(value).layout.end
            past = [call for call in disk.calls if call[0]]
            assert sum(length for _, _, length, _ in past) == end - end % 4096
            assert all(address % 4096 == length % 4096 == at % 4096 == 0 for _, address, length, at in past)
            assert sum(call[2] for call in disk.calls if not call[0]) < len(data) - end + 4 * 4096


def test_a_file_system_that_refuses_only_when_it_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take the flag and then say EINVAL: from the first write on, or once it is under way."""
    value = STATES["more than the ring"]()
    right = expected(value)
    for passes in (0, 3):
        with monkeypatch.context() as patch:
            disk = Disk(patch)

            def refuse(number: int, is_direct: bool, passes: int = passes) -> None:
                if is_direct and number >= passes:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

            disk.before = refuse
            assert written(value, tmp_path / "a.ckpt") == right


@pytest.mark.parametrize("most", [4096, 12_288, 5000, 60_001])
def test_short_writes_go_on_where_they_stopped(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = STATES["more than the ring"]()
    disk = Disk(monkeypatch)
    disk.most = most
    assert written(value, tmp_path / "a.ckpt") == expected(value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINVAL])
@pytest.mark.parametrize("passes", [0, 1, 6, 30])
def test_a_disk_that_fails_under_way_is_told_and_left_alone(
    passes: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"w": torch.ones(1)}, path)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for from_image in (False, True):
        with monkeypatch.context() as patch:
            disk = Disk(patch)

            def refuse(count: int, is_direct: bool) -> None:
                if count >= passes:
                    raise OSError(number, os.strerror(number))

            disk.before = refuse
            with pytest.raises(StorageError) as caught:
                written([some(60 * BATCH)], path, from_image=from_image)
        assert caught.value.errno == number
        assert str(caught.value).startswith(
            f"Could not write {path}: {os.strerror(number)}. What was there before is untouched. "
        )
        assert len(disk.calls) <= passes + 4  # no more than what was in flight, each perhaps twice
        assert os.listdir(tmp_path) == ["a.ckpt"]
        assert load(path)["w"] == 1
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "free_bytes", lambda path: 300_000)
    disk = Disk(monkeypatch)
    path = tmp_path / "a.ckpt"
    with pytest.raises(StorageError) as caught:
        written([some(5 * BATCH)], path)
    needed = str(caught.value).partition("No space left on device. ")[2].partition(" ")[0]
    assert 5 * BATCH < int(needed.replace(",", "")) < 5 * BATCH + 2000
    assert str(caught.value) == (
        f"Could not write {path}: No space left on device. {needed} bytes are needed, 300,000 bytes are free: "
        "make room, or save somewhere else."
    )
    assert caught.value.errno == errno.ENOSPC
    assert disk.calls == []
    assert os.listdir(tmp_path) == []


def test_room_that_the_file_system_cannot_set_aside_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, mode: int, at: int, length: int) -> int:
        ctypes.set_errno(errno.EDQUOT)
        return -1

    monkeypatch.setattr(direct, "_fallocate", full)
    disk = Disk(monkeypatch)
    with pytest.raises(StorageError) as caught:
        written([some(5 * BATCH)], tmp_path / "a.ckpt")
    assert str(caught.value) == (
        f"Could not write {tmp_path}/a.ckpt: Disk quota exceeded. "
        "Free some of your quota, or save somewhere else."
    )
    assert disk.calls == []


def test_a_tensor_that_changes_while_it_is_written_leaves_a_file_that_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the file is then of no one moment; but its checksums are those of its bytes."""
    value = [some(20 * BATCH, 1), some(100, 2), some(BATCH // 2, 3), some(20 * BATCH, 4)]

    def change() -> None:
        for tensor in value:
            tensor.add_(1)

    def checksum(data: Any, start: int = 0) -> int:
        change()
        return crc32(data, start)

    disk = Disk(monkeypatch)
    disk.before = lambda number, is_direct: change()
    monkeypatch.setattr(writing, "crc32", checksum)
    written(value, tmp_path / "a.ckpt")
    monkeypatch.undo()
    assert len(disk.calls) > 40
    read = load(tmp_path / "a.ckpt")
    assert not any(torch.equal(tensor, now) for tensor, now in zip(read, value, strict=True))
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None


def test_where_no_thread_can_be_started_the_caller_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    value = STATES["more than the ring"]()
    assert written(value, tmp_path / "a.ckpt") == expected(value)
