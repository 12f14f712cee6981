"""BatchNorm layers are synchronised for as long as a run lasts, and are themselves again behind it."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.strategies.sync_batchnorm import SyncedBatchNorms

GPU = torch.device("cuda", 0)  # nothing is put there: only torch's refusal of the CPU is asked for


def test_layers_are_replaced_and_put_back_with_what_they_have_become() -> None:
    norm = nn.BatchNorm1d(3)
    module = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3), norm), "shared": norm})
    weight = norm.weight
    synced = SyncedBatchNorms(module, GPU)
    inside = module["net"][1]
    assert type(inside) is nn.SyncBatchNorm and module["shared"] is inside
    assert inside.weight is weight
    inside._buffers["running_mean"] = torch.full((3,), 2.0)
    inside.eval()
    synced.revert()
    assert module["net"][1] is norm and module["shared"] is norm
    assert norm.weight is weight and norm.running_mean.tolist() == [2.0] * 3 and not norm.training


def test_a_module_without_such_layers_trains_on_the_cpu() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    SyncedBatchNorms(module, torch.device("cpu")).revert()
    assert type(module[0]) is nn.Linear
