"""``holdfast inspect`` shows what is in anybody's checkpoint, runs nothing and reads no tensor."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from holdfast.checkpoint import container, contents, inert, inspect, pickling
from holdfast.checkpoint.load import load
from tests.cli.command import a_payload, as_json, flip, holdfast, save


def sections(text: str) -> dict[str, list[list[str]]]:
    """The words of each line, by the first word of the titles."""
    found: dict[str, list[list[str]]] = {}
    for block in text.split("\n\n"):
        title, *lines = block.splitlines()
        found[title.split()[0]] = [line.split() for line in lines]
    return found


def test_a_file_of_ours(tmp_path: Path) -> None:
    path = save(
        tmp_path / "last.ckpt", a_payload(300, 0.001), ago_s=185, step=300, epoch=2, exact=True, kind="full",
        metrics={"val_loss": 0.25},
    )  # fmt: skip
    ran = holdfast("inspect", path)
    assert (ran.returncode, ran.stderr) == (0, "")
    head, *_ = ran.stdout.split("\n\n")
    size = path.stat().st_size / 1e6
    assert head.splitlines() == [
        f"{path}  {size:.1f} MB  holdfast, format {container.FORMAT}",
        "  step 300  epoch 2  saved 3 min ago  resumes exactly",
        "  val_loss 0.25",
    ]
    found = sections(ran.stdout)
    assert found["state_dict"] == [
        ["module", "numbers", "size", "tensors"],
        ["embed", "64,000", "256.0", "kB", "weight", "1000", "x", "64"],
        ["layers", "50,176", "200.7", "kB"],
        ["0", "..", "3", "50,176", "200.7", "kB", "4", "alike"],
        ["attention", "12,480", "49.9", "kB", "weight", "192", "x", "64,", "bias", "192"],
        ["norm", "64", "256", "B", "weight", "64"],
        ["head", "0", "0", "B", "weight", "=", "embed.weight"],
    ]
    assert ["lr", "0.001"] in found["hyperparameters"]
    assert ["betas", "[0.9,", "0.999]"] in found["hyperparameters"]
    assert ["data", "wiki"] in found["hyperparameters"]
    assert found["training"][0] == ["optimizer", "AdamW", "state", "of", "39", "tensors,", "913.5", "kB"]
    assert found["training"][1][:6] == ["group", "0", "13", "parameters:", "lr", "0.001,"]
    assert found["training"][2] == [
        "scheduler", "StepLR", "step_size", "30,", "gamma", "0.1,", "last_epoch", "3,", "_last_lr", "[0.001]",
    ]  # fmt: skip
    assert ["callbacks", "ModelCheckpoint"] in found["training"]
    assert found["what"][0] == ["optimizer_states", "39", "tensors", "913.5", "kB"]
    assert found["what"][1] == ["state_dict", "14", "tensors", "456.7", "kB"]


def test_json_of_a_file_of_ours(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", a_payload(300, 0.001), step=300, epoch=2, exact=True)
    found = as_json("inspect", path, "--tensors")
    assert found["hyper_parameters"] == {
        "width": 64, "layers": 4, "lr": 0.001, "betas": [0.9, 0.999], "data": "wiki",
    }  # fmt: skip
    (model,) = found["models"]
    assert (model["key"], model["tensors"], model["values"]) == ("state_dict", 14, 114_176)
    assert model["tied"] == [["embed.weight", "head.weight"]]
    assert model["dtypes"] == {"float32": 114_176}
    by_name = {one["name"]: one for one in found["tensors"]}
    assert by_name["state_dict/head.weight"] == {
        "name": "state_dict/head.weight", "dtype": "float32", "shape": [1000, 64], "size_bytes": 256_000,
        "layout": "strided", "device": "cpu", "same_as": "state_dict/embed.weight",
    }  # fmt: skip
    assert "optimizer_states/0/state/0/exp_avg" in by_name
    assert (found["step"], found["epoch"], found["maker"]) == (300, 2, "holdfast")


def test_omissions_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", {"state_dict": {}, "hyper_parameters": {"f": open}})
    assert sections(holdfast("inspect", path).stdout)["not"] == [
        ["hyper_parameters/f", "a", "function", "(open)", "cannot", "be", "stored"]
    ]


def test_no_tensor_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", {"state_dict": {"w": torch.ones(100_000)}})
    flip(path, path.read_bytes().index(torch.ones(1000).numpy().tobytes()) + 4000)
    assert holdfast("inspect", path).returncode == 0
    assert holdfast("verify", path).returncode == 1


# -- files of others -----------------------------------------------------------------------------------------


def a_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


MODULES = [
    ["module", "numbers", "size", "tensors"],
    ["0", "15", "60", "B", "weight", "3", "x", "4,", "bias", "3"],
    ["1", "13", "56", "B", "weight", "3,", "bias", "3,", "running_mean", "3,", "running_var", "3,",
     "num_batches_tracked", "scalar", "int64"],
]  # fmt: skip


@pytest.mark.parametrize(("whole", "new_format"), [(False, True), (False, False), (True, True)])
def test_a_model_of_torch(tmp_path: Path, whole: bool, new_format: bool) -> None:
    model = a_model()
    torch.save(
        model if whole else model.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=new_format
    )
    ran = holdfast("inspect", tmp_path / "m.pt")
    found = sections(ran.stdout)
    assert found["tensors"] == MODULES
    names = [["torch.nn.modules.container.Sequential"], ["torch.nn.modules.linear.Linear"]]
    assert found.get("classes", [])[:2] == (names if whole else [])
    assert (ran.returncode, ran.stderr) == (0, "")


def test_several_models_under_names_of_their_own(tmp_path: Path) -> None:
    payload = {
        "generator": a_model().state_dict(), "critic": {"w": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.5, "params": [0, 1]}]}, "note": argparse.Namespace(a=1),
    }  # fmt: skip
    torch.save(payload, tmp_path / "m.pt")
    found = as_json("inspect", tmp_path / "m.pt")
    assert [(model["key"], model["tensors"]) for model in found["models"]] == [
        ("generator", 7),
        ("critic", 1),
    ]
    assert found["optimizers"][0]["groups"][0]["options"]["lr"] == 0.5
    assert found["inert_classes"] == []


def test_a_file_of_torch_with_our_name(tmp_path: Path) -> None:
    """Torch writes the file's name into each record's; that must not make it a damaged file of ours."""
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "holdfast.pt")
    assert load(tmp_path / "holdfast.pt")["state_dict"]["w"].tolist() == [1, 1]
    assert holdfast("inspect", tmp_path / "holdfast.pt").returncode == 0


def test_a_file_of_lightning(tmp_path: Path) -> None:
    payload = {
        "state_dict": {"w": torch.ones(2)},
        "epoch": 3,
        "global_step": 40,
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save({**payload, "pytorch-lightning_version": "2.1.0"}, tmp_path / "m.ckpt")
    lines = holdfast("inspect", tmp_path / "m.ckpt").stdout.splitlines()
    assert lines[0].endswith("PyTorch Lightning 2.1.0, zip archive of torch.save")
    assert lines[1] == "  step 40  epoch 3"


def test_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(a_model().state_dict(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = sections(holdfast("inspect", tmp_path / "m.safetensors").stdout)
    assert found["metadata"] == [["format", "pt"]]
    assert sorted(row[0] for row in found["tensors"][1:]) == ["0", "1"]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (
            b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
            "'w' has 4 bytes, which are not [2] of F32",
        ),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "'w' lies outside the file"),
        (
            b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
            "its tensors end at byte 62, the file at 66",
        ),
        (b'{"w":[]}', "its header does not describe 'w' as a tensor"),
        (
            b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
            "its header does not describe 'w' as a tensor",
        ),
        (b'{"w":1,"w":2}', "its header is not JSON: a name is there twice"),
        (b'{"__metadata__":{"a":1}}', "its metadata is not text by name"),
        (b"{", None),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path: Path, header: bytes, reason: str | None) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    ran = holdfast("inspect", tmp_path / "m.safetensors")
    assert (ran.returncode, ran.stdout) == (2, "")
    if reason is not None:
        assert ran.stderr == f"holdfast: m.safetensors is not a whole safetensors file: {reason}.\n"


# -- what is said must be what torch gives -------------------------------------------------------------------


def test_every_name_that_the_reader_knows_is_known_here_too() -> None:
    assert set(pickling.GLOBALS) <= set(inert.GLOBALS)
    for (module, name), known in pickling.GLOBALS.items():
        if isinstance(known, torch.dtype):
            assert (module, inert.ITEMSIZES[name]) == ("torch", known.itemsize), name
        if isinstance(known, pickling._Kind):
            assert inert._STORAGES[name] == str(known.dtype).removeprefix("torch."), name


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("ours", [True, False])
def test_shapes_and_places_of_every_kind_of_tensor(tmp_path: Path, ours: bool) -> None:
    base = torch.arange(24.0)
    payload: dict[str, Any] = {
        "view": base[4:12].view(2, 4), "base": base, "column": base.view(4, 6)[:, 1], "empty": torch.empty(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16), "odd": torch.ones(3, dtype=torch.uint16),
        "eight": torch.ones(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(7), "meta": torch.empty(2, device="meta"),
        "sparse": torch.eye(3).to_sparse(), "rows": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.qint8),
        "parameter": torch.nn.Parameter(torch.ones(2)), "complex": torch.ones(2, dtype=torch.complex64),
        "channels": torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    path = tmp_path / "a.ckpt"
    if ours:
        save(path, payload)
    else:
        torch.save(payload, path)
    with contents.opened(path) as opened:
        found = opened.value
        for name, tensor in payload.items():
            facts = found[name]
            assert (facts.dtype, facts.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
            if tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta:
                length = opened.storages[facts.key].length
                reach = sum((n - 1) * step for n, step in zip(facts.shape, facts.stride)) + facts.offset + 1
                assert facts.numel == 0 or reach * tensor.itemsize <= length, name
        assert found["view"].key == found["base"].key
        assert found["sparse"].layout == "sparse_coo"
        assert found["meta"].size_bytes == 0
    assert holdfast("inspect", path, "--tensors").returncode == 0


# -- hostile files -------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def hostile(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Runs(tmp_path / "ran")}, tmp_path / "m.ckpt")
    ran = holdfast("inspect", tmp_path / "m.ckpt")
    assert ran.returncode == 0
    assert sections(ran.stdout)["classes"] == [["__builtin__.getattr"]]
    assert not (tmp_path / "ran").exists()


def test_a_file_of_ours_that_asks_for_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksums are right, since somebody with this library wrote it."""
    evil = pickle.dumps({"state_dict": {}, "x": Runs(tmp_path / "ran")}, 2)
    monkeypatch.setattr("holdfast.checkpoint.pickling.dumps", lambda tree, plan: evil)
    path = save(tmp_path / "m.ckpt", {"state_dict": {}})
    ran = holdfast("inspect", path)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1].startswith("unsafe  it names ")
    assert not (tmp_path / "ran").exists()


def laughs() -> Any:
    value: Any = ["ha"] * 10
    for _ in range(30):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"state_dict": laughs(), "hyper_parameters": laughs()},
        {"hyper_parameters": {"n": 1 << 60_000, "text": "x" * 1_000_000, "bytes": b"x" * 1000}},
        {
            "hyper_parameters": "not a dict",
            "optimizer_states": 3,
            "lr_schedulers": {},
            "callbacks": [1],
            "holdfast": 2,
        },
        {
            "holdfast": {"progress": 1, "environment": [], "command": {"optimizers": 7}},
            "optimizer_states": [1, {}],
        },
        {
            "optimizer_states": [{"state": 1, "param_groups": [1, {"params": 3}]}],
            "epoch": "best",
            "global_step": None,
        },
        {1: 2, None: 3, (1, 2): 4, "state_dict": {5: 6}},
        {"hyper_parameters": numpy.arange(3), "environment": numpy.arange(3), "x": numpy.arange(3)},
        [1, 2],
        None,
    ],
)
def test_values_that_nobody_expects(tmp_path: Path, value: Any) -> None:
    path = hostile(tmp_path / "m.ckpt", pickle.dumps(value, 2))
    ran = holdfast("inspect", path, "--tensors")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout) < 200_000
    again = holdfast("inspect", path, "--json", "--tensors")
    assert len(again.stdout) < 1_000_000
    assert json.loads(again.stdout)["maker"] == "torch"
    assert holdfast("diff", path, path).returncode == 0
    other = hostile(tmp_path / "other.ckpt", pickle.dumps(7, 2))
    assert holdfast("diff", path, other).returncode == 1


def test_a_memo_slot_within_a_tensor_makes_no_room_for_it(tmp_path: Path) -> None:
    """The unpickler would set ten gigabytes aside for one changed byte."""
    torch.save({f"layers.{i}.weight": torch.ones(2) for i in range(60)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        data = archive.read("m/data.pkl")
    assert (data[-8:-6], data[-2:]) == (b"Rr", b"u.")  # the end of a tensor, and its memo slot in four bytes
    changed = data[:-3] + b"\x4f" + data[-2:]
    ran = holdfast("inspect", hostile(tmp_path / "bad.pt", changed))
    assert ran.returncode == 2
    assert "is out of proportion to" in ran.stderr


def a_loop() -> list[Any]:
    loop: list[Any] = []
    loop.append({"again": loop})
    return loop


def test_a_payload_that_holds_itself(tmp_path: Path) -> None:
    path = hostile(tmp_path / "m.ckpt", pickle.dumps({"hyper_parameters": a_loop(), "x": a_loop()}, 2))
    assert holdfast("inspect", path, "--tensors").returncode == 0
    assert holdfast("diff", path, path).returncode == 0


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",
        b"\x80\x02ctorch\nFloatStorage\n}(X\x04\x00\x00\x00textX\x01\x00\x00\x00xub.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x04\x00\x00\x00textX\x01\x00\x00\x00xub.",
        b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n(K\x01(K\x01K\x02ttR.",
        b"\x80\x02B\xff\xff\xff\x7f.",
        b"garbage",
        b"",
    ],
)
def test_a_pickle_that_is_none(tmp_path: Path, pickled: bytes) -> None:
    ran = holdfast("inspect", hostile(tmp_path / "m.ckpt", pickled))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("holdfast: m.ckpt cannot be read: ")


def test_it_says_what_plain_values_become() -> None:
    assert inspect.plain({"a": float("inf"), "b": [1, (2, {3})], "c": b"xy"}) == {
        "a": "inf", "b": [1, [2, [3]]], "c": "2 bytes",
    }  # fmt: skip
