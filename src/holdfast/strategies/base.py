"""What the trainer asks of a strategy: few questions, so that a new one is short to write."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Strategy(Protocol):
    """Processes, devices and agreement between them."""

    @property
    def root_device(self) -> torch.device:
        """This process's device."""

    @property
    def global_rank(self) -> int:
        """Rank of this process in the job."""

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""

    @property
    def world_size(self) -> int:
        """Processes in the job."""

    def barrier(self, name: str = "") -> None:
        """Wait until every process is here. Ranks: all. Blocks: until the last one arrives."""

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank ``src``'s object. Ranks: all. Blocks: until it has arrived."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all (or any) processes said True. Ranks: all. Blocks: until all have said."""
