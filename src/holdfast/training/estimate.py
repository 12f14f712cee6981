"""How large a run's checkpoints will be, before the first one: whether there is room, and memory for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from holdfast.callbacks.model_checkpoint import ModelCheckpoint
from holdfast.training.saving import writes_itself
from holdfast.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.training.trainer import Trainer

_WORTH_PREPARING_BYTES = 1 << 20

# Tensors like the parameter that each of torch's optimizers will keep for it, from its first step on.
_STATE_TENSORS = {
    "Adadelta": 2,
    "Adam": 2,
    "AdamW": 2,
    "Adamax": 2,
    "ASGD": 1,
    "NAdam": 2,
    "RAdam": 2,
    "RMSprop": 1,
    "Rprop": 2,
    "SparseAdam": 2,
}
# And those that an argument adds, where it is set.
_FURTHER = {"amsgrad": 1, "momentum": 1, "centered": 1}


def before_first_batch(trainer: Trainer) -> None:
    """Warn where the next checkpoint will not fit, and make memory ready for snapshots; never fails."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    callbacks = [one for one in callbacks if one.save_top_k != 0 or one.save_last]
    if not callbacks or trainer.fast_dev_run or writes_itself(trainer):
        return
    try:
        sizes = {
            weights_only: size_bytes(trainer, weights_only=weights_only) for weights_only in (True, False)
        }
    except Exception:  # somebody's own class may be unlike any other, and a guess is not worth an error
        return
    if trainer.is_global_zero:
        needed: dict[str, int] = {}
        for one in callbacks:
            place = one.dirpath or trainer.default_root_dir
            needed[place] = max(needed.get(place, 0), sizes[one.save_weights_only])
        for place, size in needed.items():
            _warn_if_full(place, size)
    prepared = max((sizes[one.save_weights_only] for one in callbacks if one.background), default=0)
    if prepared >= _WORTH_PREPARING_BYTES:
        trainer.engine.prepare(prepared)


def size_bytes(trainer: Trainer, *, weights_only: bool) -> int:
    """About how large a checkpoint of the run will be once its optimizers have stepped.

    Args:
        trainer: Whose run; its model and optimizers are made.
        weights_only: Without what only resuming needs.
    """
    module = trainer.lightning_module
    stored = [module]
    if not weights_only:
        # An average of the weights, such as callbacks keep.
        stored += [value for one in trainer.callbacks for value in _modules_of(one)]
    tensors = [one for part in stored for one in (*part.parameters(), *part.buffers())]
    if not weights_only:
        tensors += [one for optimizer in trainer.optimizers for one in _state_of(optimizer)]
    total = _bytes_of(tensors)
    if not weights_only:
        total += sum(_state_to_come(optimizer) for optimizer in trainer.optimizers)
    return total


def _modules_of(callback: Any) -> list[Any]:
    own = vars(callback).items()
    return [value for name, value in own if name != "_module" and isinstance(value, nn.Module)]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of their storages, each once."""
    storages: dict[tuple[Any, int], int] = {}
    for one in tensors:
        if is_lazy(one) or one.is_meta:
            continue
        try:
            storage = one.untyped_storage()
        except (RuntimeError, NotImplementedError):  # a sparse one has no memory of its own
            continue
        storages[one.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _state_of(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (one for one in state.values() if isinstance(one, Tensor))


def _state_to_come(optimizer: Optimizer) -> int:
    """Bytes of the state that an optimizer has not made yet, where it is one of torch's."""
    total = 0
    each = _STATE_TENSORS.get(type(optimizer).__name__, 0)
    for group in optimizer.param_groups:
        count = each + sum(extra for name, extra in _FURTHER.items() if group.get(name))
        new = [one for one in group["params"] if one.requires_grad and not optimizer.state.get(one)]
        total += count * sum(one.numel() * one.element_size() for one in new if not is_lazy(one))
    return total


def _warn_if_full(directory: str, size: int) -> None:
    place = os.path.abspath(directory)
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return
    if free < size:
        rank_zero_warn(
            f"A checkpoint of this run needs about {size:,} bytes, and {free:,} are free in {directory}: the "
            "first save will fail. Make room, or save somewhere else: ModelCheckpoint(dirpath=...)."
        )
