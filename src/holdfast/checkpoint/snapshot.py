"""Live tensors to their values at one moment, in an image of the file that is to hold them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoint import payload, tensors
from holdfast.checkpoint.arena import Arena
from holdfast.checkpoint.device_copy import DeviceComparison, DeviceCopy, Pair
from holdfast.checkpoint.planned import SAMPLE_BYTES, Planned, Source
from holdfast.checkpoint.trust import SnapshotChanged, Trust

_string_at: Any = ctypes.string_at  # keeps the GIL: to let go of it costs more than a few bytes
_memmove: Any = ctypes.memmove  # lets go of it
_memcmp: Any = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Snapshot:
    """A payload as it is at one moment.

    Between its making and `settle`, the live tensors that it was told of must stay as they are. Methods are
    for the background unless they say otherwise.

    Attributes:
        encoded: the payload with its tensors; None once it was let go of.
        planned: its plan, for the next snapshot.
        layout: how its bytes lie in ``image``.
        image: what `writing.write` takes.
        copied: set when nothing reads live memory of the host any more, whether or not that went well.
    """

    def __init__(
        self,
        value: Any,
        late: Collection[Tensor],
        known: Collection[Planned],
        arena: Arena,
        trust: Trust,
    ) -> None:
        """Copy at once all that may not be copied late.

        Args:
            value: the payload.
            late: live tensors that nobody is to change before `settle`.
            known: plans of earlier snapshots, which are used again where they fit.
            arena: where the bytes go.
            trust: which of ``late`` are copied late.

        Raises:
            MemoryError: there is no memory for it.
        """
        self.encoded: payload.Encoded | None = payload.encode(value)
        named = self.encoded.tensors
        again = next((one for one in known if one.plan.rebind(named)), None)
        self.planned = again or Planned(named)
        self.layout = self.planned.layout
        self.copied = threading.Event()
        self._arena = arena  # or it would go, with its memory, when an engine is let go of in mid-save
        self._trust = trust
        self._thread = threading.get_ident()
        self._settling = threading.Lock()
        self._strayed: list[str] = []
        self._watched: list[tuple[Tensor, Source]] = []
        self._versions: list[int] = []
        self._compared: list[tuple[Source, Tensor]] = []
        self._devices: DeviceCopy | None = None
        self._comparison: DeviceComparison | None = None
        self._to_order = False
        try:
            size = max(1, self.layout.image_bytes)
            self._address = arena.lend(size, pinned=bool(self.planned.on_cuda))
            self.image = tensors.memory(self._address, size, writable=True)
            self._late = self._sort(late)
            self._samples = [
                (
                    _string_at(head, SAMPLE_BYTES),
                    _string_at(middle, SAMPLE_BYTES),
                    _string_at(tail, SAMPLE_BYTES),
                )
                for head, middle, tail in [source.probes for source in self._late]
            ]
            self._copy_at_once()
        except BaseException:
            self.release()
            raise
        if not self._late:
            self.copied.set()

    def _sort(self, late: Collection[Tensor]) -> list[Source]:
        """Find what is copied late; note which tensors to watch meanwhile, and which have yet to earn it."""
        trust = self._trust
        promised, pairs = self.planned.promised(list(late))
        trusted = {source for source in promised if trust.allows(source.name)}
        compared = [one for one in promised if one not in trusted and trust.may_earn(one.name)]
        watched = [pair for pair in pairs if pair[1] in trusted]
        self._watched = watched
        self._versions = [tensor._version for tensor, _ in watched]
        self._compared = [(source, source.record.spans[0].tensor) for source in compared]
        if self.planned.on_cuda:
            self._begin_on_devices(trusted)
        return [source for source in promised if source in trusted and source.address is not None]

    def _copy_at_once(self) -> None:
        planned, image = self.planned, self.image
        for offset, end, address, length in planned.tiny:
            image[offset:end] = _string_at(address, length)
        for offset, record in planned.odd:
            record.copy_to(self._address + offset)
        later = set(self._late)
        for source in planned.large:
            if source not in later:
                _memmove(self._address + source.offset, source.address, source.length)

    def _begin_on_devices(self, trusted: Collection[Source]) -> None:
        whole: Any = (ctypes.c_uint8 * len(self.image)).from_address(self._address)
        host = torch.frombuffer(whole, dtype=torch.uint8)
        now: list[Pair] = []
        late: list[Pair] = []
        for source in self.planned.on_cuda:
            destination = host[source.offset : source.offset + source.length]
            (late if source in trusted else now).append((source.record.run(), destination))
        unproven = [source for source, _ in self._compared if source.address is None]
        if unproven:
            runs = [source.record.run() for source in unproven]
            self._comparison = DeviceComparison([source.name for source in unproven], runs)
            self._compared = [one for one in self._compared if one[0].address is not None]
        self._devices = DeviceCopy(now, late)
        self._to_order = bool(late or unproven)

    @property
    def open(self) -> bool:
        """Whether `settle` has anything to do."""
        return bool(self._watched or self._compared or self._to_order)

    def copy_late(self) -> None:
        """Copy what was left for later.

        Raises:
            SnapshotChanged: some of it is not what it was at the call.
        """
        try:
            for source, before in zip(self._late, self._samples, strict=True):
                # A storage that was freed or has moved must not be read.
                if source.record.spans[0].tensor.data_ptr() != source.pointer:
                    self._strayed.append(source.name)
                    continue
                address = self._address + source.offset
                _memmove(address, source.address, source.length)
                head, middle, tail = source.probes
                moved = address - head
                if before != (
                    _string_at(address, SAMPLE_BYTES),
                    _string_at(middle + moved, SAMPLE_BYTES),
                    _string_at(tail + moved, SAMPLE_BYTES),
                ):
                    self._strayed.append(source.name)
        finally:
            self.copied.set()
        if self._devices is not None:
            self._devices.finish()
        self._trust.learn()
        if self._strayed:
            self.confirm()

    def settle(self, learn: bool = True) -> None:
        """Let training change the tensors: wait for the copy, and find out what changed before it could end.

        For any thread, at the last moment at which the tensors have to be as they were.

        Args:
            learn: whether what did not change until now has earned trust.
        """
        self.copied.wait()
        with self._settling:
            if not learn or threading.get_ident() != self._thread:
                # Another thread's step comes at any time: perhaps before this one's has done anything.
                self._compared, self._comparison = [], None
            if self._devices is not None and self._to_order:
                self._devices.order()
            if self._comparison is not None:
                self._comparison.end()
                self._trust.later.append(self._comparison)
            self._to_order, self._comparison = False, None
            self._look_at_versions()
            compared, self._compared = self._compared, []
            changed = [source.name for source, tensor in compared if not self._holds(source, tensor)]
            self._trust.lose(changed, lost_save=False)
            self._trust.passed([source.name for source, _ in compared])

    def confirm(self) -> None:
        """Return if what was copied late is one moment with the rest.

        Raises:
            SnapshotChanged: it is not.
        """
        with self._settling:
            self._look_at_versions()
        if self._strayed:
            self._trust.lose(self._strayed, lost_save=True)
            raise SnapshotChanged(list(dict.fromkeys(self._strayed)))

    def release(self) -> None:
        """Let go of the payload and its memory, but for what `settle` has yet to look at."""
        self.encoded = None
        self.planned.plan.release()

    def drop(self) -> None:
        """Let go of that as well: `settle` learns nothing any more."""
        with self._settling:
            self._watched, self._compared = [], []
            self._to_order, self._comparison = False, None

    def _look_at_versions(self) -> None:
        watched, self._watched = self._watched, []
        changed = [
            source.name
            for (tensor, source), version in zip(watched, self._versions, strict=False)
            if tensor._version != version
        ]
        if changed:
            self._strayed += changed
            self._trust.lose(changed, lost_save=True)

    def _holds(self, source: Source, tensor: Tensor) -> bool:
        """Whether the image still equals the live memory."""
        if tensor.data_ptr() != source.pointer:
            return False
        return not _memcmp(self._address + source.offset, source.address, source.length)
