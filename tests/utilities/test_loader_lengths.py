"""What can be told of a loader from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from holdfast.utilities.data import has_iterable_dataset, has_len_all_ranks, sized_len
from tests.training.toys import rows, trainer


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(3))


class TwoProcesses:
    """Answers as if another process had a loader of another length."""

    root_device = torch.device("cpu")

    def __init__(self, length_there: int) -> None:
        self.length_there = length_there

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        assert reduce_op == "sum"
        return tensor + self.length_there


def test_lengths() -> None:
    strategy = trainer().strategy
    assert sized_len(rows()) == 3
    assert has_len_all_ranks(rows(), strategy)
    for endless in (DataLoader(Stream()), iter([1])):
        assert sized_len(endless) is None
        assert not has_len_all_ranks(endless, strategy)
    assert has_iterable_dataset(DataLoader(Stream()))
    assert not has_iterable_dataset(rows())


def test_an_empty_loader_is_said() -> None:
    with pytest.warns(UserWarning, match="^The DataLoader has no batches: its length is 0.$"):
        assert has_len_all_ranks(rows(0), trainer().strategy)


def test_a_loader_that_is_empty_here_alone() -> None:
    with pytest.raises(RuntimeError) as refused:
        has_len_all_ranks(rows(0), TwoProcesses(3))
    assert str(refused.value) == (
        "The DataLoader is empty on this process but not on others, which would then wait for it. Give every "
        "process data."
    )
    assert not has_len_all_ranks(rows(0), TwoProcesses(3), True)
    assert has_len_all_ranks(rows(), TwoProcesses(0))
