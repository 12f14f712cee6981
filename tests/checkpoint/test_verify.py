"""`verify`: every byte, nothing unpickled, constant memory; what is bad is named."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from realistic import SUMMARY, realistic_payload

from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.verify import EVERY_BYTE, NOTHING, ZIP_CHECKSUMS, verify
from holdfast.errors import CheckpointCorrupt, CheckpointError, CheckpointIncomplete, CheckpointNotFound


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "epoch=3.ckpt"
    CheckpointEngine().save(realistic_payload(), path, summary=SUMMARY)
    return path


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_file(whole: Path) -> None:
    report = verify(whole)
    assert (report.path, report.size_bytes, report.checked) == (str(whole), whole.stat().st_size, EVERY_BYTE)
    assert report.records == 5 + sum(1 for _ in re.finditer(rb'\["data/\d+"', whole.read_bytes()))
    assert report.seconds > 0


def test_any_flipped_bit_is_refused(whole: Path) -> None:
    good = whole.read_bytes()
    rng = random.Random(1)
    for position in (rng.randrange(len(good) * 8) for _ in range(300)):
        flip(whole, position // 8, position % 8)
        with pytest.raises(CheckpointError):
            verify(whole)
        whole.write_bytes(good)
    verify(whole)


def test_truncation_is_refused(whole: Path) -> None:
    good = whole.read_bytes()
    for length in (0, 1, 63, len(good) // 3, len(good) - 1):
        whole.write_bytes(good[:length])
        with pytest.raises(CheckpointIncomplete):
            verify(whole)
    with pytest.raises(CheckpointNotFound):
        verify(whole.parent / "epoch=4.ckpt")
    with pytest.raises(CheckpointIncomplete) as refused:
        verify(whole.parent)
    assert str(refused.value) == f"{whole.parent} is a directory, not a checkpoint file."


def values(count: int) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((100,), float(i + 1)) for i in range(count)}


def test_one_bad_tensor_is_named_as_loading_names_it(tmp_path: Path) -> None:
    for epoch in (1, 2):
        CheckpointEngine().save(
            {"state_dict": values(3)}, tmp_path / f"epoch={epoch}.ckpt", summary={"epoch": epoch}
        )
    path = tmp_path / "epoch=2.ckpt"
    flip(path, path.read_bytes().index(values(3)["w1"].numpy().tobytes()))
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(path)
    message = re.sub("[0-9a-f]{8}", "#", str(refused.value))
    assert message == (
        "epoch=2.ckpt is corrupt: data/1 (state_dict/w1) has checksum #, the manifest says #.\n"
        f"Newest whole checkpoint in {tmp_path}: epoch=1.ckpt. Check them all: holdfast verify {tmp_path}"
    )
    assert refused.value.path == str(path)


def test_all_bad_tensors_are_named_up_to_twenty(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save(values(30), path)
    for name in ("w4", "w2"):
        flip(path, path.read_bytes().index(values(30)[name].numpy().tobytes()))
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(path)
    assert re.sub("[0-9a-f]{8}", "#", str(refused.value)) == (
        "a.ckpt is corrupt: 2 records are bad:\n"
        "  data/2 (w2) has checksum #, the manifest says #\n"
        "  data/4 (w4) has checksum #, the manifest says #."
    )
    for name in (f"w{i}" for i in range(30) if i not in (2, 4)):
        flip(path, path.read_bytes().index(values(30)[name].numpy().tobytes()))
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(path)
    lines = str(refused.value).splitlines()
    assert lines[0] == "a.ckpt is corrupt: 30 records are bad:"
    assert (len(lines), lines[-1]) == (22, "  and 10 more.")


def test_a_file_of_torch_has_checksums_of_its_records(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(values(3), path)
    report = verify(path)
    assert (report.checked, report.size_bytes) == (ZIP_CHECKSUMS, path.stat().st_size)
    good = path.read_bytes()
    flip(path, good.index(values(3)["w1"].numpy().tobytes()))
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(path)
    assert re.sub("[0-9a-f]{8}", "#", str(refused.value)) == (
        "a.pt is corrupt: data/1 has checksum #, the zip directory says #."
    )
    flip(path, good.index(values(3)["w2"].numpy().tobytes()))
    flip(path, good.index(b"PK\x03\x04"))
    with pytest.raises(CheckpointError):
        verify(path)
    path.write_bytes(good[:-1])
    with pytest.raises(CheckpointIncomplete):
        verify(path)


def test_several_bad_records_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(values(3), path)
    for name in ("w0", "w2"):
        flip(path, path.read_bytes().index(values(3)[name].numpy().tobytes()))
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(path)
    assert re.sub("[0-9a-f]{8}", "#", str(refused.value)) == (
        "a.pt is corrupt: 2 records are bad:\n"
        "  data/0 has checksum #, the zip directory says #\n"
        "  data/2 has checksum #, the zip directory says #."
    )


def test_what_has_no_checksums_says_so(tmp_path: Path) -> None:
    torch.save(values(3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert verify(tmp_path / "old.pt").checked == NOTHING
    (tmp_path / "notes.txt").write_text("epoch,step,loss\n")
    with pytest.raises(CheckpointIncomplete) as refused:
        verify(tmp_path / "notes.txt")
    assert str(refused.value) == "notes.txt is not a checkpoint: it begins with b'epoch,step,loss\\n'."


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle that no reader takes is as good as any other to who only compares bytes."""
    path, touched = tmp_path / "a.pt", tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (touched,)

    torch.save({"evil": Evil()}, path)
    assert verify(path).checked == ZIP_CHECKSUMS
    assert not touched.exists()


PROGRAM = """
import resource, sys
from holdfast.checkpoint.verify import verify
verify(sys.argv[1])  # what is imported and buffered once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    verify(path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_it_takes_little_memory_and_no_torch(tmp_path: Path) -> None:
    small, large = {"w": torch.ones(2_000_000)}, {"w": torch.ones(40_000_000)}
    CheckpointEngine().save(small, tmp_path / "small.ckpt")
    CheckpointEngine().save(large, tmp_path / "large.ckpt")
    torch.save(large, tmp_path / "large.pt")
    paths = [str(tmp_path / name) for name in ("small.ckpt", "large.ckpt", "large.pt")]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 16, "MiB more for 160 MB than for 8 MB"
