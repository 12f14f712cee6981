"""``holdfast ls`` tells what a directory holds, where runs would start from, and needs no torch for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint import commit
from tests.cli.command import a_save, as_json, holdfast, save


def names(found: list[dict[str, object]]) -> list[str]:
    return [os.path.basename(str(one["path"])) for one in found]


def test_a_directory_of_a_run(tmp_path: Path) -> None:
    a_save(tmp_path / "epoch=1-step=10.ckpt", 10, score=0.5, ago_s=7200)
    a_save(tmp_path / "epoch=2-step=20.ckpt", 20, score=0.25, ago_s=185)
    a_save(tmp_path / "epoch=3-step=30.ckpt", 30, score=0.3125, names=("last.ckpt",))
    os.link(tmp_path / "epoch=3-step=30.ckpt", tmp_path / "last.ckpt")
    size = os.path.getsize(tmp_path / "last.ckpt") / 1000
    ran = holdfast("ls", ".", cwd=tmp_path)
    lines = ran.stdout.splitlines()
    total = sum(os.path.getsize(path) for path in tmp_path.iterdir() if path.name != "last.ckpt") / 1000
    assert lines[0] == f".  3 checkpoints, {total:.1f} kB"
    assert [line.split() for line in lines[1:6]] == [
        ["name", "step", "epoch", "val_loss", "size", "age"],
        [
            "epoch=3-step=30.ckpt",
            "30",
            "3",
            "0.3125",
            f"{size:.1f}",
            "kB",
            *lines[2].split()[6:8],
            "last,",
            "auto",
        ],
        ["last.ckpt", "the", "same", "file"],
        ["epoch=2-step=20.ckpt", "20", "2", "0.25", *lines[4].split()[4:6], "3", "min", "best"],
        ["epoch=1-step=10.ckpt", "10", "1", "0.5", *lines[5].split()[4:6], "2", "h"],
    ]
    assert lines[6:] == [
        "best  epoch=2-step=20.ckpt  val_loss 0.25 (min)",
        'auto  ckpt_path="auto" would go on from last.ckpt at step 30',
    ]
    assert (ran.returncode, ran.stderr) == (0, "")


def test_json(tmp_path: Path) -> None:
    a_save(tmp_path / "a.ckpt", 10, score=0.5, names=("last.ckpt",), ago_s=5)
    os.link(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    os.utime(tmp_path / "foreign.ckpt", (1000, 1000))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:300])
    os.utime(tmp_path / "cut.ckpt", (500, 500))
    found = as_json("ls", tmp_path)
    first = {one["path"].rpartition("/")[2]: one for one in found["checkpoints"]}
    assert names(found["checkpoints"]) == ["last.ckpt", "a.ckpt", "foreign.ckpt", "cut.ckpt"]
    saved_at = first["a.ckpt"].pop("saved_at")
    assert isinstance(saved_at, float)
    assert first["a.ckpt"] == {
        "path": str(tmp_path / "a.ckpt"), "step": 10, "epoch": 1, "metrics": {"val_loss": 0.5},
        "size_bytes": os.path.getsize(tmp_path / "a.ckpt"), "whole": True, "reason": None, "exact": True,
        "kind": "full", "foreign": False, "same_file_as": None,
    }  # fmt: skip
    assert first["last.ckpt"]["same_file_as"] == str(tmp_path / "a.ckpt")
    assert (first["foreign.ckpt"]["foreign"], first["foreign.ckpt"]["whole"]) == (True, True)
    assert first["cut.ckpt"]["reason"] == "it does not end with a zip directory"
    del found["checkpoints"]
    assert found == {
        "directory": str(tmp_path),
        "best": [{"path": str(tmp_path / "a.ckpt"), "monitor": "val_loss", "mode": "min", "score": 0.5}],
        "last": str(tmp_path / "last.ckpt"),
        "auto": str(tmp_path / "last.ckpt"),
        "restore": None,
        "temporary_files": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "best"),
    [
        (["--monitor", "acc", "--mode", "max"], "b.ckpt"),
        (["--monitor", "acc"], "a.ckpt"),
        (["--monitor", "val_loss"], "a.ckpt"),
        (["--monitor", "nothing"], None),
        ([], "b.ckpt"),
    ],
)
def test_best_by_what_was_asked_for_or_ranked_on(
    tmp_path: Path, arguments: list[str], best: str | None
) -> None:
    """Without --monitor it is what the callback ranked: here b, though a's loss is lower in the metrics."""
    a_save(tmp_path / "a.ckpt", 10, score=0.5, metrics={"acc": 0.1, "val_loss": 0.1}, ago_s=20)
    a_save(tmp_path / "b.ckpt", 20, score=0.25, metrics={"acc": 0.9, "val_loss": 0.2}, ago_s=10)
    a_save(tmp_path / "nan.ckpt", 30, score=float("nan"), metrics={"acc": float("nan")})
    found = as_json("ls", tmp_path, *arguments)["best"]
    assert names(found) == ([] if best is None else [best])


def test_a_tie_goes_to_the_older_and_a_renamed_file_is_not_ranked(tmp_path: Path) -> None:
    a_save(tmp_path / "old.ckpt", 10, score=0.25, ago_s=20)
    a_save(tmp_path / "new.ckpt", 20, score=0.25, ago_s=10)
    os.rename(a_save(tmp_path / "x.ckpt", 30, score=0.125), tmp_path / "renamed.ckpt")
    assert names(as_json("ls", tmp_path)["best"]) == ["old.ckpt"]


def test_files_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    a_save(tmp_path / "exact.ckpt", 10, ago_s=40)
    a_save(tmp_path / "inexact.ckpt", 20, exact=False, ago_s=30)
    a_save(tmp_path / "weights.ckpt", 30, kind="weights", exact=False, ago_s=20)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    ran = holdfast("ls", ".", cwd=tmp_path)
    notes = {line.split()[0]: line for line in ran.stdout.splitlines()[2:6]}
    assert notes["cut.ckpt"].endswith("not whole") or notes["cut.ckpt"].endswith("foreign")
    assert notes["weights.ckpt"].endswith("weights only")
    assert notes["inexact.ckpt"].endswith("last, inexact")
    assert notes["exact.ckpt"].endswith("auto")
    (tmp_path / "exact.ckpt").unlink()
    (tmp_path / "inexact.ckpt").unlink()
    (tmp_path / "cut.ckpt").unlink()
    told = holdfast("ls", tmp_path).stdout.splitlines()[-1]
    assert told == 'auto  ckpt_path="auto" would start afresh: these hold weights only'
    (tmp_path / "weights.ckpt").write_bytes((tmp_path / "weights.ckpt").read_bytes()[:-1])
    told = holdfast("ls", tmp_path).stdout.splitlines()[-2]
    assert told == 'auto  ckpt_path="auto" would refuse: not one of these is whole'


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_auto_is_where_a_run_really_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest of all is cut short, the next holds weights, then one was saved in a hook: older ones count."""

    def fit(epochs: int) -> None:
        trainer = pl.Trainer(
            max_epochs=epochs, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1)],
        )  # fmt: skip
        trainer.fit(Small(), torch.utils.data.DataLoader(torch.ones(4, 2)), ckpt_path="auto")

    fit(2)
    content = (tmp_path / "ck" / "epoch=1.ckpt").read_bytes()
    a_save(tmp_path / "ck" / "hook.ckpt", 100, exact=False)
    a_save(tmp_path / "ck" / "weights.ckpt", 100, exact=False, kind="weights")
    (tmp_path / "ck" / "cut.ckpt").write_bytes(content[:-100])
    told = os.path.relpath(as_json("ls", "-r", tmp_path)["auto"])
    capsys.readouterr()
    fit(3)
    said = capsys.readouterr()
    assert f"resumed from {told}  step 8" in said.out + said.err
    assert told.endswith("epoch=1.ckpt")


def test_a_directory_of_a_checkpointer(tmp_path: Path) -> None:
    from holdfast.checkpointer import Checkpointer

    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.ones(3)}, metrics={"loss": 1 / step})
    ran = holdfast("ls", tmp_path)
    assert ran.stdout.splitlines()[-1] == (
        "auto  Checkpointer.restore would go on from step=00000002.ckpt at step 2"
    )
    found = as_json("ls", tmp_path)
    assert (found["auto"], found["restore"]) == (None, str(tmp_path / "step=00000002.ckpt"))


def test_below_and_beside(tmp_path: Path) -> None:
    a_save(tmp_path / "deep" / "er" / "a.ckpt", 10)
    (tmp_path / "deep" / ".a.ckpt.123.0a1b2c3d.tmp").write_bytes(b"half")
    assert commit.is_temporary(".a.ckpt.123.0a1b2c3d.tmp")
    ran = holdfast("ls", "deep", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "holdfast: No *.ckpt in deep, but 1 below it: holdfast ls -r deep\n"
    ran = holdfast("ls", "-r", "deep", cwd=tmp_path)
    assert ran.stdout.splitlines()[2].split()[0] == "er/a.ckpt"
    assert ran.stdout.splitlines()[-1] == (
        "1 temporary file of a save that is under way, or that was killed: the next save tidies up"
    )
    assert (tmp_path / "deep" / ".a.ckpt.123.0a1b2c3d.tmp").exists()


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where, message in (
        ("empty", "No *.ckpt in empty."),
        ("missing", "There is no directory missing."),
    ):
        ran = holdfast("ls", where, cwd=tmp_path)
        assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"holdfast: {message}\n")
    assert as_json_of_empty(tmp_path)["checkpoints"] == []


def as_json_of_empty(tmp_path: Path) -> dict[str, object]:
    ran = holdfast("ls", "empty", "--json", "--suffix", ".pt", "--suffix", ".ckpt", cwd=tmp_path)
    assert ran.returncode == 1
    found: dict[str, object] = json.loads(ran.stdout)
    return found


def test_other_suffixes(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", {"state_dict": {}}, step=3)
    assert names(as_json("ls", tmp_path, "--suffix", ".pt")["checkpoints"]) == ["a.pt"]
