"""What can be told of a loader from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import IterableDataset

from holdfast.utilities.combined_loader import length_of
from holdfast.utilities.rank_zero import rank_zero_warn


def sized_len(dataloader: Any) -> int | None:
    """The number of batches, or None where the loader cannot tell."""
    return length_of(dataloader)


def has_iterable_dataset(dataloader: Any) -> bool:
    """Whether the loader reads an `IterableDataset`."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def has_len_all_ranks(
    dataloader: Any, strategy: Any, allow_zero_length_dataloader_with_multiple_devices: bool = False
) -> bool:
    """Whether the loader has a length on every process; warns where it is 0 on all.

    Args:
        dataloader: The loader.
        strategy: The trainer's, which asks the other processes.
        allow_zero_length_dataloader_with_multiple_devices: Accept a loader that is empty on some processes.

    Raises:
        RuntimeError: it is empty on some processes and not on others.
    """
    length = sized_len(dataloader)
    if length is None:
        return False
    total = int(strategy.reduce(torch.tensor(length, device=strategy.root_device), reduce_op="sum"))
    if total == 0:
        rank_zero_warn(f"The {type(dataloader).__name__} has no batches: its length is 0.")
    elif length == 0:
        if not allow_zero_length_dataloader_with_multiple_devices:
            raise RuntimeError(
                f"The {type(dataloader).__name__} is empty on this process but not on others, which would "
                f"then wait for it. Give every process data."
            )
        return False
    return True
