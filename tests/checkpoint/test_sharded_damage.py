"""A sharded checkpoint that somebody has damaged, or made to do harm: it is told what and where, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded_jobs
import torch
from sharded_jobs import plain_payload

import holdfast
from holdfast.checkpoint import catalog, sharded
from holdfast.checkpoint.checksum import crc32
from holdfast.checkpoint.verify import verify
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncompatible,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "a.ckpt"
    run_ranks(sharded_jobs.save, str(path), ranks=2)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "a.ckpt"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def message(of: Callable[[], Any], kind: type[CheckpointError]) -> str:
    with pytest.raises(kind) as error:
        of()
    return re.sub(
        r"checksum [0-9a-f]{8}|says [0-9a-f]{8}", lambda m: m[0].split()[0] + " X", str(error.value)
    )


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and make its checksum right again."""
    content = json.loads((path / "manifest.json").read_bytes())
    del content["crc32"]
    change(content)
    body = json.dumps(content).encode()[:-1]
    (path / "manifest.json").write_bytes(body + f',\n"crc32":"{crc32(body):08x}"}}\n'.encode())


def rewrite_tensors(path: Path, change: Callable[[list[Any]], Any]) -> None:
    """Change what is said of the tensors, and make all checksums right again."""
    content = json.loads((path / "tensors.json").read_bytes())
    change(content["tensors"])
    data = json.dumps(content).encode()
    (path / "tensors.json").write_bytes(data)
    rewrite(path, lambda said: said["files"].update({"tensors.json": [len(data), f"{crc32(data):08x}"]}))


# -- damage --------------------------------------------------------------------------------------------------


def test_a_file_that_is_missing(path: Path) -> None:
    (path / "__1_0.distcp").unlink()
    expected = "a.ckpt is not a whole checkpoint: __1_0.distcp is missing."
    for of in (sharded.load, sharded.load_rest, sharded.tensor_info, sharded.verify, verify, holdfast.load):
        assert message(lambda of=of: of(path), CheckpointIncomplete) == expected
    entry = catalog.entry(str(path))
    assert (entry.whole, entry.reason) == (False, "__1_0.distcp is missing")


def test_no_manifest_is_no_checkpoint(path: Path) -> None:
    (path / "manifest.json").unlink()
    assert sharded.is_sharded(path)
    assert message(lambda: sharded.load(path), CheckpointIncomplete) == (
        "a.ckpt is not a whole checkpoint: manifest.json is missing: a save into it did not end, or holdfast "
        "did not write it."
    )
    assert not catalog.entry(str(path)).whole


def test_a_file_that_was_cut_short_or_has_grown(path: Path) -> None:
    size = (path / "__0_0.distcp").stat().st_size
    os.truncate(path / "__0_0.distcp", size - 1)
    assert message(lambda: sharded.load(path), CheckpointIncomplete) == (
        f"a.ckpt is not a whole checkpoint: __0_0.distcp has {size - 1} bytes, manifest.json says {size}."
    )
    os.truncate(path / "__0_0.distcp", size + 1)
    assert message(lambda: sharded.load(path), CheckpointCorrupt) == (
        f"a.ckpt is corrupt: __0_0.distcp has {size + 1} bytes, manifest.json says {size}."
    )
    assert not catalog.entry(str(path)).whole


def test_a_flipped_byte_names_the_tensor(path: Path) -> None:
    rows = json.loads((path / "tensors.json").read_text())["tensors"]
    (chunks,) = (row[4] for row in rows if row[0] == ["state_dict", "uneven"])
    file, offset, *_ = chunks[1]
    assert file == "__1_0.distcp"
    flip(path / file, offset + 3)
    expected = (
        "a.ckpt is corrupt: __1_0.distcp has checksum X, manifest.json says X "
        "(state_dict/uneven, elements 5:10, 0:3)."
    )
    assert message(lambda: sharded.load(path), CheckpointCorrupt) == expected
    assert message(lambda: verify(path), CheckpointCorrupt) == expected
    assert catalog.entry(str(path)).whole  # only reading it tells


def test_a_load_that_needs_nothing_of_a_bad_file_goes_well(path: Path) -> None:
    flip(path / "__1_0.distcp", 100)
    live = {'["state_dict","norm.running_mean"]': torch.ones(3)}
    sharded.load_into(path, live)
    assert not live['["state_dict","norm.running_mean"]'].any()
    assert sharded.load_rest(path)["epoch"] == 3
    live = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in sharded.tensor_info(path).items()}
    message(lambda: sharded.load_into(path, live), CheckpointCorrupt)
    assert not any(one.any() for one in live.values())


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for at in range(0, size, 1 if file.name == "manifest.json" else max(1, size // 40)):
            good = file.read_bytes()
            flip(file, at)
            with pytest.raises(CheckpointError) as error:
                sharded.verify(path)
            assert file.name in str(error.value) or file.name == "manifest.json"
            file.write_bytes(good)
    sharded.verify(path)


def test_every_shorter_manifest_is_noticed(path: Path) -> None:
    good = (path / "manifest.json").read_bytes()
    for length in range(len(good)):
        (path / "manifest.json").write_bytes(good[:length])
        assert not catalog.entry(str(path)).whole
        message(lambda: sharded.load_rest(path), CheckpointIncomplete)


def test_files_that_have_changed_places(tmp_path: Path) -> None:
    for number, name in enumerate(("a.ckpt", "b.ckpt")):
        rest, tensors = sharded.split(plain_payload(number))
        about = {"step": number, "saved_at": 1.5 + number}
        sharded.save(tmp_path / name, rest, tensors, rank=0, world_size=1, summary=about)
    for name in ("payload.ckpt", "__0_0.distcp", "tensors.json"):
        good, other = (tmp_path / "a.ckpt" / name).read_bytes(), (tmp_path / "b.ckpt" / name).read_bytes()
        assert len(good) == len(other)
        (tmp_path / "a.ckpt" / name).write_bytes(other)
        found = message(lambda: sharded.load(tmp_path / "a.ckpt"), CheckpointCorrupt)
        assert found.startswith(f"a.ckpt is corrupt: {name} has checksum X, manifest.json says X")
        (tmp_path / "a.ckpt" / name).write_bytes(good)


def test_a_file_too_much_is_told_by_verify_and_read_by_nobody(path: Path) -> None:
    (path / "__9_0.distcp").write_bytes(b"of an earlier save")
    assert message(lambda: verify(path), CheckpointCorrupt) == (
        "a.ckpt is corrupt: it holds '__9_0.distcp', which the manifest does not name; nothing reads that: "
        "remove it."
    )
    assert sharded.load(path)["epoch"] == 3


def test_the_newest_whole_one_beside_it_is_named(path: Path) -> None:
    shutil.copytree(path, path.parent / "b.ckpt")
    (path / "payload.ckpt").unlink()
    assert message(lambda: sharded.load(path), CheckpointIncomplete) == (
        f"a.ckpt is not a whole checkpoint: payload.ckpt is missing.\n"
        f"Newest whole checkpoint in {path.parent}: b.ckpt. "
        f"Check them all: holdfast verify {path.parent}"
    )


def test_none_at_all(tmp_path: Path) -> None:
    expected = f"There is no checkpoint {tmp_path / 'a.ckpt'}, or it has just been deleted."
    assert message(lambda: sharded.load(tmp_path / "a.ckpt"), CheckpointNotFound) == expected
    with pytest.raises(CheckpointNotFound):
        sharded.remove(tmp_path / "a.ckpt")
    (tmp_path / "empty.ckpt").mkdir()
    assert not sharded.is_sharded(tmp_path / "empty.ckpt")


def test_deleted_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.checkpoint import sharded_manifest

    read = sharded_manifest.Directory.read

    def late(self: sharded_manifest.Directory, name: str) -> bytes:
        sharded.remove(path)
        return read(self, name)

    monkeypatch.setattr(sharded_manifest.Directory, "read", late)
    expected = f"There is no checkpoint {path}, or it has just been deleted."
    assert message(lambda: sharded.tensor_info(path), CheckpointNotFound) == expected


def test_a_rank_that_finds_damage_stops_all_of_them_before_anything_is_loaded(path: Path) -> None:
    found = run_ranks(sharded_jobs.fail_to_load, str(path), "__1_0.distcp", ranks=2)
    assert found[0] == found[1]
    kind, text, untouched = found[0]
    assert (kind, untouched) == ("CheckpointIncomplete", True)
    assert re.fullmatch(
        r"a\.ckpt is not a whole checkpoint: __1_0\.distcp has 0 bytes, manifest\.json says \d+\.", text
    )


# -- harm ----------------------------------------------------------------------------------------------------


class Harm:
    """What must never be unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harm",)


def test_no_pickle_of_torchs_is_ever_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    data = pickle.dumps(Harm())
    (path / ".metadata").write_bytes(data)
    rewrite(path, lambda said: said["files"].update({".metadata": [len(data), f"{crc32(data):08x}"]}))
    expected = plain_payload()
    assert torch.equal(sharded.load(path)["state_dict"]["uneven"], expected["state_dict"]["uneven"])
    sharded.load_into(path, {'["state_dict","uneven"]': torch.zeros(10, 3)})
    verify(path)
    sharded.merge(path, path.parent / "m.ckpt")
    assert not (path.parent / "harm").exists()


@pytest.mark.parametrize(
    "name",
    ["../other", "/etc/passwd", "a/../b", "..", "", "manifest.json", "__0_0.distcp/x", "__0_0.distcp\n"],
)
def test_a_manifest_names_files_of_the_directory_alone(path: Path, name: str) -> None:
    rewrite(path, lambda said: said["files"].update({name: [1, "00000000"]}))
    assert message(lambda: sharded.load(path), CheckpointUnsafe) == (
        f"a.ckpt cannot be read: manifest.json names {name!r}, which is no file of a checkpoint. Nothing was "
        "run. Do not use it unless you know who wrote it."
    )
    assert not catalog.entry(str(path)).whole


@pytest.mark.parametrize("name", ["manifest.json", "payload.ckpt", "tensors.json", "__0_0.distcp"])
def test_links_within_it_are_not_followed(path: Path, name: str) -> None:
    os.rename(path / name, path.parent / "elsewhere")
    os.symlink("../elsewhere", path / name)
    assert message(lambda: sharded.load(path), CheckpointUnsafe) == (
        f"a.ckpt cannot be read: {name} is a link to somewhere else. Nothing was run. Do not use it unless you "
        "know who wrote it."
    )


@pytest.mark.parametrize("name", ["manifest.json", "payload.ckpt", "__0_0.distcp"])
def test_a_pipe_keeps_nobody_waiting(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)
    assert "is not a regular file" in message(lambda: sharded.load(path), CheckpointUnsafe)
    assert not catalog.entry(str(path)).whole


def test_the_directory_itself_may_be_a_link(path: Path) -> None:
    os.symlink("a.ckpt", path.parent / "last.ckpt")
    assert sharded.load(path.parent / "last.ckpt")["epoch"] == 3
    sharded.remove(path.parent / "last.ckpt")
    assert sharded.load(path)["epoch"] == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda said: said.update(format="1"), "'1' is no number that can be meant"),
        (lambda said: said.update(format=0), "'0' is no number that can be meant"),
        (lambda said: said.update(world_size=True), "'True' is no number that can be meant"),
        (lambda said: said.pop("files"), "'files'"),
        (lambda said: said.update(files=[1]), "its summary and its files are no objects"),
        (lambda said: said.update(summary=None), "its summary and its files are no objects"),
    ],
)
def test_a_manifest_of_wrong_types(path: Path, change: Any, reason: str) -> None:
    rewrite(path, change)
    assert message(lambda: sharded.load(path), CheckpointUnsafe) == (
        f"a.ckpt cannot be read: manifest.json says what no save writes ({reason}). Nothing was run. Do not "
        "use it unless you know who wrote it."
    )


@pytest.mark.parametrize(
    "row", [None, 3, [1], [-1, "00000000"], [1 << 70, "00000000"], [1.0, "00000000"], [1, 5], [1, "0000000G"], ["1", "00000000"]]
)  # fmt: skip
def test_a_manifest_of_absurd_sizes(path: Path, row: Any) -> None:
    rewrite(path, lambda said: said["files"].update({"__0_0.distcp": row}))
    message(lambda: sharded.load(path), CheckpointUnsafe)
    assert not catalog.entry(str(path)).whole


def test_a_manifest_without_the_rest(path: Path) -> None:
    rewrite(path, lambda said: said["files"].pop("payload.ckpt"))
    assert "manifest.json does not name payload.ckpt" in message(lambda: sharded.load(path), CheckpointUnsafe)


def test_one_of_a_newer_format(path: Path) -> None:
    rewrite(path, lambda said: said.update(format=2))
    assert message(lambda: sharded.load(path), CheckpointIncompatible) == (
        "a.ckpt has format 2; this holdfast reads formats up to 1. Update holdfast to read it."
    )


def at(rows: list[Any], name: str) -> Any:
    return next(row for row in rows if row[0] == ["state_dict", name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(0, "../b"), "a chunk is said to lie in '../b'"),
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(0, "payload.ckpt"), "a chunk is said to lie in 'payload.ckpt'"),
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(1, 1 << 40), "a chunk reaches beyond __1_0.distcp"),
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(1, -4), "'-4' is no number that can be meant"),
        (lambda rows: at(rows, "uneven")[4].pop(), "the chunks of state_dict/uneven do not make the tensor"),
        (lambda rows: at(rows, "uneven")[4].append(at(rows, "uneven")[4][0]), "the chunks of state_dict/uneven do not make the tensor"),
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(4, [0, 0]), "the chunks of state_dict/uneven do not make the tensor"),
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(4, [6, 0]), "a chunk reaches beyond its tensor"),
        (lambda rows: at(rows, "uneven")[4][1].__setitem__(4, [5]), "a chunk has other dimensions than its tensor"),
        (lambda rows: at(rows, "uneven").__setitem__(2, [1 << 61, 1 << 61]), "state_dict/uneven has shape [2305843009213693952, 2305843009213693952]"),
        (lambda rows: at(rows, "none").__setitem__(2, [0, 1 << 61]), "state_dict/none has shape [0, 2305843009213693952]"),
        (lambda rows: at(rows, "uneven").__setitem__(1, "qint8"), "state_dict/uneven has dtype 'qint8'"),
        (lambda rows: at(rows, "uneven").__setitem__(1, "load"), "state_dict/uneven has dtype 'load'"),
        (lambda rows: at(rows, "uneven").__setitem__(0, "text"), "a tensor's path is 'text'"),
        (lambda rows: at(rows, "uneven").__setitem__(0, [None]), "a tensor's path is [None]"),
        (lambda rows: rows.append(at(rows, "uneven")), "state_dict/uneven is there twice"),
        (lambda rows: rows.append([["state_dict", "twin"], "int32", [10, 3], "x", at(rows, "uneven")[4]]), "state_dict/twin shares bytes with another tensor"),
        (lambda rows: rows.append([["state_dict", "twin"], "float32", [1], "x", [["__0_0.distcp", at(rows, "uneven")[4][0][1] + 4, 4, "00000000", [0], [1]]]]), "tensors overlap in __0_0.distcp"),
        (lambda rows: rows.append(3), "TypeError('cannot unpack non-iterable int object')"),
    ],
)  # fmt: skip
def test_what_is_said_of_tensors_is_checked_before_any_is_made(path: Path, change: Any, reason: str) -> None:
    rewrite_tensors(path, change)
    expected = (
        f"a.ckpt cannot be read: tensors.json says what no save writes ({reason}). Nothing was run. Do not use "
        "it unless you know who wrote it."
    )
    for of in (sharded.load, sharded.tensor_info, verify):
        assert message(lambda of=of: of(path), CheckpointUnsafe) == expected
    assert message(lambda: sharded.merge(path, path.parent / "m.ckpt"), CheckpointUnsafe) == expected
    assert not (path.parent / "m.ckpt").exists()


def test_tensors_that_belong_nowhere(path: Path) -> None:
    rewrite_tensors(path, lambda rows: at(rows, "uneven").__setitem__(0, ["callbacks", "b", "c"]))
    expected = "its tensors do not fit its payload.ckpt (there is no place for callbacks/b)"
    assert expected in message(lambda: sharded.load(path), CheckpointUnsafe)
    assert expected in message(lambda: sharded.merge(path, path.parent / "m.ckpt"), CheckpointUnsafe)


def test_a_dtype_that_this_torch_lacks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.checkpoint import itemsizes

    monkeypatch.setitem(itemsizes.ITEMSIZES, "float99", 4)
    rewrite_tensors(path, lambda rows: at(rows, "uneven").__setitem__(1, "float99"))
    assert message(lambda: sharded.load(path), CheckpointIncompatible) == (
        "a.ckpt holds state_dict/uneven, whose dtype float99 this torch does not have: update torch."
    )
