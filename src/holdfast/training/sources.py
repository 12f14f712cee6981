"""Where a run's loaders come from: the call, the datamodule, or the module, in this order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from holdfast.errors import ConfigError
from holdfast.training.hooks import is_overridden

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
    """The training loader.

    Raises:
        ConfigError: it cannot be iterated, or there are several at once.
    """
    loader = find_loader(trainer, "train", given)
    several = list(loader.values()) if isinstance(loader, dict) else loader
    if isinstance(several, (list, tuple)) and several and all(isinstance(one, DataLoader) for one in several):
        raise ConfigError(
            "Several training loaders at once are not supported yet. Combine their datasets in one."
        )
    if not isinstance(loader, Iterable):
        raise ConfigError(
            f"train_dataloader: expected a loader that can be iterated, found {type(loader).__name__}."
        )
    return loader
