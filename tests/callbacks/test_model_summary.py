"""The table of the model's parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from holdfast.callbacks import ModelSummary
from holdfast.callbacks.model_summary import format_count, plain_table, summarize
from holdfast.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 100))
        self.head = nn.Linear(100, 10)
        self.body[0].requires_grad_(False)
        self.head.requires_grad_(False)
        self.lazy = nn.LazyLinear(3)
        self.loss = nn.MSELoss()


def test_the_table() -> None:
    assert plain_table(summarize(Net())) == (
        "name  type        parameters  state              size\n"
        "body  Sequential      80.5 K  50% trainable    0.3 MB\n"
        "head  Linear           1.0 K  frozen         0.004 MB\n"
        "lazy  LazyLinear           0                   0.0 MB\n"
        "loss  MSELoss              0                   0.0 MB\n"
        "Net: 81.5 K parameters, 40.1 K trainable, 0.3 MB"
    )


def test_depth() -> None:
    assert [row.name for row in summarize(Net(), 0)] == [""]
    assert [row.name for row in summarize(Net(), 2)] == [
        "body",
        "body.0",
        "body.1",
        "body.2",
        "head",
        "lazy",
        "loss",
        "",
    ]
    assert summarize(Net(), -1) == summarize(Net(), 2)
    assert plain_table(summarize(Net(), 0)) == "Net: 81.5 K parameters, 40.1 K trainable, 0.3 MB"


def test_tied_parameters_count_once_in_all() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(10, 10, bias=False)
            self.b = nn.Linear(10, 10, bias=False)
            self.b.weight = self.a.weight

    assert [row.parameters for row in summarize(Tied())] == [100, 100, 100]


def test_counts() -> None:
    counts = [0, 999, 1000, 1010, 99_940, 123_456, 1_234_567, 7_000_000_000, 2 * 10**12]
    assert [format_count(count) for count in counts] == [
        "0",
        "999",
        "1.0 K",
        "1.0 K",
        "99.9 K",
        "123 K",
        "1.2 M",
        "7.0 B",
        "2.0 T",
    ]


@pytest.mark.parametrize("rank_zero", [True, False])
def test_it_is_printed_when_fit_starts_on_rank_0(capsys: pytest.CaptureFixture[str], rank_zero: bool) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=rank_zero)
    module: Any = Net()
    ModelSummary(max_depth=0).on_fit_start(trainer, module)
    captured = capsys.readouterr()
    expected = "Net: 81.5 K parameters, 40.1 K trainable, 0.3 MB\n" if rank_zero else ""
    assert (captured.out, captured.err) == ("", expected)


def test_a_depth_that_means_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelSummary(max_depth=-2)
    assert str(caught.value) == (
        "ModelSummary(max_depth=-2) means nothing: 1 lists the model's own parts, 0 none, -1 all levels."
    )
