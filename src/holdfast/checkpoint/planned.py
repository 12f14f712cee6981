"""What a set of tensors needs to be copied, known once for as long as they stay where they are in memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.tensors import Plan, Record

TINY_BYTES = 4 << 10
"""Up to this size, copying a tensor costs no more than keeping an eye on it."""

SAMPLE_BYTES = 16
"""How many bytes are looked at in each of three places of a tensor: its head, middle and tail."""


class Source:
    """A record, where its bytes are and where they go."""

    __slots__ = ("address", "length", "name", "offset", "pointer", "probes", "record", "tensors")

    def __init__(self, record: Record, offset: int) -> None:
        first = record.spans[0]
        self.record = record
        self.name = first.name
        self.offset = offset
        self.length = record.length
        self.address = record.address
        self.pointer = first.tensor.data_ptr()
        begin = self.address or 0
        self.probes = begin, begin + self.length // 2, begin + self.length - SAMPLE_BYTES
        self.tensors = {identity(span.tensor) for span in record.spans}


def identity(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    """Which memory a tensor is: equal for tensors with the same elements at the same place."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Planned:
    """The plan of a set of tensors and what follows from it; good while they lie where they do."""

    def __init__(self, named: list[tuple[str, Tensor]]) -> None:
        self.plan = Plan(named)
        self.plan.sign()  # now: later, the live tensors may be somewhere else
        self.layout = Layout(self.plan.records)
        self.tiny: list[tuple[int, int, int, int]] = []  # offset, end, address, length
        self.odd: list[tuple[int, Record]] = []  # offset; made dense, or of a device without streams
        self.large: list[Source] = []
        self.on_cuda: list[Source] = []
        self.by_tensor: dict[Any, list[Source]] = {}
        for record, entry in zip(self.plan.records, self.layout.entries, strict=True):
            if record.length == 0:
                continue
            if record.address is not None and record.length <= TINY_BYTES:
                self.tiny.append((entry.offset, entry.offset + record.length, record.address, record.length))
                continue
            cuda = not record.dense and record.spans[0].tensor.is_cuda
            if record.address is None and not cuda:
                self.odd.append((entry.offset, record))
                continue
            source = Source(record, entry.offset)
            (self.on_cuda if cuda else self.large).append(source)
            for key in source.tensors:
                self.by_tensor.setdefault(key, []).append(source)
        self._late: list[weakref.ref[Tensor]] = []
        self._pointers: list[int] = []
        self._promised: list[Source] = []
        self._pairs: list[tuple[int, Source]] = []

    def promised(self, late: list[Tensor]) -> tuple[list[Source], list[tuple[Tensor, Source]]]:
        """The sources all of whose tensors are among ``late``; and each tensor with its source."""
        with torch._C.DisableTorchFunctionSubclass():
            if not self._same_as_before(late):
                self._look_up(late)
        return self._promised, [(late[at], source) for at, source in self._pairs]

    def _same_as_before(self, late: list[Tensor]) -> bool:
        # The tensors of the plan are where they were, so if these are too, so is what follows.
        if len(late) != len(self._late) or not late:
            return False
        if not all(known() is tensor for known, tensor in zip(self._late, late, strict=True)):
            return False
        try:
            return [tensor.data_ptr() for tensor in late] == self._pointers
        except RuntimeError:
            return False

    def _look_up(self, late: list[Tensor]) -> None:
        found: dict[Source, set[Any]] = {}
        pairs: list[tuple[int, Source]] = []
        pointers: list[int] = []
        for at, tensor in enumerate(late):
            try:
                key = identity(tensor)
                _ = tensor._version
            except RuntimeError:  # without memory of its own, or without a count of its changes
                continue
            pointers.append(key[0])
            for source in self.by_tensor.get(key, ()):
                found.setdefault(source, set()).add(key)
                pairs.append((at, source))
        # The others share memory with a tensor that may change at any time.
        self._promised = [source for source, keys in found.items() if len(keys) == len(source.tensors)]
        whole = set(self._promised)
        self._pairs = [pair for pair in pairs if pair[1] in whole]
        self._late = [weakref.ref(tensor) for tensor in late]
        self._pointers = pointers
