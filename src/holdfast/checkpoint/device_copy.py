"""Copies from CUDA devices into a snapshot's memory, beside what the devices compute.

Nothing in here makes the host wait for a device but what says that it is for the background. It has never run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Bytes on a device, and the pinned memory that they go to."""

_new_stream: Any = torch.cuda.Stream
_new_event: Any = torch.cuda.Event


class DeviceCopy:
    """The copies of one snapshot, on one more stream of each device.

    Args:
        now: what is copied before the device's current stream goes on.
        late: what is copied while it goes on, until `order`.
    """

    def __init__(self, now: Sequence[Pair], late: Sequence[Pair]) -> None:
        self._events: dict[torch.device, torch.cuda.Event] = {}
        self._pairs = [*now, *late]  # until it is copied, the memory must not be used again
        for device in {source.device for source, _ in self._pairs}:
            with torch.cuda.device(device):
                current, side = torch.cuda.current_stream(), _new_stream()
                side.wait_stream(current)
                current.wait_event(_copied(now, device, side))
                self._events[device] = _copied(late, device, side)

    def order(self) -> None:
        """Have the devices do what the caller asks of them from here on after the copies."""
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)

    def finish(self) -> None:
        """Return when all bytes have arrived; for the background."""
        for event in self._events.values():
            event.synchronize()
        self._pairs = []


def _copied(pairs: Sequence[Pair], device: torch.device, stream: torch.cuda.Stream) -> torch.cuda.Event:
    with torch.cuda.stream(stream):
        for source, destination in pairs:
            if source.device == device:
                destination.copy_(source, non_blocking=True)
        event: torch.cuda.Event = _new_event()
        event.record(stream)
    return event


class DeviceComparison:
    """Whether tensors on devices change between its making and `end`, known once the devices got there.

    By the sum of their bytes, read as whole numbers: to keep a copy would take too much of a device's memory.
    """

    def __init__(self, names: list[str], runs: list[Tensor]) -> None:
        self.names = names
        self._runs = runs
        self._before = [_sum(run) for run in runs]
        self._same: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []

    def end(self) -> None:
        """Look at them again, as they are when the devices get here."""
        for run, before in zip(self._runs, self._before, strict=True):
            with torch.cuda.device(run.device):
                host = torch.empty((), dtype=torch.bool, pin_memory=True)
                self._same.append(host.copy_(_sum(run) == before, non_blocking=True))
        for device in {run.device for run in self._runs}:
            with torch.cuda.device(device):
                event: torch.cuda.Event = _new_event()
                event.record()
                self._events.append(event)
        self._runs = []

    def changed(self) -> list[str]:
        """The names of those that changed; for the background."""
        for event in self._events:
            event.synchronize()
        return [name for name, same in zip(self.names, self._same, strict=True) if not same]


def _sum(run: Tensor) -> Tensor:
    whole = run.numel() % 8 == 0 and run.data_ptr() % 8 == 0
    return (run.view(torch.int64) if whole else run).sum(dtype=torch.int64)
