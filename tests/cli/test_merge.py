"""``holdfast merge``, and what the other commands say of sharded checkpoints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

import sharded_jobs

from holdfast.checkpoint import catalog, sharded
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.single import load_tensor
from holdfast.errors import CheckpointCorrupt, CheckpointIncompatible, StorageError
from tests.cli.command import as_json, child, environment, flip, holdfast
from tests.distributed.ranks import run_ranks


def save_alone(path: Path, payload: dict[str, Any], names: tuple[Path, ...] = (), **summary: Any) -> Path:
    rest, tensors = sharded.split(payload)
    about = {"step": 7, "epoch": 3, "exact": True, "kind": "full"} | summary
    sharded.save(path, rest, tensors, rank=0, world_size=1, names=names, summary=about)
    return path


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "a.ckpt"
    run_ranks(sharded_jobs.save, str(path), ranks=2)
    return path


def test_merged_it_is_what_one_process_saves(by_two: Path, tmp_path: Path) -> None:
    out, single = tmp_path / "deep" / "m.ckpt", tmp_path / "single.ckpt"
    ran = holdfast("merge", by_two, out)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(rf"merged  {by_two} into {out}  [\d.]+ kB in [\d.]+ s\n", ran.stdout)
    CheckpointEngine().save(sharded_jobs.plain_payload(), single)
    ran = holdfast("diff", out, single)
    assert (ran.returncode, ran.stderr) == (0, "")
    found, summary = load(out), catalog.read_summary(out)
    assert (summary.step, summary.epoch, summary.exact) == (7, 3, True)
    assert summary.values == catalog.read_summary(by_two).values
    weights = torch.load(out, weights_only=True, mmap=True)["state_dict"]
    assert list(weights) == list(found["state_dict"])
    assert weights["tied"].data_ptr() == weights["even"].data_ptr()
    assert type(found["holdfast"]["place"]) is type(tmp_path)
    assert holdfast("verify", out).returncode == 0
    assert sharded.verify(by_two)


def test_lightning_opens_what_was_merged(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Model(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 2)

    torch.manual_seed(3)
    payload = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": Model(5).state_dict(),
        "hyper_parameters": {"width": 5},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    save_alone(tmp_path / "a.ckpt", payload)
    assert holdfast("merge", tmp_path / "a.ckpt", tmp_path / "m.ckpt").returncode == 0
    model = Model.load_from_checkpoint(tmp_path / "m.ckpt", map_location="cpu")
    assert torch.equal(model.layer.weight, payload["state_dict"]["layer.weight"])


def test_a_large_one_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    path, out = tmp_path / "a.ckpt", tmp_path / "m.ckpt"
    run_ranks(sharded_jobs.save_large, str(path), ranks=2)
    (grown,) = run_ranks(sharded_jobs.merge_and_measure, str(path), str(out), ranks=1)
    assert grown < sharded_jobs.LARGE_BYTES // 2
    weight = torch.load(out, weights_only=True, mmap=True)["state_dict"]["weight"]
    assert weight.shape == (1024, sharded_jobs.LARGE_BYTES // 4096)
    assert weight[:, 0].eq(0).all()
    assert weight[:, -1].eq(1).all()
    (grown,) = run_ranks(sharded_jobs.load_and_measure, str(path), ranks=1)
    assert grown < sharded_jobs.LARGE_BYTES // 2


def test_a_damaged_one_is_not_merged(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a.ckpt", sharded_jobs.plain_payload())
    flip(path / "__0_0.distcp", 70)
    with pytest.raises(CheckpointCorrupt):
        sharded.merge(path, tmp_path / "m.ckpt")
    ran = holdfast("merge", path, tmp_path / "m.ckpt")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("holdfast: a.ckpt is corrupt: __0_0.distcp has checksum ")
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_what_merge_will_not_do(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a.ckpt", sharded_jobs.plain_payload())
    (tmp_path / "file.ckpt").write_bytes(b"mine")
    (tmp_path / "plain").mkdir()

    def said(*arguments: object) -> str:
        ran = holdfast("merge", *arguments, cwd=tmp_path)
        assert (ran.returncode, ran.stdout) == (2, "")
        return ran.stderr.removeprefix("holdfast: ")

    assert said("a.ckpt", "file.ckpt") == "file.ckpt is there already. Choose another name, or say --force.\n"
    assert said("none.ckpt", "m.ckpt") == "There is no checkpoint none.ckpt.\n"
    assert said("plain", "m.ckpt") == (
        "plain is a directory, but no sharded checkpoint: there is nothing to merge.\n"
    )
    assert said("file.ckpt", "m.ckpt") == (
        "file.ckpt is a file, but no sharded checkpoint: there is nothing to merge.\n"
    )
    assert (tmp_path / "file.ckpt").read_bytes() == b"mine"
    found = as_json("merge", path, tmp_path / "file.ckpt", "--force")
    assert found["path"] == str(tmp_path / "file.ckpt")
    assert found["size_bytes"] == (tmp_path / "file.ckpt").stat().st_size
    assert load(tmp_path / "file.ckpt")["epoch"] == 3


def test_merged_in_its_own_place(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a.ckpt", sharded_jobs.plain_payload())
    assert holdfast("merge", path, path, "--force").returncode == 0
    assert path.is_file()
    assert load(path)["epoch"] == 3
    assert os.listdir(tmp_path) == ["a.ckpt"]


# -- the other commands --------------------------------------------------------------------------------------


def test_ls_lists_it_once(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a.ckpt", sharded_jobs.plain_payload(), (tmp_path / "last.ckpt",))
    save_alone(tmp_path / "b.ckpt", sharded_jobs.plain_payload(), step=9)
    (tmp_path / "b.ckpt" / "__0_0.distcp").unlink()
    found = as_json("ls", "-r", tmp_path)
    rows = {os.path.basename(row["path"]): row for row in found["checkpoints"]}
    assert set(rows) == {"a.ckpt", "last.ckpt", "b.ckpt"}
    assert (rows["a.ckpt"]["step"], rows["a.ckpt"]["whole"], rows["a.ckpt"]["exact"]) == (7, True, True)
    assert rows["a.ckpt"]["size_bytes"] == sum(one.stat().st_size for one in path.iterdir())
    assert (rows["b.ckpt"]["whole"], rows["b.ckpt"]["reason"]) == (False, "__0_0.distcp is missing")
    if (path / "manifest.json").stat().st_nlink > 1:  # rather than a reflink
        assert rows["last.ckpt"]["same_file_as"] == str(path)
    assert os.path.basename(found["auto"]) in ("a.ckpt", "last.ckpt")


def test_verify_checks_it_as_one(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a.ckpt", sharded_jobs.plain_payload())
    save_alone(tmp_path / "b.ckpt", sharded_jobs.plain_payload())
    size = sum(one.stat().st_size for one in path.iterdir())
    (one,) = as_json("verify", path)["files"]
    assert (one["state"], one["checked"], one["size_bytes"]) == ("ok", "every byte", size)
    flip(tmp_path / "b.ckpt" / "payload.ckpt", 90)
    found = as_json("verify", tmp_path, code=1)["files"]
    assert [(os.path.basename(row["path"]), row["state"]) for row in found] == [
        ("a.ckpt", "ok"), ("b.ckpt", "bad"),
    ]  # fmt: skip
    assert found[1]["error"].startswith("b.ckpt is corrupt: payload.ckpt has checksum ")


def test_inspect_shows_what_it_holds(by_two: Path, tmp_path: Path) -> None:
    single = tmp_path / "a.ckpt"
    CheckpointEngine().save(
        sharded_jobs.plain_payload(), single, summary={"step": 7, "epoch": 3, "exact": True}
    )
    found, expected = as_json("inspect", by_two, "--tensors"), as_json("inspect", single, "--tensors")
    assert (found["maker"], found["format"]) == ("holdfast", "format 1, 2 shards")
    for key in ("step", "epoch", "exact", "models", "optimizers", "parts", "callbacks"):
        assert found[key] == expected[key], key
    for one in (*found["tensors"], *expected["tensors"]):
        one["same_as"] = one["same_as"] and True
    assert found["tensors"] == expected["tensors"]


def test_diff_compares_it_with_anything(by_two: Path, tmp_path: Path) -> None:
    single, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    CheckpointEngine().save(sharded_jobs.plain_payload(), single)
    save_alone(other, sharded_jobs.plain_payload(0.5))
    assert holdfast("diff", by_two, single).returncode == 0
    found = as_json("diff", by_two, other, code=1)
    (model,) = found["models"]
    assert (model["tensors"], model["changed"]) == (11, 9)
    assert 0.49 < model["largest_change"] < 0.51


def test_none_of_this_needs_torch_but_merging(by_two: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from holdfast.cli import main\n"
        f"for name in ('ls', 'inspect', 'verify'): assert main([name, {str(by_two)!r}]) == 0\n"
        f"assert main(['diff', {str(by_two)!r}, {str(by_two)!r}]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = child("merge", by_two, tmp_path / "m.ckpt")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_one_tensor_of_it(by_two: Path) -> None:
    expected = sharded_jobs.full("second")
    assert torch.equal(load_tensor(by_two, "second"), expected)
    assert torch.equal(load_tensor(by_two, "state_dict/second"), expected)
    assert torch.equal(load_tensor(by_two, "optimizer_states/0/state/second/exp_avg"), expected / 2)
    assert load_tensor(by_two, "callbacks/a/best").item() == 0.25
    with pytest.raises(
        CheckpointIncompatible, match="^a.ckpt holds no tensor 'secund'. The nearest names: 'second'"
    ):
        load_tensor(by_two, "secund")


def test_the_trainers_plugin_deletes_it(tmp_path: Path) -> None:
    from holdfast.checkpoint.checkpoint_io import TorchCheckpointIO

    path = save_alone(tmp_path / "a.ckpt", sharded_jobs.plain_payload())
    (path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError):
        TorchCheckpointIO().remove_checkpoint(path)
    (path / "notes.txt").unlink()
    TorchCheckpointIO().remove_checkpoint(path)
    TorchCheckpointIO().remove_checkpoint(path)
    assert os.listdir(tmp_path) == []
