"""``holdfast diff`` tells what is different, how far modules moved, and when two files are equal bit for bit."""

from __future__ import annotations

import argparse
import collections
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from holdfast.checkpoint import compare, contents
from tests.cli.command import a_payload, as_json, holdfast, save
from tests.cli.test_inspect import sections


def files(tmp_path: Path, first: Any, second: Any) -> tuple[Path, Path]:
    return save(tmp_path / "a.ckpt", first), save(tmp_path / "b.ckpt", second)


def test_two_saves_of_a_run(tmp_path: Path) -> None:
    a = save(tmp_path / "a.ckpt", a_payload(100, 0.001), step=100, epoch=0)
    b = save(tmp_path / "b.ckpt", a_payload(200, 0.0005), step=200, epoch=1)
    ran = holdfast("diff", "a.ckpt", "b.ckpt", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.splitlines()[:2] == ["A  a.ckpt  step 100  epoch 0", "B  b.ckpt  step 200  epoch 1"]
    found = sections(ran.stdout)
    assert found["hyperparameters"] == [["name", "A", "B"], ["lr", "0.001", "0.0005"]]
    assert ["optimizer_states/0/param_groups/0/lr", "0.001", "0.0005"] in found["optimizers"]
    rows = {row[0]: row[1:] for row in found["state_dict"]}
    assert list(rows) == [
        "module",
        "embed",
        *(f"layers.{i}.{n}" for i in range(4) for n in ("attention", "norm")),
        "head",
        "(all)",
    ]
    assert rows["embed"][:2] == ["1", "1"]
    assert rows["(all)"][:2] == ["14", "14"]
    as_numbers = as_json("diff", a, b, code=1)
    (model,) = as_numbers["models"]
    first, second = a_payload(100, 0.001)["state_dict"], a_payload(200, 0.0005)["state_dict"]
    change = torch.cat([(second[k].double() - first[k].double()).flatten() for k in first])
    before = torch.cat([first[k].double().flatten() for k in first])
    assert math.isclose(model["relative_change"], float(change.norm() / before.norm()), rel_tol=1e-6)
    assert math.isclose(model["largest_change"], float(change.abs().max()), rel_tol=1e-6)
    assert as_numbers["step"] == [100, 200]


def test_equal_files(tmp_path: Path) -> None:
    a, b = files(tmp_path, a_payload(100, 0.1), a_payload(100, 0.1))
    ran = holdfast("diff", a, b)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].startswith("equal  ")
    assert ran.stdout.splitlines()[-1].endswith(" tensors and all values are the same, bit for bit")
    assert as_json("diff", a, b)["equal"] is True


def test_one_bit(tmp_path: Path) -> None:
    """-0.0 equals 0.0 for arithmetic, and is another bit for a run that goes on."""
    a, b = files(
        tmp_path, {"state_dict": {"w": torch.tensor([0.0])}}, {"state_dict": {"w": torch.tensor([-0.0])}}
    )
    found = as_json("diff", a, b, code=1)
    assert found["models"][0]["changed"] == 1
    assert found["models"][0]["largest_change"] == 0


def test_keys_shapes_and_dtypes(tmp_path: Path) -> None:
    first = {"a.w": torch.ones(2, 3), "gone.w": torch.ones(1), "b.w": torch.ones(4)}
    second = {"a.w": torch.ones(3, 2), "new.w": torch.ones(1), "b.w": torch.ones(4, dtype=torch.bfloat16)}
    a, b = files(tmp_path, {"state_dict": first, "x": {"y": 1}}, {"state_dict": second, "extra": [1]})
    lines = holdfast("diff", a, b).stdout.splitlines()
    assert lines[lines.index("only in A") + 1 :][:2] == ["  state_dict/gone.w", "  x"]
    assert lines[lines.index("only in B") + 1 :][:2] == ["  state_dict/new.w", "  extra"]
    assert "  a.w   2 x 3  3 x 2" in lines
    assert "  b.w   float32  bfloat16" in lines
    numbers = as_json("diff", a, b, "--tensors", code=1)
    assert numbers["shapes"] == [{"name": "a.w", "a": [2, 3], "b": [3, 2]}]
    assert numbers["dtypes"] == [{"name": "b.w", "a": "float32", "b": "bfloat16"}]
    assert numbers["tensors"] == [
        {
            "name": "b.w",
            "model": "state_dict",
            "tensors": 1,
            "changed": 1,
            "relative_change": 0.0,
            "largest_change": 0.0,
        }
    ]


def test_a_model_against_one_that_something_else_wrote(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {"l.weight": torch.arange(6.0).view(2, 3), "l.bias": torch.ones(2)}
    a = save(tmp_path / "a.ckpt", {"state_dict": weights})
    torch.save(weights, tmp_path / "b.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "c.safetensors")
    for other in ("b.pt", "old.pt", "c.safetensors"):
        assert holdfast("diff", a, tmp_path / other).returncode == 0, other
    save_file({**weights, "l.bias": torch.tensor([1.0, 3.0])}, tmp_path / "c.safetensors")
    model = as_json("diff", a, tmp_path / "c.safetensors", code=1)["models"][0]
    assert [(one["name"], one["changed"], one["largest_change"]) for one in model["modules"]] == [
        ("l", 1, 2.0)
    ]


def of(tmp_path: Path, first: torch.Tensor, second: torch.Tensor) -> compare.Pair:
    a, b = files(tmp_path, {"state_dict": {"w": first}}, {"state_dict": {"w": second}})
    with contents.opened(a) as one, contents.opened(b) as other:
        (pair,) = compare.compare(one, other).pairs
    return pair


BASE = torch.arange(24.0).view(4, 6)


@pytest.mark.parametrize(
    ("first", "second", "changed", "largest"),
    [
        (BASE, BASE.t().contiguous().t(), 0, 0),
        (BASE.t(), BASE.t() + 0.5, 1, 0.5),
        (BASE[:, ::3], BASE[:, ::3].contiguous(), 0, 0),
        (BASE[:, ::3], BASE[:, ::3] * 2, 1, 21),
        (torch.ones(1).expand(50), torch.ones(50), 0, 0),
        (torch.ones(3, dtype=torch.float8_e5m2), torch.zeros(3).to(torch.float8_e5m2), 1, 1),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1),
        (torch.tensor([3 + 4j]), torch.tensor([3 + 0j]), 1, 4),
        (torch.tensor(2, dtype=torch.uint8), torch.tensor(5, dtype=torch.uint8), 1, 3),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse() * 3, 1, 2),
        (torch.eye(3).to_sparse(), torch.eye(3).flip(0).to_sparse(), 1, 0),
        (torch.empty(0), torch.empty(0), 0, 0),
        (torch.empty(3, device="meta"), torch.empty(3, device="meta"), 0, 0),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), 0, 0),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), 0, 0),
    ],
)  # fmt: skip
def test_every_kind_of_tensor(
    tmp_path: Path, first: torch.Tensor, second: torch.Tensor, changed: int, largest: float
) -> None:
    change = of(tmp_path, first, second).change
    assert (change.changed, change.largest) == (changed, largest)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_compressed_sparse_tensors(tmp_path: Path) -> None:
    rows = torch.eye(3).to_sparse_csr()
    assert of(tmp_path, rows, rows.clone()).change.changed == 0
    assert of(tmp_path, rows, (torch.eye(3) * 5).to_sparse_csr()).change.largest == 4


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantised_numbers_differ_with_their_scale(tmp_path: Path) -> None:
    a = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)
    b = torch.quantize_per_tensor(torch.ones(3) * 2, 1.0, 0, torch.qint8)
    assert torch.equal(a.int_repr(), b.int_repr())
    change = of(tmp_path, a, b).change
    assert change.changed == 1
    assert math.isnan(change.relative)
    assert of(tmp_path, a, a.clone()).change.changed == 0


def test_counters_do_not_drown_the_weights(tmp_path: Path) -> None:
    def state(step: int, weight: float) -> dict[str, torch.Tensor]:
        return {"norm.weight": torch.full((4,), weight), "norm.num_batches_tracked": torch.tensor(step)}

    a, b = files(tmp_path, {"state_dict": state(0, 2.0)}, {"state_dict": state(10**6, 3.0)})
    model = as_json("diff", a, b, code=1)["models"][0]
    assert (model["changed"], model["relative_change"], model["largest_change"]) == (2, 0.5, 1.0)


def test_large_tensors_are_compared_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_PIECE_VALUES", 7)
    second = BASE.clone()
    second[3, 5] += 2
    change = of(tmp_path, BASE, second).change
    assert (change.changed, change.squared, change.largest) == (1, 4.0, 2.0)
    assert math.isclose(change.squared_before, float((BASE * BASE).sum()), rel_tol=1e-12)


def test_a_tensor_that_claims_more_than_its_file(tmp_path: Path) -> None:
    """An expanded view of one number: the other file's tensor must not make anybody build it."""
    wide = torch.ones(1).expand(1 << 40)
    torch.save({"state_dict": {"w": wide}}, tmp_path / "a.pt")
    torch.save({"state_dict": {"w": torch.zeros(1).expand(1 << 40)}}, tmp_path / "b.pt")
    ran = holdfast("diff", "a.pt", "b.pt", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "holdfast: a.pt: a tensor reaches beyond the file.\n"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    a = save(tmp_path / "a.ckpt", {"state_dict": {}})
    ran = holdfast("diff", a, tmp_path / "b.ckpt")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert (
        ran.stderr
        == f"holdfast: There is no checkpoint {tmp_path}/b.ckpt. The nearest names there: a.ckpt.\n"
    )


# -- nothing is missed ---------------------------------------------------------------------------------------


def a_nest() -> dict[Any, Any]:
    return {
        "state_dict": {"w": torch.ones(2), "extra": {"scale": 1.5, "deep": [torch.zeros(1), "text"]}},
        "callbacks": {"a": {"best": torch.tensor(0.5), "paths": ("x", None)}},
        "hyper_parameters": {
            "lr": 0.1,
            "options": collections.deque([1, 2]),
            "space": argparse.Namespace(x=1),
        },
        "loops": [{"done": True, 1: "int", "1": "text"}],
        "array": numpy.arange(3),
        7: b"bytes",
        8: {"w": torch.ones(1)},
        "8": {"w": torch.ones(1)},
    }


def bare_nest() -> dict[Any, Any]:
    return {
        "w": torch.ones(2),
        "about": {"scale": 1.5, "list": [1, {"x": torch.zeros(1)}]},
        "note": "text",
        "m": {"x": 1},
    }


def loose_nest() -> list[Any]:
    return [1, {"no": {"tensors": ["at", "all", {2.5: None}]}}]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) whose value is a leaf."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in pairs:
        if isinstance(member, (dict, list, collections.deque, argparse.Namespace)):
            yield from places(member)
        else:
            yield value, key


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("make", [a_nest, bare_nest, loose_nest])
def test_each_leaf_counts(tmp_path: Path, make: Callable[[], Any], ours: bool) -> None:
    """Changed or removed, wherever it is, the files are no longer equal; untouched they are."""

    def write(name: str, payload: Any) -> Path:
        if ours:
            return save(tmp_path / name, payload)
        torch.save(payload, tmp_path / name)
        return tmp_path / name

    first = write("a.ckpt", make())
    assert holdfast("diff", first, write("b.ckpt", make())).returncode == 0
    count = len(list(places(make())))
    assert count > 3
    for index in range(count):
        changed, removed = make(), make()
        container, key = list(places(changed))[index]
        container[key] = "another"
        assert holdfast("diff", first, write("b.ckpt", changed)).returncode == 1, (index, key)
        container, key = list(places(removed))[index]
        del container[key]
        assert holdfast("diff", first, write("b.ckpt", removed)).returncode == 1, (index, key)
        assert holdfast("diff", tmp_path / "b.ckpt", first).returncode == 1, (index, key)
