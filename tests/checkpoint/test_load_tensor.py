"""`load_tensor`: one tensor by name, as it was saved, and nothing else of the file read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.single import load_tensor
from holdfast.errors import CheckpointCorrupt, CheckpointIncompatible, CheckpointNotFound, CheckpointUnsafe

WRITERS = ["holdfast", "torch"]


def payload() -> dict[str, Any]:
    return {
        "epoch": 3,
        "state_dict": {
            "layers.0.weight": torch.arange(6.0).view(2, 3),
            "layers.0.bias": torch.full((3,), 7.0),
            "layers.1.weight": torch.arange(100.0, 106.0).view(2, 3),
        },
        "optimizer_states": [
            {"state": {3: {"exp_avg": torch.full((2, 3), 0.25)}}, "param_groups": [{"lr": 0.1}]}
        ],
        "a/b": {"c~d": torch.tensor([5])},
    }


def write(writer: str, value: Any, path: Path) -> Path:
    if writer == "torch":
        torch.save(value, path)
    else:
        CheckpointEngine().save(value, path)
    return path


def flip(path: Path, found: bytes) -> None:
    data = path.read_bytes()
    assert data.count(found) == 1
    at = data.index(found)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layers.0.weight", ("state_dict", "layers.0.weight")),
        ("state_dict/layers.0.weight", ("state_dict", "layers.0.weight")),
        ("optimizer_states/0/state/3/exp_avg", ("optimizer_states", 0, "state", 3, "exp_avg")),
        ("a~1b/c~0d", ("a/b", "c~d")),
    ],
)
def test_names_are_those_in_the_file(writer: str, name: str, path: tuple[Any, ...], tmp_path: Path) -> None:
    expected: Any = payload()
    for part in path:
        expected = expected[part]
    file = write(writer, payload(), tmp_path / "a.ckpt")
    assert torch.equal(load_tensor(file, name), expected)


@pytest.mark.parametrize("writer", WRITERS)
def test_only_its_own_bytes_are_read(writer: str, tmp_path: Path) -> None:
    file = write(writer, payload(), tmp_path / "a.ckpt")
    saved = payload()
    flip(file, saved["optimizer_states"][0]["state"][3]["exp_avg"].numpy().tobytes())
    flip(file, saved["state_dict"]["layers.0.bias"].numpy().tobytes())
    assert torch.equal(load_tensor(file, "layers.0.weight"), saved["state_dict"]["layers.0.weight"])
    with pytest.raises(CheckpointCorrupt, match=r"^a.ckpt is corrupt: data/\d+ .*has checksum "):
        load_tensor(file, "layers.0.bias")


def test_its_own_bytes_are_checked_and_named(tmp_path: Path) -> None:
    file = write("holdfast", payload(), tmp_path / "a.ckpt")
    flip(file, payload()["state_dict"]["layers.0.bias"].numpy().tobytes())
    with pytest.raises(CheckpointCorrupt) as refused:
        load_tensor(file, "layers.0.bias")
    assert re.fullmatch(
        r"a\.ckpt is corrupt: data/\d+ \(state_dict/layers\.0\.bias\) has checksum [0-9a-f]{8}, "
        r"the manifest says [0-9a-f]{8}\.",
        str(refused.value),
    )


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "layers.0.wieght",
            "a.ckpt holds no tensor 'layers.0.wieght'. The nearest names: 'layers.0.weight', "
            "'layers.1.weight', 'layers.0.bias'.",
        ),
        (
            "optimizer_states/0/state/4/exp_avg",
            "a.ckpt holds no tensor 'optimizer_states/0/state/4/exp_avg'. The nearest names: "
            "'optimizer_states/0/state/3/exp_avg'.",
        ),
        (
            "state_dict",
            "'state_dict' in a.ckpt is of type dict, not a tensor. Tensors in it: 'layers.0.weight', "
            "'layers.0.bias', 'layers.1.weight'.",
        ),
        ("epoch", "'epoch' in a.ckpt is of type int, not a tensor. holdfast.load gives it."),
    ],
)
def test_a_name_that_is_no_tensor(writer: str, name: str, message: str, tmp_path: Path) -> None:
    file = write(writer, payload(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointIncompatible) as refused:
        load_tensor(file, name)
    assert str(refused.value) == message


def test_a_file_without_tensors(tmp_path: Path) -> None:
    file = write("holdfast", {"epoch": 1}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointIncompatible) as refused:
        load_tensor(file, "w")
    assert str(refused.value) == "a.ckpt holds no tensor 'w'. It holds no tensors at all."
    with pytest.raises(CheckpointNotFound):
        load_tensor(tmp_path / "b.ckpt", "w")


KINDS: dict[str, Any] = {
    "strided": lambda: torch.arange(12.0).view(3, 4).t(),
    "expanded": lambda: torch.ones(1).expand(5, 4),
    "view": lambda: torch.arange(1000.0)[17:20],
    "scalar": lambda: torch.tensor(2.5, dtype=torch.float64),
    "empty": lambda: torch.empty(0, 3),
    "bfloat16": lambda: torch.arange(5, dtype=torch.bfloat16),
    "float8": lambda: torch.arange(5, dtype=torch.float32).to(torch.float8_e4m3fn),
    "complex": lambda: torch.tensor([1 + 2j, 3j]),
    "bool": lambda: torch.tensor([True, False]),
    "sparse": lambda: torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse_coo().coalesce(),
    "compressed": lambda: torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.quint8),
    "by channel": lambda: torch.quantize_per_channel(
        torch.arange(4.0).view(2, 2), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8
    ),
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_comes_back_as_it_is(writer: str, kind: str, tmp_path: Path) -> None:
    expected = KINDS[kind]()
    file = write(writer, {"x": expected, "other": torch.ones(3)}, tmp_path / "a.ckpt")
    found = load_tensor(file, "x")
    assert (found.dtype, found.shape, found.layout) == (expected.dtype, expected.shape, expected.layout)
    if kind == "meta":
        assert found.is_meta
    elif expected.layout is not torch.strided:
        assert torch.equal(found.to_dense(), expected.to_dense())
    elif expected.is_quantized:
        assert torch.equal(found.dequantize(), expected.dequantize())
    elif kind == "float8":
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    else:
        assert torch.equal(found, expected)
        assert kind != "strided" or found.stride() == expected.stride()


def test_a_view_that_shares_a_record_with_others(tmp_path: Path) -> None:
    base = torch.arange(100.0)
    file = write("holdfast", {"head": base[:60], "tail": base[40:], "again": base[:60]}, tmp_path / "a.ckpt")
    assert torch.equal(load_tensor(file, "tail"), base[40:])
    assert torch.equal(load_tensor(file, "again"), base[:60])


def test_map_location(tmp_path: Path) -> None:
    file = write("holdfast", payload(), tmp_path / "a.ckpt")
    found = load_tensor(file, "layers.0.weight", map_location="meta")
    assert found.is_meta and found.shape == (2, 3)
    asked = []
    load_tensor(file, "layers.0.weight", map_location=lambda storage, where: asked.append(where))
    assert asked == ["cpu"]


def test_it_owns_its_memory(tmp_path: Path) -> None:
    file = write("holdfast", {"w": torch.arange(100_000.0)}, tmp_path / "a.ckpt")
    found = load_tensor(file, "w")
    file.write_bytes(b"")
    assert torch.equal(found, torch.arange(100_000.0))


def test_a_file_of_nothing_but_weights_and_one_with_classes_of_others(tmp_path: Path) -> None:
    torch.save(payload()["state_dict"], tmp_path / "weights.pt")
    assert torch.equal(load_tensor(tmp_path / "weights.pt", "layers.0.bias"), torch.full((3,), 7.0))
    settings = argparse.Namespace(lr=0.1)
    torch.save({"hyper_parameters": settings, "state_dict": payload()["state_dict"]}, tmp_path / "a.ckpt")
    assert torch.equal(load_tensor(tmp_path / "a.ckpt", "layers.0.bias"), torch.full((3,), 7.0))


def test_the_old_format(tmp_path: Path) -> None:
    torch.save(payload(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensor(tmp_path / "old.pt", "layers.0.bias"), torch.full((3,), 7.0))
    with pytest.raises(CheckpointIncompatible, match=r"^old.pt holds no tensor 'x'. The nearest names: "):
        load_tensor(tmp_path / "old.pt", "x")


def test_no_code_is_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (touched,)

    torch.save({"state_dict": {"w": torch.ones(2)}, "evil": Evil()}, tmp_path / "a.ckpt")
    assert load_tensor(tmp_path / "a.ckpt", "w").tolist() == [1, 1]
    with pytest.raises((CheckpointIncompatible, CheckpointUnsafe)):
        load_tensor(tmp_path / "a.ckpt", "evil")
    assert not touched.exists()
