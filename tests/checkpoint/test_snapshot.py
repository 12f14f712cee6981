"""Whatever happens to a payload after the call, the file is the payload as it was at the call."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moments import LastMoment, equal, holds
from torch import Tensor

from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.checkpoint.planned import TINY_BYTES

LARGE = TINY_BYTES // 4 * 3  # elements of float32


@pytest.fixture
def engine() -> Iterator[CheckpointEngine]:
    engine = CheckpointEngine()
    yield engine
    engine.close()


def overwrite(tensor: Tensor) -> None:
    """Change all its bytes, through whatever holds them."""
    if tensor.layout is torch.sparse_coo:
        overwrite(tensor._values())
        overwrite(tensor._indices())
    elif tensor.layout is not torch.strided:
        overwrite(tensor.values())
    elif not tensor.is_meta and tensor.numel():
        storage = tensor.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage).bitwise_not_()


def base() -> Tensor:
    return torch.randn(LARGE)


KINDS: dict[str, Callable[[], Any]] = {
    "tiny": lambda: torch.randn(3),
    "large": base,
    "scalar": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0, 3),
    "complex": lambda: torch.randn(LARGE, dtype=torch.complex64),
    "bfloat16": lambda: torch.randn(LARGE).bfloat16(),
    "float8": lambda: torch.randn(2 * LARGE).to(torch.float8_e4m3fn),
    "bool": lambda: torch.rand(4 * LARGE) > 0.5,
    "transposed": lambda: torch.randn(80, 90).t(),
    "columns": lambda: torch.randn(90, 300)[:, :30],
    "expanded": lambda: torch.randn(1, LARGE).expand(4, LARGE),
    "channels last": lambda: torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last),
    "conjugate": lambda: torch.randn(LARGE, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(LARGE, dtype=torch.complex64).conj().imag,
    "coo": lambda: torch.eye(90).to_sparse_coo(),
    "csr": lambda: torch.eye(90).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(base(), 0.1, 3, torch.qint8),
    "meta": lambda: torch.empty(LARGE, device="meta"),
    "numpy": lambda: torch.from_numpy(np.random.default_rng(1).random(LARGE)),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_kind_are_as_they_were_at_the_call(
    kind: str, engine: CheckpointEngine, tmp_path: Path
) -> None:
    for number in range(3):  # anew, from a known plan, and once more
        value = KINDS[kind]()
        payload = {"a": value, "again": value, "b": base()}
        moment = {name: tensor.clone() for name, tensor in payload.items()}
        pending = engine.save_in_background(payload, tmp_path / "a.ckpt")
        overwrite(value)
        overwrite(payload["b"])
        payload.clear()
        pending.wait()
        assert holds(tmp_path / "a.ckpt", moment), number


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_kind_may_be_called_late(
    kind: str, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    value, other = KINDS[kind](), base()
    moment = {"a": value.clone(), "b": other.clone()}
    for number in range(3):
        pending = engine.save_in_background(
            {"a": value, "b": other}, tmp_path / f"{number}.ckpt", late=[value, other]
        )
        engine.wait_for_copy()
        pending.wait()
        assert holds(tmp_path / f"{number}.ckpt", moment)
    assert "b" in last_moment.copied[2]


def test_one_memory_under_two_arrays_is_as_it_was(engine: CheckpointEngine, tmp_path: Path) -> None:
    array = np.arange(4.0 * LARGE)
    tensor, part = torch.from_numpy(array), torch.from_numpy(array[: 2 * LARGE])
    late = [tensor]
    for number in range(4):
        payload = {"array": array, "tensor": tensor, "part": part}
        moment = copy.deepcopy(payload)
        pending = engine.save_in_background(payload, tmp_path / f"{number}.ckpt", late=late)
        engine.wait_for_copy()
        array += 1
        pending.wait()
        loaded = load(tmp_path / f"{number}.ckpt")
        assert equal(loaded, moment)


def test_what_shares_memory_is_late_only_if_all_of_it_is(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    whole, alone = torch.randn(2 * LARGE), base()
    part = whole[LARGE:]
    payload = {"whole": whole, "part": part, "alone": alone}
    for _ in range(3):
        engine.save_in_background(payload, tmp_path / "a.ckpt", late=[whole, alone])
        engine.wait_for_copy()
    moment = copy.deepcopy(payload)
    pending = engine.save_in_background(payload, tmp_path / "a.ckpt", late=[whole, alone])
    part.zero_()  # it was not promised to stay as it is
    engine.wait_for_copy()
    pending.wait()
    assert holds(tmp_path / "a.ckpt", moment)
    assert last_moment.copied[-1] == {"alone"}
    for _ in range(3):
        engine.save_in_background(payload, tmp_path / "a.ckpt", late=[whole, part, alone])
        engine.wait_for_copy()
    engine.wait()
    assert last_moment.copied[-1] == {"whole", "alone"}


def test_a_name_that_is_new_earns_trust_of_its_own(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    tensors = {"a": base()}

    def save() -> None:
        engine.save_in_background(dict(tensors), tmp_path / "a.ckpt", late=list(tensors.values()))
        engine.wait_for_copy()

    for _ in range(3):
        save()
    tensors["b"] = base()
    tensors["a"] = base()  # another memory under a name that is known
    for _ in range(3):
        save()
    engine.wait()
    assert last_moment.copied == [set(), set(), {"a"}, {"a"}, {"a"}, {"a", "b"}]


@pytest.mark.parametrize("early", ["said", "another thread's"])
def test_waiting_before_anything_can_have_changed_earns_no_trust(
    early: str, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    value = base()
    for _ in range(4):
        engine.save_in_background({"a": value}, tmp_path / "a.ckpt", late=[value])
        if early == "said":
            engine.wait_for_copy(learn=False)
        else:
            thread = threading.Thread(target=engine.wait_for_copy)
            thread.start()
            thread.join()
        assert not engine.copying
    engine.wait()
    assert last_moment.copied == [set()] * 4


def test_trust_ends_where_the_engine_is_closed(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes next may be another model, whose tensors are called the same."""
    last_moment = LastMoment(monkeypatch)
    for _ in range(2):
        value = base()
        for _ in range(3):
            engine.save_in_background({"a": value}, tmp_path / "a.ckpt", late=[value])
            engine.wait_for_copy()
        engine.close()
    assert last_moment.copied == [set(), set(), {"a"}] * 2


def test_without_a_wait_between_saves_nothing_is_learnt(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    value = base()
    for number in range(4):
        moment = value.clone()
        engine.save_in_background({"a": value}, tmp_path / "a.ckpt", late=[value]).wait()
        assert holds(tmp_path / "a.ckpt", {"a": moment}), number
        value += 1
    assert last_moment.copied == [set()] * 4


def test_late_tensors_that_are_not_in_the_payload_do_no_harm(
    engine: CheckpointEngine, tmp_path: Path
) -> None:
    with torch.inference_mode():
        uncounted = base()
    strangers = [
        base(),
        torch.empty(0),
        torch.eye(3).to_sparse_coo(),
        torch.empty(3, device="meta"),
        uncounted,
    ]
    for _ in range(4):
        engine.save_in_background({"a": uncounted, "b": 1}, tmp_path / "a.ckpt", late=strangers)
        engine.wait_for_copy()
    engine.wait()
    assert holds(tmp_path / "a.ckpt", {"a": uncounted, "b": 1})


def test_memory_of_what_was_replaced_is_let_go_of(engine: CheckpointEngine, tmp_path: Path) -> None:
    kept = base()
    for number in range(4):
        gone = torch.randn(LARGE)
        payload = {"kept": kept, "gone": gone}
        if number % 2:
            payload["sparse"] = gone.view(-1, 4).to_sparse_coo()
        alive = [weakref.ref(value) for name, value in payload.items() if name != "kept"]
        pending = engine.save_in_background(payload, tmp_path / "a.ckpt", late=[kept, gone])
        engine.wait_for_copy()
        del gone, payload
        pending.wait()
        gc.collect()
        assert [one() for one in alive] == [None] * len(alive), number


# --- anything, nested -------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 5, 40]), max_size=3))
    tensor = (torch.rand(shape) * 100).to(draw(st.sampled_from(DTYPES)))
    if tensor.dim() >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[: max(1, tensor.shape[0] // 2)]
    return tensor


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(
    plain | tensors(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def spoil(value: Any) -> None:
    if isinstance(value, Tensor):
        overwrite(value)
    elif isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value.clear()
    elif isinstance(value, list):
        for item in value:
            spoil(item)
        value.append("spoilt")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=nested, shared=st.booleans())
def test_anything_nested_may_be_changed_right_after_the_call(
    value: Any, shared: bool, engine: CheckpointEngine, tmp_path: Path
) -> None:
    payload = {"value": value, "again": value if shared else None}
    moment = copy.deepcopy(payload)
    pending = engine.save_in_background(payload, tmp_path / "a.ckpt")
    spoil(payload)
    pending.wait()
    assert holds(tmp_path / "a.ckpt", moment)
