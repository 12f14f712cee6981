"""``holdfast verify`` reads every byte, names the tensor that is bad, and says what it could not check."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from tests.cli.command import as_json, child, flip, holdfast, save


def states(found: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {os.path.basename(one["path"]): one["state"] for one in found["files"]}


def test_a_flipped_byte_is_found_and_the_tensor_named(tmp_path: Path) -> None:
    good = save(tmp_path / "a.ckpt", {"state_dict": {"layer.weight": torch.ones(1000)}})
    bad = save(tmp_path / "deep" / "b.ckpt", {"state_dict": {"layer.weight": torch.ones(1000)}})
    size = good.stat().st_size / 1000
    assert (
        holdfast("verify", "a.ckpt", cwd=tmp_path).stdout == f"ok         a.ckpt  {size:.1f} kB  every byte\n"
    )
    flip(bad, bad.read_bytes().index(torch.ones(1000).numpy().tobytes()) + 2000)
    ran = child("verify", ".", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (1, "")
    ok, mark, reason, total = ran.stdout.splitlines()
    assert ok == f"ok         ./a.ckpt  {size:.1f} kB  every byte"
    assert mark == "bad        ./deep/b.ckpt"
    assert re.fullmatch(
        r" {11}b\.ckpt is corrupt: data/0 \(state_dict/layer\.weight\) has checksum [0-9a-f]{8}, the manifest "
        r"says [0-9a-f]{8}\.",
        reason,
    )
    assert re.fullmatch(r"2 files: 1 ok, 1 bad  \d+\.\d kB in \d+\.\d\d s", total)


def test_json(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"state_dict": {"w": torch.ones(10)}})
    os.link(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    found = as_json("verify", tmp_path)
    size = (tmp_path / "a.ckpt").stat().st_size
    rest = {"size_bytes": size, "error": None}
    first = str(tmp_path / "a.ckpt")
    assert found == {
        "ok": True,
        "files": [
            {"path": first, "state": "ok", "checked": "every byte", "same_file_as": None, **rest},
            {
                "path": str(tmp_path / "last.ckpt"),
                "state": "same",
                "checked": None,
                "same_file_as": first,
                **rest,
            },
        ],
    }


def test_files_of_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"w": torch.ones(100)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "m.safetensors")
    for name, state_of, words in (
        ("new.pt", "ok", "torch's checksums; what lies between them has none"),
        ("old.pt", "unchecked", "not checked; this format of torch has no checksums"),
        ("m.safetensors", "ok", "lengths alone; safetensors has no checksums"),
    ):
        ran = holdfast("verify", name, cwd=tmp_path)
        assert ran.returncode == 0
        assert ran.stdout.split()[0] == state_of
        assert ran.stdout.endswith(f"B  {words}\n")
    flip(
        tmp_path / "new.pt", (tmp_path / "new.pt").read_bytes().index(torch.ones(100).numpy().tobytes()) + 100
    )
    with open(tmp_path / "m.safetensors", "ab") as file:
        file.write(b"x")
    found = as_json("verify", *(tmp_path / name for name in ("new.pt", "old.pt", "m.safetensors")), code=1)
    assert states(found) == {"new.pt": "bad", "old.pt": "unchecked", "m.safetensors": "bad"}
    assert found["files"][0]["error"].startswith("new.pt is corrupt: data/0 has checksum ")
    assert found["ok"] is False


def test_what_is_not_there_or_not_whole(tmp_path: Path) -> None:
    good = save(tmp_path / "good.ckpt", {"state_dict": {"w": torch.ones(10)}})
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:-10])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    found = as_json("verify", tmp_path, code=1)
    assert states(found) == {"good.ckpt": "ok", "cut.ckpt": "bad", "text.ckpt": "bad", "gone.ckpt": "unread"}
    ran = holdfast("verify", "missing.ckpt", cwd=tmp_path)
    assert ran.returncode == 2
    assert (
        ran.stdout.splitlines()[1]
        .strip()
        .startswith("There is no checkpoint missing.ckpt. The nearest names")
    )
    (tmp_path / "empty").mkdir()
    ran = holdfast("verify", "empty", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "holdfast: No *.ckpt in empty or below it.\n"
