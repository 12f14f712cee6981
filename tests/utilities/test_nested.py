"""Batches in any nesting, moved and changed value by value."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from holdfast.utilities.nested import mapped, move_to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: object
    y: object


def test_containers_keep_their_types() -> None:
    data = OrderedDict(a=[1, (2, "text")], b=Pair(3, {"c": 4}))
    doubled = mapped(data, lambda value: value * 2)
    assert doubled == OrderedDict(a=[2, (4, "texttext")], b=Pair(6, {"c": 8}))
    assert (type(doubled), type(doubled["b"])) == (OrderedDict, Pair)


def test_a_dict_that_is_made_in_another_way() -> None:
    data = defaultdict(list, a=1)
    changed = mapped(data, str)
    assert (changed["a"], changed["b"], dict(data)) == ("1", [], {"a": 1})


def test_every_tensor_is_moved_and_nothing_else() -> None:
    batch = {"a": [torch.zeros(1)], "b": (torch.ones(1), "text"), "c": None}
    moved = move_to_device(batch, META)
    assert (moved["a"][0].device, moved["b"][0].device) == (META, META)
    assert (moved["b"][1], moved["c"]) == ("text", None)


def test_a_container_that_moves_itself_does() -> None:
    """A PackedSequence is a tuple, and one of its tensors has to stay on the CPU."""
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_to_device([packed], META)[0]
    assert isinstance(moved, PackedSequence)
    assert (moved.data.device, moved.batch_sizes.device) == (META, torch.device("cpu"))
