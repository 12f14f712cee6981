"""What is saved comes back: equal, of its exact type, and as the nearest plain value through torch.load."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import types
import uuid
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.checkpoint import exact
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.payload import MAX_DEPTH, encode
from holdfast.errors import CheckpointIncompatible


class Colour(enum.Enum):
    RED = "red"


class Level(str, enum.Enum):
    HIGH = "high"


@dataclasses.dataclass
class Settings:
    width: int
    path: pathlib.Path


class Raising(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise RuntimeError("not now")


class Point(NamedTuple):
    x: int
    y: torch.Tensor


def same(a: Any, b: Any) -> bool:
    """Equal in value and exact type, all the way down; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.layout is not torch.strided:
            return a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (argparse.Namespace, types.SimpleNamespace)):
        return same(vars(a), vars(b))
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    return bool(a == b) or (a != a and b != b)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def saved(payload: Any, tmp_path: Path, name: str = "a.ckpt") -> Path:
    CheckpointEngine().save(payload, tmp_path / name)
    return tmp_path / name


def there_and_back(value: Any, tmp_path: Path) -> Any:
    return load(saved({"value": value}, tmp_path))["value"]


PLAIN = [
    None, True, 0, -1, 2**31, -(2**63), 2**2000, 2**5000, 1.5, float("nan"), float("inf"), -0.0, 1 + 2j, "", "text",
    "sl/ash~", "\ud800", b"", b"\x00\xff", bytearray(), bytearray(b"ab"), (), (1, (2,)), [], [[]], {}, {1: {2: 3}},
    {None: 1, True: 2, 1.5: 3, (1, "a"): 4}, set(), {1, 2}, {("a", 1)}, torch.float32, torch.device("cpu"),
    torch.device("cuda", 1), torch.Size([2, 3]), torch.sparse_coo, collections.OrderedDict(b=1, a=2),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:30])
def test_plain_values_come_back_as_they_are(value: Any, tmp_path: Path) -> None:
    assert same(there_and_back(value, tmp_path), value)
    torch.load(tmp_path / "a.ckpt", weights_only=True)  # raises for what is not on its list


EXACT = [
    (argparse.Namespace(a=1, b=[pathlib.Path("x")]), {"a": 1, "b": ["x"]}),
    (types.SimpleNamespace(a=1), {"a": 1}),
    (pathlib.Path("/data/x"), "/data/x"),
    (pathlib.PureWindowsPath("c:/x"), "c:\\x"),
    (datetime.datetime(2024, 2, 29, 1, 2, 3, 4, datetime.timezone.utc), "2024-02-29T01:02:03.000004+00:00"),
    (datetime.date(2024, 2, 29), "2024-02-29"),
    (datetime.time(1, 2), "01:02:00"),
    (datetime.timedelta(days=-1, microseconds=7), -86399.999993),
    (datetime.timezone(datetime.timedelta(hours=2)), 7200.0),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    (decimal.Decimal("1.10"), "1.10"),
    (fractions.Fraction(1, 3), "1/3"),
    (collections.defaultdict(list, {1: [2]}), {1: [2]}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (collections.deque([1, pathlib.Path("x")], 5), [1, "x"]),
    (frozenset({1}), {1}),
    ({frozenset({1}), frozenset({2})}, None),
    (range(1, 10, 3), (1, 10, 3)),
    (slice(None, 3), (None, 3, None)),
    (torch.channels_last, "channels_last"),
    (np.float32(1.5), 1.5),
    (np.int64(-3), -3),
    (np.bool_(True), True),
    (np.datetime64("2024-01-02"), "2024-01-02"),
    ((pathlib.Path("a"), [pathlib.Path("b")], {"c": (pathlib.Path("d"),)}), ("a", ["b"], {"c": ("d",)})),
]


@pytest.mark.parametrize("value, plain", EXACT, ids=lambda value: repr(value)[:30])
def test_exact_types_come_back_and_torch_load_sees_the_plain_value(
    value: Any, plain: Any, tmp_path: Path
) -> None:
    assert same(there_and_back(value, tmp_path), value)
    seen = torch.load(tmp_path / "a.ckpt", weights_only=True)["value"]
    if plain is not None:
        assert same(seen, plain)


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.array(2.5), np.zeros((0, 3), np.int8), np.array([True, False]),
    np.arange(4, dtype=">i4"), np.arange(6).reshape(2, 3)[:, ::-1], np.asfortranarray(np.ones((2, 3))),
    np.array(["a", "bcd"]), np.array([b"x"]), np.array(["2024-01-02"], "M8[D]"), np.array([1, 2], np.uint64),
    np.array([1 + 2j]), np.array([1.5], np.float16), np.array([1.5], np.longdouble),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_numpy_arrays_come_back_with_their_dtype(array: Any, tmp_path: Path) -> None:
    assert same(there_and_back(array, tmp_path), array)
    assert isinstance(torch.load(tmp_path / "a.ckpt", weights_only=True)["value"], torch.Tensor)


def test_random_state_of_numpy_and_python_can_be_set_again(tmp_path: Path) -> None:
    import random

    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    back = load(saved(state, tmp_path))
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    torch.set_rng_state(back["torch"])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


@pytest.mark.parametrize(
    "dtype",
    sorted(
        {value for value in vars(torch).values() if isinstance(value, torch.dtype) and value.itemsize}
        - {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4},
        key=str,
    ),
    ids=str,
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    try:
        tensor = torch.arange(48, dtype=torch.uint8).view(dtype).view(3, -1)
    except RuntimeError:
        tensor = (
            torch.zeros(3, dtype=torch.uint8).bool() if dtype is torch.bool else torch.empty(3, dtype=dtype)
        )
    for loaded in (
        there_and_back(tensor, tmp_path),
        torch.load(tmp_path / "a.ckpt", weights_only=True)["value"],
        torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True)["value"],
    ):
        assert loaded.dtype == dtype
        assert loaded.shape == tensor.shape
        assert loaded.untyped_storage().tolist() == tensor.untyped_storage().tolist()


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "transposed": torch.randn(3, 4).t(),
            "column": torch.randn(100, 50)[:, 3],
            "expanded": torch.ones(1).expand(1000),
            "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
            "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
            "coo": torch.eye(4).to_sparse(),
            "csr": torch.eye(4).to_sparse_csr(),
            "csc": torch.eye(4).to_sparse_csc(),
            "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
            "offset": torch.arange(10)[3:7],
        }


@pytest.mark.parametrize("name", odd_tensors())
@pytest.mark.filterwarnings("ignore:Sparse")
def test_odd_tensors_come_back(name: str, tmp_path: Path) -> None:
    tensor = odd_tensors()[name]
    expected = tensor.clone()
    back = there_and_back(tensor, tmp_path)
    assert same(back, expected)
    assert same(torch.load(tmp_path / "a.ckpt", weights_only=True)["value"], expected)
    if name in ("transposed", "channels last"):
        assert back.stride() == tensor.stride()


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_meta_tensors_come_back(tmp_path: Path) -> None:
    plain = torch.randn(4, 3)
    tensors = {
        "tensor": torch.quantize_per_tensor(plain, 0.1, 3, torch.quint8),
        "channel": torch.quantize_per_channel(
            plain, torch.rand(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), 0, torch.qint8
        ),
    }
    back = load(saved({**tensors, "meta": torch.empty(3, 4, device="meta")}, tmp_path))
    through_torch = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, tensor in tensors.items():
        for found in (back[name], through_torch[name]):
            assert torch.equal(found.int_repr(), tensor.int_repr())
            assert torch.equal(found.dequantize(), tensor.dequantize())
    assert back["meta"].is_meta and back["meta"].shape == (3, 4)


def test_parameters_and_plain_subclasses_become_plain_tensors_and_stay_tied(tmp_path: Path) -> None:
    class Tagged(torch.Tensor):
        pass

    weight = torch.nn.Parameter(torch.randn(3))
    back = load(saved({"a": weight, "b": weight, "c": torch.ones(2).as_subclass(Tagged)}, tmp_path))
    assert type(back["a"]) is torch.Tensor and not back["a"].requires_grad
    assert torch.equal(back["a"], weight.detach())
    assert back["a"].data_ptr() == back["b"].data_ptr()
    assert type(back["c"]) is torch.Tensor


def test_a_module_comes_back_with_the_versions_that_loading_goes_by(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    back = load(saved({"state_dict": state}, tmp_path))["state_dict"]
    assert same(back, state)
    assert back._metadata == state._metadata
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]._metadata == state._metadata


def test_shared_memory_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    base = torch.randn(1000, 100)
    payload = {"whole": base, "row": base[3], "bits": base.view(torch.int32), "again": [base]}
    path = saved(payload, tmp_path)
    assert path.stat().st_size < base.nbytes + 20_000
    for back in (load(path), torch.load(path, weights_only=True)):
        assert torch.equal(back["whole"], base)
        back["row"].fill_(7.0)
        assert (back["whole"][3] == 7.0).all()
        assert (back["bits"][3] == torch.tensor(7.0).view(torch.int32)).all()
        assert back["again"][0].data_ptr() == back["whole"].data_ptr()


def test_a_small_view_of_a_large_buffer_is_stored_small(tmp_path: Path) -> None:
    large = torch.randn(1_000_000)
    path = saved(
        {"a": large[10:20], "b": large[500_000:500_010], "c": large.view(1000, 1000)[:, 5]}, tmp_path
    )
    assert path.stat().st_size < 5_000_000
    path = saved({"a": large[10:20], "b": large[500_000:500_010]}, tmp_path)
    assert path.stat().st_size < 10_000
    back = load(path)
    assert torch.equal(back["a"], large[10:20]) and torch.equal(back["b"], large[500_000:500_010])
    path = saved({"c": large.view(1000, 1000)[:, 5]}, tmp_path)
    assert path.stat().st_size < 10_000
    assert torch.equal(load(path)["c"], large.view(1000, 1000)[:, 5])


def test_shared_containers_stay_shared(tmp_path: Path) -> None:
    common = [pathlib.Path("x"), torch.ones(2)]
    back = load(saved({"a": common, "b": {"c": common}, "d": (common, common)}, tmp_path))
    assert same(back["a"], common)
    assert back["a"] is back["b"]["c"] is back["d"][0] is back["d"][1]


def test_every_unstorable_value_is_left_out_and_named(tmp_path: Path) -> None:
    looped: list[Any] = [1]
    looped.append(looped)
    deep: Any = 0
    for _ in range(MAX_DEPTH + 20):
        deep = [deep]
    nested: Any = frozenset()
    for _ in range(2 * MAX_DEPTH):
        nested = frozenset([nested])
    payload = {
        "keep": torch.ones(2),
        "f": max,
        "cls": dict,
        "list": [1, open, 3],
        "lock": __import__("threading").Lock(),
        "generator": torch.Generator(),
        "looped": looped,
        "deep": deep,
        "objects": np.array([object()]),
        "keys": {object(): 1, "ok": 2},
        "freed": torch.ones(4),
        "factory": collections.defaultdict(lambda: 1, {1: 2}),
        "raising": Raising(),
        "nested set": nested,
        "lazy": torch.nn.parameter.UninitializedParameter(),
    }
    payload["freed"].untyped_storage().resize_(0)
    report = CheckpointEngine().save(payload, tmp_path / "a.ckpt")
    back = load(tmp_path / "a.ckpt")
    assert set(back) == {"keep", "list", "looped", "deep", "keys", "factory", "nested set"}
    assert back["list"] == [1, None, 3]
    assert back["looped"] == [1, None]
    assert back["keys"] == {"ok": 2}
    assert back["factory"] == {1: 2}
    deepest = "/".join(["deep", *["0"] * (MAX_DEPTH - 1)])
    assert report.omissions == [
        ("f", "a function (max) cannot be stored"),
        ("cls", "a class (builtins.dict) cannot be stored"),
        ("list/1", "a function (open) cannot be stored"),
        ("lock", "a value of type _thread.lock cannot be stored"),
        ("generator", "a generator cannot be stored; store its get_state()"),
        ("looped/1", "it contains itself"),
        (deepest, f"it is nested more than {MAX_DEPTH} levels deep"),
        ("objects", "a NumPy array of dtype object cannot be stored"),
        ("keys/object", "a key of type builtins.object cannot be stored"),
        ("freed", "its memory has been freed, or was never allocated"),
        ("factory/default_factory", "the factory is not a built-in type; this comes back as a dict"),
        ("raising", f"reading a {exact.type_name(Raising)} raised RuntimeError('not now')"),
        (
            "/".join(["nested set", *["0"] * (MAX_DEPTH - 1)]),
            f"it is nested more than {MAX_DEPTH} levels deep",
        ),
        ("lazy", "it has not been initialised yet"),
    ]


def test_subclasses_of_plain_types_become_plain(tmp_path: Path) -> None:
    class Count(int):
        def __str__(self) -> str:
            return "many"

    class Name(str):
        def __str__(self) -> str:
            return "another"

    class Table(dict):  # type: ignore[type-arg]
        pass

    value = [Count(3), Name("n"), Table(a=1), np.str_("s"), {Count(4): Name("k")}]
    assert same(there_and_back(value, tmp_path), [3, "n", {"a": 1}, "s", {4: "k"}])


def test_users_types_come_back_only_where_the_reader_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = [Colour.RED, Level.HIGH, Settings(3, pathlib.Path("x")), Point(1, torch.ones(1))]
    monkeypatch.setattr(exact, "_allowed", {})
    plain = there_and_back(value, tmp_path)
    assert same(plain, ["red", "high", {"width": 3, "path": pathlib.Path("x")}, (1, torch.ones(1))])
    exact.allow_types(Colour, Level, Settings, Point)
    assert same(load(tmp_path / "a.ckpt")["value"], value)
    with pytest.raises(
        TypeError, match="allow_types takes enums, dataclasses and namedtuples, not <class 'int'>"
    ):
        exact.allow_types(int)


def test_omegaconf_comes_back_where_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is optional, so one with its four names stands in for it."""

    class DictConfig:
        def __init__(self, content: Any) -> None:
            self.content = content

    class ListConfig(DictConfig):
        pass

    class OmegaConf:
        create = staticmethod(DictConfig)

        @staticmethod
        def to_container(config: DictConfig, resolve: bool) -> Any:
            assert resolve is False  # interpolations stay as they were written
            return config.content

    module = types.ModuleType("omegaconf")
    vars(module).update(DictConfig=DictConfig, ListConfig=ListConfig, OmegaConf=OmegaConf)
    monkeypatch.setitem(__import__("sys").modules, "omegaconf", module)
    back = there_and_back(DictConfig({"a": "${b}"}), tmp_path)
    assert type(back) is DictConfig and back.content == {"a": "${b}"}
    monkeypatch.delitem(__import__("sys").modules, "omegaconf")
    assert load(tmp_path / "a.ckpt")["value"] == {"a": "${b}"}


def test_skipped_keys_are_left_out_and_what_they_share_is_not(tmp_path: Path) -> None:
    shared = torch.ones(3)
    common = [torch.full((2,), 5.0), pathlib.Path("x")]
    payload = {
        "state_dict": {"w": shared},
        "optimizer_states": [{"m": torch.zeros(1000), "w": shared, "array": np.arange(3)}, common],
        "a": {"b": torch.ones(1)},
        "a/b": {"c": torch.full((1,), 2.0)},
        "last": common,
    }
    path = saved(payload, tmp_path)
    back = load(path, skip=("optimizer_states", "a"))
    assert set(back) == {"state_dict", "a/b", "last"}
    assert torch.equal(back["state_dict"]["w"], shared)
    assert torch.equal(back["a/b"]["c"], payload["a/b"]["c"])
    assert same(back["last"], common)


MORE_EXACT = [
    np.timedelta64(5, "s"), np.timedelta64(5), np.timedelta64("NaT", "s"), np.datetime64("NaT"),
    np.datetime64("2020-01-01T00:00:01.5", "ns"), datetime.timezone(datetime.timedelta(hours=1), "X"), range(2**3000),
    {(2**3000,), 2**3000}, slice(2**3000, None),
]  # fmt: skip


@pytest.mark.parametrize("value", MORE_EXACT, ids=lambda value: repr(value)[:30])
def test_more_values_come_back_and_open_in_torch(value: Any, tmp_path: Path) -> None:
    back = there_and_back(value, tmp_path)
    assert type(back) is type(value) and repr(back) == repr(value)
    torch.load(tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("value", [datetime.datetime(2020, 7, 1, fold=1), datetime.time(1, fold=1)], ids=repr)
def test_a_time_told_twice_comes_back_as_the_second(value: Any, tmp_path: Path) -> None:
    assert repr(there_and_back(value, tmp_path)) == repr(value)


def test_a_time_that_the_base_class_cannot_read_comes_back_as_text(tmp_path: Path) -> None:
    """As pandas writes them."""

    class Never(datetime.datetime):
        def isoformat(self, *args: Any) -> str:
            return "NaT"

    class Fine(datetime.datetime):
        def isoformat(self, *args: Any) -> str:
            return super().isoformat(*args) + "789"

    class Same(datetime.datetime):
        pass

    value = [Never(2020, 1, 1), Fine(2020, 1, 1, 1, 1, 1, 5), Same(2020, 1, 1)]
    assert same(
        there_and_back(value, tmp_path),
        ["NaT", "2020-01-01T01:01:01.000005789", datetime.datetime(2020, 1, 1)],
    )


def test_no_value_stops_the_rest(tmp_path: Path) -> None:
    class Unkind:
        @property
        def item(self) -> Any:
            raise RuntimeError("x")

    class Worse:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise RuntimeError("y")

    class Silent(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("z")

    class Mute(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise Silent

    class Alike(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    shared = [pathlib.Path("x"), torch.ones(10_000)]

    class Torn(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            yield "a", shared
            raise RuntimeError("torn")

    payload = {
        "fraction": fractions.Fraction(10**5000, 3),
        "keys": {Unkind(): 1, Worse(): 2, 2**3000: 3, "ok": 4},
        "mute": Mute(),
        "torn": Torn(),
        "alike": {Alike("k"): pathlib.Path("1"), "k": 2, "l": pathlib.Path("3")},
        "shared": shared,
    }
    report = CheckpointEngine().save(payload, tmp_path / "a.ckpt")
    back = load(tmp_path / "a.ckpt")
    assert same(back.pop("shared"), shared)
    assert same(back.pop("alike"), {"k": pathlib.Path("1"), "l": pathlib.Path("3")})
    assert same(back, {"keys": {"ok": 4}})
    assert report.omissions[0][0] == "fraction"
    assert report.omissions[0][1].startswith("reading a fractions.Fraction raised ValueError(")
    assert report.omissions[1:] == [
        ("keys/Unkind", f"a key of type {exact.type_name(Unkind)} cannot be stored"),
        ("keys/Worse", f"reading a key of type {exact.type_name(Worse)} raised RuntimeError('y')"),
        ("keys/int", "a whole number of 3001 bits cannot be stored as a key"),
        ("mute", "reading it raised an error that cannot be shown"),
        ("torn", f"reading a {exact.type_name(Torn)} raised RuntimeError('torn')"),
        ("alike/k", "another key has the same plain value"),
    ]
    assert len(encode(payload).tensors) == 1
    torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_running_out_of_memory_is_an_error_and_no_omission() -> None:
    class Large(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        encode({"a": Large()})


@pytest.mark.parametrize(
    "leaf", [torch.ones(3), np.ones(3), torch.eye(3).to_sparse()], ids=["tensor", "array", "sparse"]
)
def test_what_is_reached_from_a_kept_key_is_read(leaf: Any, tmp_path: Path) -> None:
    inner = {"leaf": leaf}
    outer = {"inner": inner, "path": pathlib.Path("x")}
    path = saved({"a": {"inner": inner, "outer": outer}, "b": outer, 1: leaf}, tmp_path)
    back = load(path, skip={"a", "1"})
    assert same(back, {"b": outer, 1: leaf})
    assert same(load(path, skip={"a", "b"}), {1: leaf})
    assert same(load(path, skip={1}), {"a": {"inner": inner, "outer": outer}, "b": outer})
    assert same(load(saved([leaf], tmp_path), skip={"0"}), [leaf])
    assert same(
        load(saved(argparse.Namespace(a=leaf, b=leaf), tmp_path), skip={"a"}), argparse.Namespace(b=leaf)
    )


def test_what_is_skipped_is_not_moved(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path)
    moved: list[int] = []

    def move(storage: Any, location: str) -> Any:
        moved.append(storage.nbytes())
        return storage

    assert list(load(path, map_location=move, skip={"a"})) == ["b"]
    assert moved == [12]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("form", ["holdfast", "zip", "legacy"])
def test_a_device_that_is_not_there_is_not_the_files_fault(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    if form == "holdfast":
        saved({"w": torch.ones(3)}, tmp_path)
    else:
        torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointIncompatible) as caught:
        load(path, map_location="cuda:0")
    assert isinstance(caught.value, RuntimeError)
    assert str(caught.value) == (
        "The tensors of a.ckpt were saved on cpu and cannot be loaded with map_location='cuda:0': "
        f'{caught.value.__cause__}\nTo load them anywhere: map_location="cpu".'
    )


def test_map_location_decides_where_tensors_go(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(3)}, tmp_path)
    assert load(path, map_location="meta")["w"].is_meta
    assert load(path, map_location=None)["w"].device == torch.device("cpu")
    assert load(path, map_location={"cpu": "meta"})["w"].is_meta
    assert load(path, map_location=lambda storage, location: storage)["w"].tolist() == [1, 1, 1]


def test_a_save_is_a_point_in_time(tmp_path: Path) -> None:
    payload = {"w": torch.zeros(100_000), "n": [1]}
    path = saved(payload, tmp_path)
    payload["w"].add_(1)
    payload["n"].append(2)
    assert load(path)["w"].sum() == 0
    assert load(path)["n"] == [1]


def test_loaded_tensors_do_not_refer_to_the_file(tmp_path: Path) -> None:
    path = saved({"w": torch.arange(100_000)}, tmp_path)
    back = load(path)
    path.write_bytes(b"")
    assert torch.equal(back["w"], torch.arange(100_000))


def test_encode_leaves_the_payload_as_it_was() -> None:
    payload = {"a": [pathlib.Path("x"), {"b": np.arange(2)}], "t": torch.ones(1, requires_grad=True)}
    encoded = encode(payload)
    assert payload["a"][0] == pathlib.Path("x")  # type: ignore[index]
    assert isinstance(payload["a"][1]["b"], np.ndarray)  # type: ignore[index]
    assert payload["t"].requires_grad  # type: ignore[union-attr]
    assert [name for name, _ in encoded.tensors] == ["a/1/b", "t"]
    assert encoded.tensors[1][1].data_ptr() == payload["t"].data_ptr()  # type: ignore[union-attr]


@st.composite
def small_tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint16]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return torch.randint(0, 2, shape).to(dtype)


KEYS = (
    st.text(max_size=5)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(), st.text(max_size=2))
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=8)
    | small_tensors()
    | st.sets(st.integers(), max_size=3)
    | st.builds(pathlib.Path, st.text("abc/", min_size=1, max_size=5))
    | st.frozensets(st.text(max_size=3), max_size=3)
    | st.datetimes()
    | st.timedeltas()
)
PAYLOADS = st.recursive(
    LEAVES,
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.dictionaries(KEYS, inside, max_size=4)
        | st.tuples(inside, inside)
        | st.dictionaries(st.text("abc", min_size=1, max_size=3), inside, max_size=3).map(
            lambda values: argparse.Namespace(**values)
        )
    ),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=PAYLOADS)
def test_any_payload_comes_back_equal_and_opens_in_torch(payload: Any, tmp_path: Path) -> None:
    path = saved(payload, tmp_path)
    assert same(load(path), payload)
    plain = encode(payload).tree
    assert same(torch.load(path, weights_only=True), plain)
    assert same(torch.load(path, weights_only=True, mmap=True), plain)
