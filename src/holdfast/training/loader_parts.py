"""What a loader consists of: its samplers, and the generators that it draws from in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from holdfast.training import own_generators
from holdfast.training.loader_kinds import has_state, is_known_sampler
from holdfast.training.replay import described
from holdfast.utilities.attributes import attributes_of
from holdfast.utilities.combined_loader import length_of

if TYPE_CHECKING:
    from holdfast.training.data import BatchStream


def samplers_of(loader: Any) -> dict[str, Any]:
    """The loader and every sampler it draws from, samplers inside of samplers too, each by its path."""
    found: dict[str, Any] = {"loader": loader}
    roots = [(name, getattr(loader, name, None)) for name in ("batch_sampler", "sampler")]
    waiting = [(name, sampler) for name, sampler in roots if sampler is not None]
    while waiting:
        path, sampler = waiting.pop(0)
        if any(sampler is known for known in found.values()):
            continue
        found[path] = sampler
        for name, value in attributes_of(sampler):
            if isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
                waiting.append((f"{path}.{name}", value))
    return found


def samplers_with_state(loader: Any) -> Iterator[tuple[str, Any]]:
    """The samplers whose state an order depends on, each by its path."""
    for path, owner in samplers_of(loader).items():
        # All that torchdata's distributed one knows is a position, which is sought.
        if owner is loader or (isinstance(owner, DistributedSampler) and is_known_sampler(owner)):
            continue
        if has_state(owner):
            yield path, owner


def generators_of_samplers(loader: Any) -> Iterator[tuple[str, Any]]:
    """The generators that the loader and its samplers have as attributes, each by its path."""
    for path, owner in samplers_of(loader).items():
        for name, value in attributes_of(owner):
            if own_generators.is_generator(value):
                yield f"{path}.{name}", value


def splits_itself(loader: Any) -> bool:
    """Whether one of its samplers gives each process its own rows already."""
    return any(
        isinstance(one, DistributedSampler) or hasattr(one, "num_replicas")
        for one in samplers_of(loader).values()
    )


def rows_sampler(loader: Any) -> BatchSampler | None:
    """The batch sampler that does no more than to cut an order of rows into batches, or None."""
    found = loader.batch_sampler
    return found if isinstance(found, BatchSampler) and is_known_sampler(found) else None


def described_to_compare(stream: BatchStream) -> dict[str, Any]:
    """What an exact resume depends on: how a loader is read, workers, order, rows, and what draws in it."""
    loader = stream.loader
    dataset = getattr(loader, "dataset", None)
    count = getattr(loader, "num_workers", 0)
    return {
        "kind": stream.way,
        "loader": described(loader),
        "iterable": not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset),
        "workers": count,
        "in_order": count == 0 or getattr(loader, "in_order", True),
        "batch_size": stream.shares.batch_size,
        "rows": None if dataset is None else length_of(dataset),
        "foreign_sampler": stream.has_foreign_sampler,
        "keeps_generators": stream.reads_here,
    }
