"""What the callbacks that average weights stand on: a copy to keep the average in, and exchanges with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from holdfast.errors import ConfigError
from holdfast.utilities.wrapped_names import matched, plain_state

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

AverageFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAverageFn = Callable[[Any, Any, Any], None]


def averaged_copy(model: nn.Module, device: Any, who: str, **arguments: Any) -> AveragedModel:
    """A copy of the model to keep an average in.

    Args:
        model: Whose copy.
        device: Where the copy lives; None for where the model is.
        who: The callback, for the message.
        arguments: For `torch.optim.swa_utils.AveragedModel`.

    Raises:
        ConfigError: the model holds something that cannot be copied.
    """
    try:
        with _computed_weights_detached(model):
            return AveragedModel(model, device=device, **arguments)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{who} keeps a copy of {type(model).__name__}, which cannot be copied: {error}. "
            "Leave what cannot be copied out of its __getstate__."
        ) from error


@contextmanager
def _computed_weights_detached(model: nn.Module) -> Iterator[None]:
    """A context in which no tensor that a hook computes, such as the old weight_norm's, stands in the way.

    Each forward computes it anew, in the copy too.
    """
    computed = [
        (vars(part), name, value)
        for part in model.modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for attributes, name, value in computed:
        attributes[name] = value.detach()
    try:
        yield
    finally:
        for attributes, name, value in computed:
            attributes[name] = value


def load_average(average: AveragedModel, weights: Mapping[str, Any], *, strict: bool) -> None:
    """Give the copy the average that a checkpoint holds, whether or not the model was compiled then."""
    copied = average.module
    copied.load_state_dict(matched(weights, copied.state_dict(), copied), strict=strict)


def average_state(average: AveragedModel) -> Mapping[str, Any]:
    """The average for a checkpoint, under the names of a model that is not compiled."""
    return plain_state(average.module.state_dict(), average.module)


def say_averaged(checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint that its ``state_dict`` is an average, not the weights that train."""
    checkpoint.setdefault("holdfast", {})["weights"] = "averaged"


def is_built(model: nn.Module) -> bool:
    """Whether every parameter and buffer has its shape; those of lazy modules get it from the first batch."""
    return not any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers()))


def exchange(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Exchange the values of two lists of tensors in place: optimizers and hooks keep their tensors."""
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            value = mine.detach().clone()
            mine.copy_(other)
            other.copy_(value)


def wait_for_copy(trainer: Trainer) -> None:
    """Return when weights may change: a save in the background may still be copying them."""
    if trainer.engine.copying:
        trainer.engine.wait_for_copy(learn=False)


def combining(avg_fn: AverageFn | None, multi_avg_fn: MultiAverageFn | None) -> MultiAverageFn:
    """The function that updates a list of averaged tensors of one device and dtype, in place.

    Integers take the current value: rounded at each update, their average would never move.
    """

    def combine(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
        first = averaged[0]
        multi, single = multi_avg_fn, avg_fn
        if not (first.is_floating_point() or first.is_complex()):
            multi, single = None, _newest
        elif multi is None and single is None:
            # As AveragedModel chooses: one kernel for all tensors where the device has it.
            if first.device.type == "cpu":
                single = get_swa_avg_fn()
            else:
                multi = get_swa_multi_avg_fn()
        if multi is not None:
            multi(averaged, current, count)
        elif single is not None:
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(single(mine, theirs, count))

    return combine


def _newest(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    return current
