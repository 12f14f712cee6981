"""The loaders of training and of validation that `feature_plans` names."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast.utilities.combined_loader import CombinedLoader

from .feature_data import (
    Batches,
    Blocks,
    Buckets,
    LazyBatches,
    LazySampler,
    Plan,
    Rows,
    RowsAtOnce,
    SizedStream,
    StatefulLoader,
    StatefulSampler,
    StatefulStream,
    Stream,
    collate_with_noise,
    seed_worker,
)


class OwnLoader(DataLoader[Any]):
    """Has an iteration of its own, which gives every batch but the last in turn with its neighbour."""

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        batches[:-1] = [
            batches[at ^ 1] if (at ^ 1) < len(batches) - 1 else batches[at] for at in range(len(batches) - 1)
        ]
        return iter(batches)


def train_data(plan: Plan, seed: int = 0) -> Any:
    kind, rows, size = plan["data"], plan["rows"], plan["batch_size"]
    if kind in ("one", "own loader"):
        return loader(plan, rows, seed, kind=OwnLoader if kind == "own loader" else DataLoader)
    if kind == "iterable":
        return streamed(plan, Stream(Rows(rows, plan["draws"], seed)))
    if kind == "sized iterable":
        return streamed(plan, SizedStream(Rows(rows, plan["draws"], seed)))
    if kind == "batches":
        return Batches(Rows(rows, plan["draws"], seed), size)
    if kind == "stateful loader":
        return StatefulLoader(Rows(rows, plan["draws"], seed), size)
    if kind == "torchdata":
        options = {"shuffle": plan["shuffle"], **with_generator(plan, seed)}
        return streamed(plan, Rows(rows, plan["draws"], seed), StatefulDataLoader, **options)
    if kind == "torchdata iterable":
        return streamed(plan, StatefulStream(Rows(rows, plan["draws"], seed)), StatefulDataLoader)
    if kind == "list":
        return [loader(plan, rows, seed), further(plan, rows + 5, seed + 1)]
    if kind == "nested":
        return {
            "a": loader(plan, rows, seed),
            "b": [further(plan, rows + 3, seed + 1), further(plan, 6, seed + 2)],
        }
    if kind == "cycle with iterable":
        beside = streamed(plan, Stream(Rows(7, plan["draws"], seed)))
        return CombinedLoader([loader(plan, rows, seed), beside], "max_size_cycle")
    return CombinedLoader({"a": loader(plan, rows, seed), "b": further(plan, 6, seed + 1)}, kind)


def loader(plan: Plan, rows: int, seed: int = 0, kind: type[DataLoader[Any]] = DataLoader) -> DataLoader[Any]:
    """The map-style loader that most of the plan is about."""
    size, drop_last, own = plan["batch_size"], plan["drop_last"], with_generator(plan, seed)
    data = dataset(plan, rows, seed)
    count = len(data)  # type: ignore[arg-type]
    options: dict[str, Any] = {"batch_size": size, "drop_last": drop_last}
    whole = {  # samplers of batches
        "batches": lambda: BatchSampler(RandomSampler(data, **own), size, drop_last),  # type: ignore[arg-type]
        "buckets": lambda: Buckets(count, size, drop_last),
        "lazy batches": lambda: LazyBatches(count, size),
    }
    single = {
        "weighted": lambda: WeightedRandomSampler([1.0 + n % 3 for n in range(count)], count, **own),
        "subset": lambda: SubsetRandomSampler(range(1, count), **own),
        "epoch": lambda: DistributedSampler(data, num_replicas=2, rank=1, seed=3),
        "lazy": lambda: LazySampler(count),
        "stateful": lambda: StatefulSampler(count),
    }
    if plan["fetch"] == "blocks":
        options = {"batch_size": None}
    elif plan["collate"]:
        options["collate_fn"] = collate_with_noise
    if plan["sampler"] in whole:
        options = {
            "batch_sampler": whole[plan["sampler"]](),
            **{k: v for k, v in options.items() if k == "collate_fn"},
        }
    elif plan["sampler"] is not None:
        options["sampler"] = single[plan["sampler"]]()
    else:
        options["shuffle"] = plan["shuffle"]
    return kind(data, **options, **own, **with_workers(plan))


def dataset(plan: Plan, rows: int, seed: int) -> Dataset[Any]:
    source = (RowsAtOnce if plan["fetch"] == "at once" else Rows)(rows, plan["draws"], seed)
    if plan["fetch"] == "blocks":
        return Blocks(source, plan["batch_size"])
    if plan["fetch"] == "tensors":
        return TensorDataset(source.inputs, source.targets)
    return Subset(source, range(rows - 1, 0, -1)) if plan["fetch"] == "subset" else source


def further(plan: Plan, rows: int, seed: int) -> DataLoader[Any]:
    """A loader beside the one that the plan is about: with the default of what decides on the order."""
    return loader({**plan, "sampler": None, "fetch": None}, rows, seed)


def streamed(plan: Plan, data: Any, kind: Any = DataLoader, **more: Any) -> Any:
    options = {"batch_size": plan["batch_size"], "drop_last": plan["drop_last"]}
    if plan["collate"]:
        options["collate_fn"] = collate_with_noise
    return kind(data, **options, **with_workers(plan), **more)


def with_workers(plan: Plan) -> dict[str, Any]:
    if not plan["workers"]:
        return {}
    return {
        "num_workers": plan["workers"],
        "persistent_workers": plan["persistent"],
        "prefetch_factor": plan["prefetch"],
        "multiprocessing_context": plan["context"] or "fork",
        "worker_init_fn": seed_worker if plan["worker_init"] else None,
    }


def with_generator(plan: Plan, seed: int) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(5 + seed)} if plan["own_generator"] else {}


def val_data(plan: Plan, seed: int = 0) -> Any:
    kind = plan["val"]
    if kind is None:
        return []
    options: dict[str, Any] = {"batch_size": plan["batch_size"], "num_workers": plan["val_workers"]}
    if plan["val_workers"]:
        options.update(persistent_workers=plan["persistent"], multiprocessing_context="fork")
    first = DataLoader(Rows(5, kind == "drawing", 50 + seed), shuffle=kind == "shuffled", **options)
    if kind in ("one", "drawing", "shuffled"):
        return first
    if kind == "iterable":
        data: IterableDataset[Any] = Stream(Rows(7, True, 50 + seed))
        return DataLoader(data, **options)
    second = DataLoader(Rows(9, True, 60 + seed), shuffle=True, **options)
    return [first, second] if kind == "two" else CombinedLoader([first, second], kind)
