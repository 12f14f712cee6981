"""A payload as training makes it: a model, Adam's state, and the plain values around them."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import numpy as np
import torch


def realistic_payload(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    )
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 120,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(lr=0.1, data=pathlib.Path("/data")),
        "holdfast": {"generators": {"numpy": np.random.RandomState(seed).get_state()}, "position": (3, 17)},
    }


SUMMARY = {"step": 120, "epoch": 3, "metrics": {"val_loss": 0.25}, "exact": True, "kind": "full"}
