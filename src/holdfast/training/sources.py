"""Where a run's loaders come from: the call, the datamodule, or the module, in this order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)

from holdfast.errors import ConfigError
from holdfast.training.combined import as_one_loader
from holdfast.utilities.combined_loader import CombinedLoader
from holdfast.utilities.model_helpers import is_overridden
from holdfast.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def has_loader(trainer: Trainer, kind: str, given: Any) -> bool:
    """Whether anybody has the loader of a kind: "train", "val", "test" or "predict"."""
    hook = f"{kind}_dataloader"
    return given is not None or any(
        is_overridden(hook, owner) for owner in (trainer.datamodule, trainer.model)
    )


def find_loader(trainer: Trainer, kind: str, given: Any) -> Any:
    """The loader or loaders of a kind; None if nobody has one."""
    if given is not None:
        return given
    hook = f"{kind}_dataloader"
    for owner in (trainer.datamodule, trainer.model):
        if is_overridden(hook, owner):
            return getattr(owner, hook)()
    return None


def find_train_loader(trainer: Trainer, given: Any) -> Any:
    """The training loader; several as a `CombinedLoader` that goes on until the longest has ended.

    Raises:
        ConfigError: it cannot be iterated, or has its loaders in turn.
    """
    loader = as_one_loader(find_loader(trainer, "train", given), "max_size_cycle")
    if not isinstance(loader, Iterable):
        raise ConfigError(
            f"train_dataloader: expected a loader that can be iterated, found {type(loader).__name__}."
        )
    if isinstance(loader, CombinedLoader) and loader.mode == "sequential":
        raise ConfigError(
            'trainer.fit cannot train on a CombinedLoader(mode="sequential"). Take "min_size", "max_size" or '
            '"max_size_cycle", or one loader over a torch.utils.data.ConcatDataset.'
        )
    return loader


def processed(trainer: Trainer, loaders: Any) -> Any:
    """The loaders as the strategy wants them, where it overrides `Strategy.process_dataloader`."""
    strategy = trainer.strategy
    if loaders is None or not is_overridden("process_dataloader", strategy):
        return loaders
    return _each(loaders, strategy.process_dataloader, others=strategy.process_dataloader)


# -- loaders that differ from the user's in their sampler alone ----------------------------------------------


def in_order(loaders: Any, kind: str) -> Any:
    """The loaders without shuffling, for overfit_batches; said once."""
    shuffled: list[str] = []

    def unshuffled(loader: DataLoader[Any]) -> DataLoader[Any]:
        batches = loader.batch_sampler
        if isinstance(loader.dataset, IterableDataset):
            return loader
        if batches is not None and type(batches) is not BatchSampler:
            shuffled.append(f"its {type(batches).__name__} is left as it is")
            return loader
        sampler = loader.sampler if batches is None else batches.sampler
        if type(sampler) is SequentialSampler or (
            isinstance(sampler, DistributedSampler) and not sampler.shuffle
        ):
            return loader
        shuffled.append(f"the rows come in order instead of by its {type(sampler).__name__}")
        if isinstance(sampler, DistributedSampler):
            ordered: Sampler[Any] = copy.copy(sampler)
            ordered.__dict__["shuffle"] = False
        else:
            ordered = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
        return _with_sampler(loader, ordered, drop_last=getattr(batches, "drop_last", loader.drop_last))

    found = _each(loaders, unshuffled)
    if shuffled:
        rank_zero_warn(
            f"Trainer(overfit_batches=...) needs the same batches in every epoch. {kind}_dataloader: "
            f"{'; '.join(dict.fromkeys(shuffled))}."
        )
    return found


def with_every_row(loaders: Any) -> Any:
    """The loaders without ``drop_last``: a prediction is for every row."""

    def whole(loader: DataLoader[Any]) -> DataLoader[Any]:
        batches = loader.batch_sampler
        if type(batches) is not BatchSampler or not batches.drop_last:
            return loader
        return _with_sampler(loader, batches.sampler, drop_last=False)

    return _each(loaders, whole)


def _each(
    loaders: Any, change: Callable[[DataLoader[Any]], Any], others: Callable[[Any], Any] | None = None
) -> Any:
    """``loaders`` with every DataLoader in them changed, and every other one by ``others``."""
    if isinstance(loaders, DataLoader):
        return change(loaders)
    if isinstance(loaders, CombinedLoader):
        changed = copy.copy(loaders)
        changed.flattened = [_each(one, change, others) for one in loaders.flattened]
        return changed
    combined = as_one_loader(loaders, "sequential")
    if combined is not loaders:
        return _each(combined, change, others).iterables
    return loaders if others is None else others(loaders)


def _with_sampler(loader: DataLoader[Any], sampler: Any, *, drop_last: bool) -> DataLoader[Any]:
    # A copy, so that a subclass need not be made again with arguments that nobody here knows. DataLoader
    # forbids setting these because its own state would go stale; in the copy there is none.
    changed = copy.copy(loader)
    changed.__dict__["_iterator"] = None
    changed.__dict__["sampler"] = sampler
    if loader.batch_sampler is not None:
        size: int = loader.batch_sampler.batch_size  # type: ignore[attr-defined]
        changed.__dict__["batch_sampler"] = BatchSampler(sampler, size, drop_last)
        changed.__dict__["drop_last"] = drop_last
    return changed
