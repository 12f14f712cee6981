"""Statistics of BatchNorm layers for other weights than those that trained: a pass that trains nothing."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.utilities.rank_zero import rank_zero_info
from holdfast.utilities.seed import apart

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def keeps_statistics(layer: nn.Module) -> bool:
    """Whether a layer is a BatchNorm whose statistics training changes; not one that is frozen in eval."""
    return isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None


def renew_statistics(trainer: Trainer, copied: Any) -> list[nn.Module]:
    """Compute the statistics of a copy of the trainer's module, for the copy's weights. Ranks: all.

    Runs the copy's ``training_step`` over the training data of one epoch. Nothing else hears of it: logged
    values go nowhere, generators and samplers are put back, no gradient is computed.

    Args:
        trainer: Whose fit has ended.
        copied: The copy. Its buffers are overwritten by the module's, and changed by the pass.

    Returns:
        The copy's layers with new statistics, in the order of ``modules()``; none where none are kept.
    """
    module = trainer.lightning_module
    for layer, original in zip(copied.modules(), module.modules(), strict=True):
        layer.training = original.training
    for buffer, current in zip(copied.buffers(), module.buffers(), strict=True):
        buffer.copy_(current)
    layers = [layer for layer in copied.modules() if keeps_statistics(layer)]
    if not layers:
        return []
    rank_zero_info("computing the statistics of BatchNorm for the averaged weights")
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches rather than a moving one
    home = next(copied.parameters()).device
    copied.trainer = trainer
    vars(copied).update(log=_ignore, log_dict=_ignore)
    try:
        copied.to(trainer.strategy.root_device)
        _run(trainer, copied)
        if trainer.world_size > 1:
            _average(trainer, layers)
    finally:
        copied.to(home)
        copied.trainer = None
        del copied.log, copied.log_dict
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return layers


def _average(trainer: Trainer, layers: list[Any]) -> None:
    """Give every rank the mean of what the ranks have found, each on its part of the data."""
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log``."""


def _run(trainer: Trainer, module: Any) -> None:
    """``training_step`` on every batch of an epoch, as training would call it."""
    loop = trainer.fit_loop
    assert loop is not None and loop.stream is not None
    stream = loop.stream.another("batch norm")
    transfer = loop.transfer
    context = trainer.precision_plugin.context or nullcontext()
    parameters = inspect.signature(module.training_step).parameters
    takes_index = "batch_idx" in parameters or len(parameters) > 1
    before = stream.begin_state()
    # With gradients, which nobody computes: a loss may hold one of its own, such as a penalty.
    with apart(trainer.seed), torch.enable_grad():
        try:
            for index, batch in enumerate(stream.start(0)):
                if transfer is not None:
                    batch = transfer(batch, 0)
                with context:
                    module.training_step(*((batch, index) if takes_index else (batch,)))
                if index + 1 >= loop.batches:
                    break
        finally:
            stream.close()
            stream.restore_begin(before)
