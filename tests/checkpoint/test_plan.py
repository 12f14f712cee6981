"""A plan is made once and used again while tensors stay where they are, and never when they do not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.checkpoint import payload, pickling
from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.tensors import Plan, Record, memory

Named = list[tuple[str, Tensor]]


def named(state: dict[str, Any]) -> Named:
    return payload.encode(state).tensors


def bytes_of(record: Record) -> bytes:
    into = torch.empty(record.length, dtype=torch.uint8)
    record.copy_to(into.data_ptr())
    return into.numpy().tobytes()


def state_of_every_kind() -> dict[str, Any]:
    base = torch.arange(100.0)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    return {
        "weight": weight,
        "tied": weight,
        "view": base[10:20],
        "base": base,
        "gap": torch.arange(4000.0).view(100, 40)[:, ::7],
        "empty": torch.empty(0, 3),
        "meta": torch.empty(3, device="meta"),
        "mixed": base.view(torch.uint8)[3:77],
        "half": torch.randn(5).to(torch.bfloat16),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
    }


def test_a_plan_goes_on_to_new_tensors_in_the_old_places() -> None:
    state = state_of_every_kind()
    state.pop("conj")  # its plain form is a new tensor each time
    first = payload.encode(state)
    plan = Plan(first.tensors)
    plan.sign()
    pickled = pickling.dumps(first.tree, plan)
    places = Layout(plan.records).entries
    plan.release()
    state["weight"].data.add_(1)
    state["base"][12] = -7
    state["gap"].mul_(2)
    second = payload.encode(state)
    del first
    assert plan.rebind(second.tensors)
    assert pickling.dumps(second.tree, plan) == pickled
    assert Layout(plan.records).entries == places
    fresh = Plan(second.tensors)
    assert [bytes_of(record) for record in plan.records] == [bytes_of(record) for record in fresh.records]


def there(tensor: Tensor) -> Tensor:
    """The same memory as a storage that begins with it."""
    found = torch.frombuffer(memory(tensor.data_ptr(), tensor.nbytes, writable=True), dtype=tensor.dtype)
    assert found.data_ptr() == tensor.data_ptr() and found.storage_offset() == 0
    return found


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "data replaced": lambda s: setattr(s["a"], "data", torch.zeros(6, 4)),
    "set_": lambda s: s["b"].set_(torch.zeros(9)),
    "resized": lambda s: s["b"].resize_(3),
    "another shape": lambda s: s.update(a=s["a"].detach().view(4, 6)),
    "another stride": lambda s: s.update(a=s["a"].detach().as_strided((6, 4), (1, 6))),
    "another storage there": lambda s: s.update(part=there(s["part"])),
    "another dtype": lambda s: s.update(b=s["b"].view(torch.int32)),
    "another name": lambda s: s.update(c=s.pop("b")),
    "another order": lambda s: s.update(a=s.pop("a")),
    "one more": lambda s: s.update(c=torch.ones(1)),
    "one less": lambda s: s.pop("b"),
    "sparse": lambda s: s.update(b=torch.eye(3).to_sparse()),
    "meta": lambda s: s.update(b=s["b"].to("meta")),
    "no longer tied": lambda s: s.update(tied=s["b"].clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_is_not_used_again_after(change: str) -> None:
    state: dict[str, Tensor] = {"a": torch.nn.Parameter(torch.ones(6, 4)), "b": torch.ones(9)}
    state["tied"] = state["b"]
    state["part"] = torch.ones(12)[4:]
    plan = Plan(named(state))
    assert not plan.rebind(named(state))  # it was not signed
    plan.sign()
    assert plan.rebind(named(state))
    kept = dict(state)  # so that no memory is used again for something else
    with torch.no_grad():
        CHANGES[change](state)
    assert not plan.rebind(named(state))
    assert kept


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_plans_of_tensors_with_parts_are_made_anew() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)):
        plan = Plan(named({"w": tensor}))
        plan.sign()
        assert not plan.rebind(named({"w": tensor}))
        plan.release()
        assert not plan.rebind(named({"w": tensor}))


def test_a_released_plan_keeps_no_tensor_and_no_memory_alive() -> None:
    tensor = torch.ones(1000)
    storage = weakref.ref(tensor.untyped_storage())
    plan = Plan(named({"w": tensor, "strided": tensor[::5]}))
    plan.release()
    assert storage() is not None
    del tensor
    assert storage() is None


def test_each_record_says_where_its_bytes_are() -> None:
    state = state_of_every_kind()
    plan = Plan(named(state))
    by_name = {span.name: record for record in plan.records for span in record.spans}
    assert by_name["weight"] is by_name["tied"]
    assert by_name["view"] is by_name["base"] is by_name["mixed"]
    assert by_name["gap"].dense and by_name["gap"].address is None
    assert "meta" not in by_name
    weight = by_name["weight"]
    assert weight.address == state["weight"].data_ptr() and weight.length == 64
    assert bytes(memory(weight.address, weight.length)) == state["weight"].detach().numpy().tobytes()
    assert bytes(weight.run().numpy()) == bytes(memory(weight.address, weight.length))
    assert bytes_of(by_name["gap"]) == state["gap"].contiguous().numpy().tobytes()
    assert bytes_of(by_name["empty"]) == b""


def test_what_becomes_of_the_original_does_not_reach_what_was_encoded() -> None:
    parameter, buffer = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    tree = payload.encode({"p": parameter, "b": buffer}).tree
    assert tree["b"] is not buffer and tree["b"].data_ptr() == buffer.data_ptr()
    parameter.data = torch.zeros(5)
    buffer.set_(torch.zeros(7))
    assert tree["p"].tolist() == tree["b"].tolist() == [1, 1, 1]
