"""How a loader comes back to a position, and copies of it that do so."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any, Literal

import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate

Way = Literal["sought", "stateful", "replayed"]

_TORCHDATA = "torchdata.stateful_dataloader.stateful_dataloader"
# They draw an epoch's order at once, or from a generator of their own. A list draws nothing.
_KNOWN_SAMPLERS = ("torch.utils.data.", "torchdata.stateful_dataloader.", "builtins")


def has_state(owner: Any) -> bool:
    """Whether something can say where it is, and be put back there."""
    return hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")


def way_of(loader: Any) -> Way:
    """How a loader is brought back to a position.

    "sought": map-style data; the order of the rows is made again, and none before the position is loaded.
    "stateful": the loader's own state is put back. "replayed": it is read again from its start.
    """
    stateful = has_state(loader)
    if not isinstance(loader, DataLoader):
        return "stateful" if stateful else "replayed"
    dataset, iterable = loader.dataset, isinstance(loader.dataset, IterableDataset)
    if stateful and not _iterates_as_torchdata_does(loader):
        return "stateful"
    if stateful and iterable:
        # Where there is no state in it, torchdata reads it again too, but draws otherwise while doing so.
        without = not has_state(dataset) and inspect.isgeneratorfunction(
            getattr(type(dataset), "__iter__", None)
        )
        return "replayed" if without else "stateful"
    if stateful:
        # What it knows beyond the dataset's state is a position in an order.
        return "stateful" if has_state(dataset) else "sought"
    # A subclass with an __iter__ of its own may not ask the sampler that stands in for the user's.
    return "replayed" if iterable or type(loader).__iter__ is not DataLoader.__iter__ else "sought"


def iterates_later(loader: Any) -> bool:
    """Whether a loader starts its workers not when it is iterated, but when the first batch is asked for."""
    return inspect.isgeneratorfunction(type(loader).__iter__)


def _iterates_as_torchdata_does(loader: Any) -> bool:
    theirs: Any = getattr(sys.modules.get(_TORCHDATA), "StatefulDataLoader", None)
    names = ("__iter__", "_get_iterator", "state_dict", "load_state_dict")
    return (
        theirs is not None
        and isinstance(loader, theirs)
        and all(getattr(type(loader), name) is getattr(theirs, name) for name in names)
    )


def copy_of(loader: DataLoader[Any]) -> Any:
    """A copy whose attributes can be set, with a generator of its own for the seeds of its workers."""
    made = copy.copy(loader)
    if _iterates_as_torchdata_does(loader):
        made.__class__ = DataLoader
    # DataLoader forbids setting some of them after construction, since its own state would go stale; in a
    # shallow copy that has not been iterated yet there is none.
    made.__dict__["_iterator"] = None
    made.__dict__["generator"] = torch.Generator()
    return made


def never_draws(loader: DataLoader[Any]) -> bool:
    """True for torch's own in-memory datasets with the default collate: nothing in their fetch is random."""
    dataset: Any = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    parts = dataset.datasets if type(dataset) is ConcatDataset else [dataset]
    return all(type(part) is TensorDataset for part in parts) and loader.collate_fn is default_collate


def is_known_sampler(sampler: Any) -> bool:
    """Whether a sampler is torch's or torchdata's, and draws nothing between two batches."""
    return type(sampler).__module__.startswith(_KNOWN_SAMPLERS)
