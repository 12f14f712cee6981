"""The callbacks that print the table of the model's parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.callbacks import ModelSummary
from holdfast.callbacks.rich_model_summary import RichModelSummary
from holdfast.errors import ConfigError
from tests.callbacks.test_progress_bar import Terminal, screen_lines
from tests.training.toys import Toy, rows, trainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(100, 400)
        self.head = nn.Linear(400, 10).requires_grad_(False)


TOTAL = "Net: 44.4 K parameters, 40.4 K trainable, 177.6 kB"


@pytest.mark.parametrize("rank_zero", [True, False])
def test_it_is_printed_when_fit_starts_on_rank_0(capsys: pytest.CaptureFixture[str], rank_zero: bool) -> None:
    run: Any = SimpleNamespace(is_global_zero=rank_zero)
    module: Any = Net()
    ModelSummary(max_depth=0).on_fit_start(run, module)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{TOTAL}\n" if rank_zero else "")


@pytest.mark.parametrize(("width", "wide"), [(100, True), (44, False)])
def test_on_a_terminal_rich_draws_it(monkeypatch: pytest.MonkeyPatch, width: int, wide: bool) -> None:
    run: Any = SimpleNamespace(is_global_zero=True)
    module: Any = Net()
    terminal = Terminal(monkeypatch, width)
    ModelSummary().on_fit_start(run, module)
    lines = screen_lines(terminal.close().replace("\x1b[0m", ""))
    if wide:
        assert [line.split() for line in lines] == [
            ["name", "type", "parameters", "state", "size"],
            ["─" * 49],
            ["body", "Linear", "40.4", "K", "trainable", "161.6", "kB"],
            ["head", "Linear", "4.0", "K", "frozen", "16.0", "kB"],
            TOTAL.split(),
        ]
    assert max(map(len, lines)) <= width
    assert all(any(number in line for line in lines) for number in ("40.4 K", "4.0 K", "161.6 kB", "16.0 kB"))


def test_rich_model_summary_needs_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run: Any = SimpleNamespace(is_global_zero=True)
    module: Any = Net()
    RichModelSummary(max_depth=1, header_style="red").on_fit_start(run, module)
    err = capsys.readouterr().err
    assert "─────" in err
    assert err.splitlines()[-1] == TOTAL


def test_it_can_be_shown_in_another_way() -> None:
    shown = []

    class Mine(ModelSummary):
        def show(self, summary: Any) -> None:
            shown.append((summary.total_parameters, summary.layer_names))

    run = trainer(callbacks=[Mine()], enable_model_summary=None, enable_checkpointing=False)
    run.fit(Toy(), rows())
    assert shown == [(4, ["layer"])]


class Dropping(Toy):
    """Whose training a forward pass that draws, counts or averages would shift."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.layer(x) + torch.rand(1)

    def loss(self, batch: Any) -> Any:
        return self(batch[0]).square().mean()


def test_sizes_cost_the_run_nothing() -> None:
    ends, seen = [], []

    class Mine(ModelSummary):
        def show(self, summary: Any) -> None:
            seen.append(summary.out_sizes)

    for example in (None, torch.ones(5, 3)):
        torch.manual_seed(0)
        module = Dropping()
        module.example_input_array = example
        run = trainer(callbacks=[Mine()], enable_model_summary=None, enable_checkpointing=False, max_epochs=2)
        run.fit(module, rows(12, shuffle=True))
        ends.append({name: value.tolist() for name, value in module.state_dict().items()})
    assert seen == [["?"], [[5, 1]]]
    assert ends[0] == ends[1]
    assert ends[0]["calls"] == [6.0]


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_a_depth_that_means_nothing(kind: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(max_depth=-2)
    assert str(caught.value) == (
        f"{kind.__name__}(max_depth=-2) means nothing: 1 lists the model's own parts, 0 none, 2 their parts "
        "too, -1 all levels."
    )
