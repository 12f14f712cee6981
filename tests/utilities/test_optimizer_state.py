"""An optimizer goes on from a checkpoint with the very bits that it had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from holdfast.utilities.optimizer_state import load_optimizer_state


def trained(kind: Any, dtype: torch.dtype) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).to(dtype)
    optimizer = kind(module.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.ones(4, 3, dtype=dtype)).square().sum().backward()
        optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adam])
def test_what_is_kept_in_float32_for_half_precision_stays_so(kind: Any) -> None:
    module, optimizer = trained(kind, torch.bfloat16)
    saved = optimizer.state_dict()
    other = kind(module.parameters())
    load_optimizer_state(other, saved, module, module.state_dict())
    for parameter in module.parameters():
        mine, theirs = other.state[parameter], optimizer.state[parameter]
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert mine[name].dtype == value.dtype
            assert torch.equal(mine[name], value)


def test_in_another_precision_it_becomes_the_weights() -> None:
    module, optimizer = trained(torch.optim.Adam, torch.float32)
    weights = dict(module.state_dict())
    module.to(torch.bfloat16)
    other = torch.optim.Adam(module.parameters())
    load_optimizer_state(other, optimizer.state_dict(), module, weights)
    assert [other.state[one]["exp_avg"].dtype for one in module.parameters()] == [torch.bfloat16] * 2
