"""A directory that several processes write, and that any number of them reads: real processes, real DTensors."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import sharded_jobs
import torch
from sharded_jobs import SHAPES, plain_payload

import holdfast
from holdfast.checkpoint import catalog, commit, directories, sharded
from holdfast.checkpoint.load import load_mapped
from holdfast.errors import CheckpointIncompatible, StorageError
from tests.distributed.ranks import run_ranks


def same(one: Any, other: Any) -> None:
    """Both are the same, bit for bit, types included."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    else:
        assert one == other


def save_alone(path: Path, add: float = 0.0, names: tuple[Path, ...] = (), **more: Any) -> Any:
    """Save in this process, with no process group."""
    rest, tensors = sharded.split(plain_payload(add) | more)
    return sharded.save(path, rest, tensors, rank=0, world_size=1, names=names, summary={"step": 7})


def value_of(path: Path) -> float:
    """Which save it is, from its first number."""
    found: float = (sharded.load(path)["state_dict"]["even"] - sharded_jobs.full("even")).mean().item()
    return round(found, 3)


@pytest.fixture(scope="module")
def by_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that three ranks wrote."""
    path = tmp_path_factory.mktemp("three") / "a.ckpt"
    (report, wrong), *others = run_ranks(sharded_jobs.save, str(path), ranks=3)
    assert [wrong, *others] == [[], (None, []), (None, [])]
    assert (report.path, report.omissions) == (str(path), [])
    assert report.size_bytes == sum(one.stat().st_size for one in path.iterdir())
    return path


# -- round trips ---------------------------------------------------------------------------------------------


def test_what_one_process_reads_is_what_one_process_would_have_had(by_three: Path) -> None:
    expected = plain_payload()
    found = sharded.load(by_three)
    same(found, expected)
    assert found["state_dict"]["tied"] is found["state_dict"]["even"]
    same(holdfast.load(by_three), expected)
    same(load_mapped(by_three).payload, expected)


def test_a_replicated_value_and_a_tied_one_are_there_once(by_three: Path) -> None:
    rows = {tuple(row[0]): row for row in json.loads((by_three / "tensors.json").read_text())["tensors"]}
    chunks = {path[-1]: row[4] for path, row in rows.items() if path[0] == "state_dict"}
    assert {name: len(chunks[name]) for name in chunks} == {
        "even": 3, "uneven": 3, "second": 3, "small": 2, "one": 1, "none": 1, "scalar": 1, "replicated": 1,
        "half": 3, "tied": 3, "norm.running_mean": 1,
    }  # fmt: skip
    assert chunks["tied"] == chunks["even"]
    assert chunks["norm.running_mean"][0][0] == "__0_0.distcp"


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_reads_what_three_wrote(by_three: Path, ranks: int) -> None:
    assert run_ranks(sharded_jobs.load_into, str(by_three), ranks=ranks) == [[]] * ranks


def test_fewer_ranks_leave_nothing_of_more(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    for ranks in (3, 2, 1):
        assert [wrong for _, wrong in run_ranks(sharded_jobs.save, path, ranks=ranks)] == [[]] * ranks
        same(sharded.load(path), plain_payload())
        written = [name for name in os.listdir(path) if name.endswith(".distcp")]
        assert sorted(written) == [f"__{rank}_0.distcp" for rank in range(ranks)]
        sharded.verify(path)
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_without_a_process_group(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.ckpt"
    report = save_alone(path)
    assert (report.path, report.links) == (str(path), ())
    same(sharded.load(path), plain_payload())
    live = {
        key: torch.full(shape, 9, dtype=dtype) for key, (shape, dtype) in sharded.tensor_info(path).items()
    }
    sharded.load_into(path, live)
    same(sharded.join(sharded.load_rest(path), live), plain_payload())


def test_split_takes_what_join_puts_back() -> None:
    payload = plain_payload()
    payload["state_dict"]._metadata = OrderedDict(version=1)
    payload["state_dict"]["sparse"] = torch.eye(3).to_sparse()
    payload["optimizer_states"][0]["pairs"] = (torch.ones(2), "text", [torch.zeros(1)])
    before = list(payload["state_dict"].items())
    rest, tensors = sharded.split(payload)
    assert list(payload["state_dict"].items()) == before
    assert '["state_dict","uneven"]' in tensors
    assert '["optimizer_states",0,"state","even","exp_avg"]' in tensors
    assert '["optimizer_states",0,"pairs",2,0]' in tensors
    assert '["state_dict","sparse"]' not in tensors
    assert rest["state_dict"]["uneven"] is None
    assert rest["state_dict"]._metadata == {"version": 1}
    assert rest["callbacks"] is payload["callbacks"]
    joined = sharded.join(rest, tensors)
    assert rest["state_dict"]["uneven"] is None
    assert joined["state_dict"]["uneven"] is payload["state_dict"]["uneven"]
    assert joined["optimizer_states"][0]["pairs"][2][0] is payload["optimizer_states"][0]["pairs"][2][0]
    assert list(joined["state_dict"]) == list(payload["state_dict"])


@pytest.mark.parametrize(
    ("rest", "key", "reason"),
    [
        ({"a": 1}, '["b","c"]', "there is no place for b"),
        ({"a": {"b": 1}}, '["a","b"]', "the place of a/b is taken"),
        ({"a": [None]}, '["a",3]', "there is no place for a/3"),
        ({"a": "text"}, '["a",0]', "there is no place for a/0"),
        ({"a": [None]}, '["a",-1]', "there is no place for a/-1"),
    ],
)
def test_join_says_what_has_no_place(rest: dict[str, Any], key: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        sharded.join(rest, {key: torch.ones(1)})


def test_tensors_go_into_memory_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_alone(path)
    into = {
        '["state_dict","uneven"]': torch.zeros(3, 10).t(),
        '["state_dict","second"]': torch.zeros(5, 7, dtype=torch.float64),
        '["state_dict","scalar"]': torch.nn.Parameter(torch.zeros(())),
        '["state_dict","half"]': torch.zeros(18, 4, dtype=torch.bfloat16)[::2, ::2],
    }
    sharded.load_into(path, into)
    for key, tensor in into.items():
        torch.testing.assert_close(
            tensor.detach().float(), sharded_jobs.full(json.loads(key)[1]).float(), rtol=0, atol=0
        )


def test_a_tensor_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.checkpoint.sharded_load._PIECE_BYTES", 16)
    path = str(tmp_path / "a.ckpt")
    run_ranks(sharded_jobs.save, path, ranks=2)
    into = {f'["state_dict","{name}"]': torch.zeros(SHAPES[name][0], dtype=torch.float64) for name in SHAPES}
    sharded.load_into(path, into)
    for key, tensor in into.items():
        assert torch.equal(tensor, sharded_jobs.full(json.loads(key)[1]).double())


def test_what_does_not_fit_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_alone(path)
    good = torch.zeros(6, 4)
    with pytest.raises(CheckpointIncompatible) as missing:
        sharded.load_into(path, {'["state_dict","even"]': good, '["state_dict","evens"]': torch.zeros(6, 4)})
    assert str(missing.value).startswith(
        'a.ckpt holds no tensor ["state_dict","evens"]. The nearest: ["state_dict","even"]'
    )
    with pytest.raises(CheckpointIncompatible) as shape:
        sharded.load_into(
            path, {'["state_dict","even"]': good, '["state_dict","uneven"]': torch.zeros(3, 10)}
        )
    assert str(shape.value) == (
        "a.ckpt: state_dict/uneven has shape [10, 3], what it is to be loaded into has [3, 10]."
    )
    assert not good.any()


def test_skipped_keys_are_not_read(by_three: Path) -> None:
    found = holdfast.load(by_three)
    some = load_mapped(by_three, skip=("optimizer_states", "callbacks")).payload
    assert set(found) - set(some) == {"optimizer_states", "callbacks"}
    moved = sharded.load(by_three, map_location="meta")
    assert moved["state_dict"]["uneven"].is_meta


# -- torch's own tools ---------------------------------------------------------------------------------------


def test_torchs_own_load_opens_it(by_three: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = {"state_dict": {name: torch.zeros_like(sharded_jobs.full(name)) for name in SHAPES}}
    state["state_dict"]["tied"] = torch.zeros(6, 4)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=by_three)
    for name in SHAPES:
        assert torch.equal(state["state_dict"][name], sharded_jobs.full(name))
    assert torch.equal(state["state_dict"]["tied"], sharded_jobs.full("even"))
    dcp_to_torch_save(by_three, tmp_path / "x.pt")
    converted = torch.load(tmp_path / "x.pt", weights_only=True)
    for name in SHAPES:
        assert torch.equal(converted["state_dict"][name], sharded_jobs.full(name))
        moments = converted["optimizer_states"][0]["state"][name]
        assert torch.equal(moments["exp_avg"], sharded_jobs.full(name) / 2)


def test_names_that_torch_would_mix_up_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    payload = {"state_dict": {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}}
    rest, tensors = sharded.split(payload)
    sharded.save(path, rest, tensors, rank=0, world_size=1)
    same(sharded.load(path), payload)


# -- names ---------------------------------------------------------------------------------------------------


def test_further_names_share_the_files_and_outlive_each_other(tmp_path: Path) -> None:
    first, last, other = tmp_path / "a.ckpt", tmp_path / "last.ckpt", tmp_path / "in" / "b.ckpt"
    report = save_alone(first, names=(last, other))
    assert report.names == (str(last), str(other))
    assert set(report.links) <= {"reflink", "hard link", "copy"}
    for path in (first, last, other):
        sharded.verify(path)
        assert not path.is_symlink()
    sharded.remove(first)
    save_alone(last, add=1.0)
    assert (value_of(last), value_of(other)) == (1.0, 0.0)
    sharded.remove(other)
    assert value_of(last) == 1.0
    assert os.listdir(tmp_path / "in") == []


def test_a_name_is_a_copy_where_nothing_else_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(directories, "_reflink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    report = save_alone(tmp_path / "a.ckpt", names=(tmp_path / "b.ckpt",))
    assert report.links == ("copy",)
    assert (tmp_path / "a.ckpt/payload.ckpt").stat().st_ino != (
        tmp_path / "b.ckpt/payload.ckpt"
    ).stat().st_ino
    sharded.verify(tmp_path / "b.ckpt")


def test_a_name_given_later(tmp_path: Path) -> None:
    save_alone(tmp_path / "a.ckpt")
    commit.add_name(str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"))
    sharded.remove(tmp_path / "a.ckpt")
    same(sharded.load(tmp_path / "b.ckpt"), plain_payload())


# -- in place of what was there ------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "moved aside"])
def test_it_replaces_a_directory_a_file_and_a_link(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(directories, "_exchange", lambda *_: False)
    path = tmp_path / "last.ckpt"
    for number in range(3):
        save_alone(path, add=float(number))
        assert value_of(path) == number
    holdfast.save({"w": torch.ones(2)}, path)
    assert path.is_file()
    save_alone(path, add=5.0)
    assert value_of(path) == 5
    sharded.remove(path)
    save_alone(tmp_path / "target.ckpt")
    os.symlink("target.ckpt", path)
    save_alone(path, add=6.0)
    assert (value_of(path), value_of(tmp_path / "target.ckpt")) == (6.0, 0.0)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "target.ckpt"]


def test_a_directory_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.mkdir()
    with pytest.raises(StorageError) as empty:
        save_alone(path)
    assert str(empty.value) == (
        f"Could not create a directory beside {path}: Is a directory. Choose another name: a directory has "
        "this one."
    )
    path.rmdir()
    save_alone(path)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError):
        save_alone(path, add=1.0)
    with pytest.raises(StorageError) as kept:
        sharded.remove(path)
    assert str(kept.value) == (
        f"Could not delete {path}: Is a directory. What was there before is untouched. Choose another name: a "
        "directory has this one."
    )
    assert (path / "notes.txt").read_text() == "mine"
    assert value_of(path) == 0.0
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_what_was_moved_aside_is_found_until_the_new_one_stands(tmp_path: Path) -> None:
    """As a process leaves it that is killed between the two renames, where names cannot be exchanged."""
    path = tmp_path / "a.ckpt"
    save_alone(path)
    holdfast.save({"w": torch.ones(2)}, tmp_path / "file.ckpt", step=3)
    for one in (path, tmp_path / "file.ckpt"):
        os.rename(one, directories.aside_of(str(one)))
    same(sharded.load(path), plain_payload())
    sharded.verify(path)
    assert holdfast.load(tmp_path / "file.ckpt")["w"].tolist() == [1, 1]
    assert sharded.is_sharded(path)
    assert sorted(os.path.basename(one.path) for one in catalog.scan(tmp_path) if one.whole) == [
        "a.ckpt", "file.ckpt",
    ]  # fmt: skip
    assert commit.remove_stray_temp_files(tmp_path) == []
    save_alone(path, add=2.0)
    sharded.remove(tmp_path / "file.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert value_of(path) == 2.0


# -- the catalog ---------------------------------------------------------------------------------------------


def test_a_listing_shows_it_as_it_shows_a_file(by_three: Path) -> None:
    (one,) = catalog.scan(by_three.parent, recursive=True)
    assert (one.path, one.whole, one.reason, one.step, one.epoch) == (str(by_three), True, None, 7, 3)
    assert (one.exact, one.foreign, one.kind) == (True, False, "full")
    assert one.size_bytes == sum(part.stat().st_size for part in by_three.iterdir())
    assert one.contents == tuple(plain_payload())
    assert catalog.read_summary(by_three).step == 7


def test_what_is_on_its_way_is_not_listed(tmp_path: Path) -> None:
    temporary, fd = directories.create_temporary(str(tmp_path / "a.ckpt"))
    (Path(temporary) / "payload.ckpt").write_bytes(b"half")
    assert catalog.scan(tmp_path, recursive=True) == []
    assert commit.remove_stray_temp_files(tmp_path) == []  # it is held
    os.close(fd)
    assert commit.remove_stray_temp_files(tmp_path) == [os.path.basename(temporary)]
    assert os.listdir(tmp_path) == []


def test_directories_that_only_have_such_a_name_are_looked_into(tmp_path: Path) -> None:
    holdfast.save({"w": torch.ones(2)}, tmp_path / "run.ckpt" / "in.ckpt")
    assert [one.path for one in catalog.scan(tmp_path)] == []
    assert [one.path for one in catalog.scan(tmp_path, recursive=True)] == [
        str(tmp_path / "run.ckpt/in.ckpt")
    ]


def test_a_save_tidies_up_after_a_killed_one(tmp_path: Path) -> None:
    temporary, fd = directories.create_temporary(str(tmp_path / "a.ckpt"))
    os.close(fd)
    (Path(temporary) / "__0_0.distcp").write_bytes(b"half")
    save_alone(tmp_path / "b.ckpt")
    assert os.listdir(tmp_path) == ["b.ckpt"]


# -- the document --------------------------------------------------------------------------------------------

DOCUMENT = (
    (Path(__file__).parents[2] / "docs" / "format.md").read_text().partition("## The sharded directory")[2]
)


def test_what_docs_format_says_is_enough_to_read_it(by_three: Path) -> None:
    """A reader by the page alone, but for the rest of the payload, which is a file as the page has it above."""
    data = (by_three / "manifest.json").read_bytes()
    body, _, ending = data.rpartition(b',\n"crc32":"')
    manifest = json.loads(data)
    assert ending == b'%08x"}\n' % zlib.crc32(body)
    for name, (size, checksum) in manifest["files"].items():
        content = (by_three / name).read_bytes()
        assert (len(content), f"{zlib.crc32(content):08x}") == (size, checksum)
    payload = torch.load(by_three / "payload.ckpt", weights_only=True)
    said = json.loads((by_three / "tensors.json").read_bytes())
    for path, dtype, shape, name, chunks in said["tensors"]:
        assert name == ".".join(map(str, path))
        made = torch.zeros(shape, dtype=getattr(torch, dtype))
        for file, offset, length, checksum, offsets, sizes in chunks:
            assert offset % 64 == 0
            content = (by_three / file).read_bytes()[offset : offset + length]
            assert f"{zlib.crc32(content):08x}" == checksum
            if length:
                box = torch.frombuffer(bytearray(content), dtype=made.dtype).view(sizes)
                made[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] = box
        at = payload
        for part in path[:-1]:
            at = at[part]
        assert at[path[-1]] is None
        at[path[-1]] = made
    same(payload["state_dict"], plain_payload()["state_dict"])
    same(payload["optimizer_states"], plain_payload()["optimizer_states"])
    for word in (*manifest, *said, *said["columns"], *said["chunk_columns"], *os.listdir(by_three)):
        assert re.sub(r"__\d_\d", "__R_N", word) in DOCUMENT, word
    assert os.path.basename(directories.aside_of("name.ckpt")) in DOCUMENT


def test_a_callback_makes_way_for_a_newer_one(tmp_path: Path) -> None:
    from holdfast.callbacks import lineage

    path, last = tmp_path / "a.ckpt", tmp_path / "last.ckpt"
    save_alone(path, names=(last,))
    assert not lineage.remove(str(path), inside=str(tmp_path), protected=str(path))
    assert lineage.remove(str(path), inside=str(tmp_path), protected=str(last))
    assert not lineage.remove(str(path), inside=str(tmp_path), protected=None)
    (tmp_path / "plain.ckpt").mkdir()
    assert not lineage.remove(str(tmp_path / "plain.ckpt"), inside=str(tmp_path), protected=None)
    assert value_of(last) == 0.0
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "plain.ckpt"]
