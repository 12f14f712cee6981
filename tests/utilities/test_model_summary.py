"""What a model is made of, and that looking at it changes nothing."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.utilities.model_summary import ModelSummary, format_count, format_size, summarize


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
    assert str(summarize(Net())) == (
        "name  type        parameters  state              size\n"
        "body  Sequential      80.5 K  50% trainable  322.0 kB\n"
        "head  Linear           1.0 K  frozen           4.0 kB\n"
        "lazy  LazyLinear           0                      0 B\n"
        "loss  MSELoss              0                      0 B\n"
        "Net: 81.5 K parameters, 40.1 K trainable, 326.0 kB"
    )


class Measured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2)
        self.drop = nn.Dropout().eval()
        self.scale = nn.Parameter(torch.ones(3))
        self.example_input_array: Any = torch.ones(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.first(x)) * self.scale[0]


def test_the_table_with_sizes_modes_and_parameters_of_the_model_itself() -> None:
    assert repr(ModelSummary(Measured())) == (
        "name            type     parameters  state      size  mode   in      out\n"
        "first           Linear           10  trainable  40 B  train  [6, 4]  [6, 2]\n"
        "drop            Dropout           0              0 B  eval   [6, 2]  [6, 2]\n"
        "own parameters                    3\n"
        "Measured: 13 parameters, 13 trainable, 52 B, 1 module in eval mode"
    )


def test_depth() -> None:
    net = Net()
    assert summarize(net, 0).layer_names == []
    assert summarize(net, 2).layer_names == ["body", "body.0", "body.1", "body.2", "head", "lazy", "loss"]
    assert str(summarize(net, -1)) == str(summarize(net, 2))
    assert str(summarize(net, 0)) == "Net: 81.5 K parameters, 40.1 K trainable, 326.0 kB"


@pytest.mark.parametrize("depth", [-2, "1", 1.5])
def test_a_depth_that_means_nothing(depth: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        summarize(Net(), depth)
    assert str(caught.value) == (
        f"ModelSummary(max_depth={depth!r}) means nothing: 1 lists the model's own parts, 0 none, 2 their "
        "parts too, -1 all levels."
    )


def test_tied_parameters_count_once_in_all() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(10, 10, bias=False)
            self.b = nn.Linear(10, 10, bias=False)
            self.b.weight = self.a.weight

    summary = summarize(Tied())
    assert (summary.param_nums, summary.total_layer_params, summary.total_parameters) == (
        [100, 100],
        200,
        100,
    )


def test_size_is_that_of_the_bytes() -> None:
    assert summarize(nn.Sequential(nn.Linear(1000, 1000, bias=False).half())).model_size == 2.0


class Everything(nn.Module):
    """Draws from every generator and writes to buffers, in evaluation mode too."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2).eval()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.example_input_array = example
        self.met: list[Any] = []

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.met.append((self.training, torch.is_grad_enabled()))
        self.count += torch.rand(1) + random.random() + numpy.random.rand()
        self.last = x.mean()
        self.norm.running_mean.add_(1)  # type: ignore[operator, union-attr]
        if fail:
            raise RuntimeError("no")
        return self.head(self.norm(x))


@pytest.mark.parametrize("fails", [False, True])
def test_looking_changes_nothing(fails: bool) -> None:
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    model = Everything((torch.ones(6, 4), fails))
    names = {name: id(buffer) for name, buffer in model.named_buffers()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    generators = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    if fails:
        with pytest.raises(RuntimeError, match="^no$"):
            summarize(model)
    else:
        assert summarize(model).out_sizes == [[6, 4], [6, 2]]
    assert model.met == [(False, False)]
    assert (model.training, model.norm.training, model.head.training) == (True, True, False)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == names
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert generators == (
        random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    )  # fmt: skip
    assert not model.norm._forward_hooks


class Pair(NamedTuple):
    x: Tensor
    note: str


def test_inputs_of_many_shapes() -> None:
    class Taking(nn.Module):
        def __init__(self, example: Any) -> None:
            super().__init__()
            self.part = nn.Identity()
            self.example_input_array = example

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.part((*args, *kwargs.values()))

    one, two = torch.ones(2, 3), torch.ones(4)
    sizes = [
        summarize(Taking(example)).in_sizes[0]
        for example in (one, [one, two], {"a": one, "b": [two]}, Pair(one, "note"))
    ]
    assert sizes == [[[2, 3]], [[2, 3], [4]], [[2, 3], [[4]]], [[2, 3], "?"]]


def test_lazy_layers_keep_their_first_values_for_the_run() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    model.example_input_array = torch.ones(2, 4)  # type: ignore[assignment]
    summary = summarize(model)
    assert (summary.in_sizes, summary.total_parameters) == (["?"], 0)
    assert isinstance(model[0], nn.LazyLinear)


def test_numbers() -> None:
    counts = [0, 999, 1010, 99_940, 123_456, 1_234_567, 7_000_000_000, 2 * 10**12, 3 * 10**15]
    assert [format_count(count) for count in counts] == [
        "0", "999", "1.0 K", "99.9 K", "123 K", "1.2 M", "7.0 B", "2.0 T", "3,000 T",
    ]  # fmt: skip
    assert [format_size(size) for size in (0, 999, 4040, 1_250_000, 3 * 10**9)] == [
        "0 B", "999 B", "4.0 kB", "1.2 MB", "3.0 GB",
    ]  # fmt: skip
