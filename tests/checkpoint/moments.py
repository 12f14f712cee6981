"""Moments of a run: what a file has to hold is the state as it was at the call, to the bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.checkpoint.load import load
from holdfast.checkpoint.snapshot import Snapshot


def equal(a: Any, b: Any) -> bool:
    """Equal all the way down, tensors to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.layout == b.layout and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)


def bits(tensor: torch.Tensor) -> Any:
    if tensor.is_meta:
        return "meta"
    if tensor.layout is torch.sparse_coo:
        return bits(tensor._indices()), bits(tensor._values())
    if tensor.layout is not torch.strided:
        return bits(tensor.crow_indices()), bits(tensor.col_indices()), bits(tensor.values())
    if tensor.is_quantized:
        return tensor.q_scale(), bits(tensor.int_repr())
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def holds(path: Path, expected: Any) -> bool:
    """Whether the file is that state, for holdfast and for torch."""
    return equal(load(path), expected) and equal(torch.load(path, weights_only=True), expected)


class LastMoment:
    """Has the background copy at the last moment only: when training comes to wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copied: list[set[str]] = []  # for each snapshot what was copied late
        copy_late, settle = Snapshot.copy_late, Snapshot.settle

        def gate(snapshot: Snapshot) -> threading.Event:
            made: threading.Event = vars(snapshot).setdefault("gate", threading.Event())
            return made

        def copy_when_let(snapshot: Snapshot) -> None:
            self.copied.append({source.name for source in snapshot._late})
            if snapshot._late:
                gate(snapshot).wait()
            copy_late(snapshot)

        def let_and_settle(snapshot: Snapshot, learn: bool = True) -> None:
            gate(snapshot).set()
            settle(snapshot, learn)

        monkeypatch.setattr(Snapshot, "copy_late", copy_when_let)
        monkeypatch.setattr(Snapshot, "settle", let_and_settle)
