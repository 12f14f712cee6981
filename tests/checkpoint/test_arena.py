"""The snapshot's memory: ready before it is needed, used again, and never more than one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from holdfast.checkpoint.arena import Arena
from holdfast.checkpoint.engine import CheckpointEngine

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_it_is_page_aligned_and_the_same_as_long_as_it_is_large_enough(arena: Arena) -> None:
    first = arena.lend(3 * MIB + 5)
    assert first % 4096 == 0 and arena.size_bytes == 3 * MIB + 4096
    ctypes.memset(first, 7, 3 * MIB + 5)
    assert arena.lend(MIB) == first and ctypes.string_at(first, 3) == b"\7\7\7"
    larger = arena.lend(9 * MIB)
    ctypes.memset(larger, 1, 9 * MIB)
    assert arena.size_bytes == 9 * MIB


def test_it_shrinks_when_much_less_is_needed_for_long(arena: Arena) -> None:
    arena.lend(64 * MIB)
    for _ in range(7):
        arena.lend(MIB)
        assert arena.size_bytes == 64 * MIB
    arena.lend(40 * MIB)  # two sizes that take turns keep the larger
    for _ in range(7):
        arena.lend(MIB)
        assert arena.size_bytes == 64 * MIB
    arena.lend(MIB)
    assert arena.size_bytes == MIB
    arena.close()
    assert arena.size_bytes == 0


def test_prepared_memory_is_touched_and_keeps_what_is_written_meanwhile(arena: Arena) -> None:
    before = resident_bytes()
    arena.prepare(64 * MIB)
    assert arena._memory is not None and arena._memory._populating is not None
    address = arena.lend(64 * MIB)
    ctypes.memset(address, 3, MIB)
    arena._memory._populating.join()
    assert resident_bytes() - before > 60 * MIB
    assert ctypes.string_at(address, MIB) == b"\3" * MIB
    arena.prepare(MIB)
    assert arena.lend(64 * MIB) == address
    arena.close()
    assert resident_bytes() - before < 10 * MIB


def test_an_engine_prepares_enough_for_what_stands_between_the_tensors(tmp_path: Path) -> None:
    engine = CheckpointEngine()
    tensors = [torch.randn(3000) for _ in range(600)]
    engine.prepare(sum(4 * tensor.numel() for tensor in tensors))
    prepared = engine._arena._memory
    engine.save_in_background({"tensors": tensors}, tmp_path / "a.ckpt").wait()
    assert prepared is not None and engine._arena._memory is prepared
    engine.close()


def test_preparing_leaves_a_snapshot_in_use_alone(tmp_path: Path) -> None:
    engine = CheckpointEngine()
    tensor = torch.randn(MIB)
    engine.save_in_background({"a": tensor}, tmp_path / "a.ckpt", late=[tensor])
    used = engine._arena._memory
    engine.prepare(64 * MIB)
    assert engine.copying and engine._arena._memory is used
    engine.wait_for_copy()
    engine.close()


LITTLE_MEMORY = """
import resource, sys, torch, warnings
from holdfast.checkpoint.engine import CheckpointEngine
engine = CheckpointEngine()
state = torch.arange(16 << 20)
more = state + 1
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), used + (200 << 20)))
engine.prepare(1 << 40)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name in sys.argv[1:]:
        pending = engine.save_in_background({"state": state, "more": more}, name, late=[state])
        assert pending.ended and not engine.copying
        report = pending.wait()
        assert not report.background and report.blocked_s >= report.durable_s > 0, report
print(*(str(one.message) for one in said), sep="\\n")
"""


def test_without_memory_for_a_snapshot_it_saves_in_the_foreground(tmp_path: Path) -> None:
    names = [str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, *names], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("Checkpoints are saved in the foreground, while training waits: no ")
    assert said[0].endswith(" bytes for a snapshot: [Errno 12] Cannot allocate memory.")
    for name in names:
        loaded = torch.load(name)
        assert torch.equal(loaded["more"], loaded["state"] + 1)
