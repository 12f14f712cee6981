"""What DistributedDataParallel's reducer needs to be exact, and to keep nobody waiting."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.utilities.wrapped_names import plain_names

_UNFINISHED = "Expected to have finished reduction in the prior iteration"
_INDICES = re.compile(r"did not receive grad for rank \d+:((?: \d+)+)")


def learned_order(wrapped: DistributedDataParallel) -> list[str] | None:
    """In which order the reducer has its gradients in buckets, by name; None before its first backward.

    Ranks: all. Blocks: until all are here, the first time behind that backward.
    """
    wrapped.reducer._rebuild_buckets()  # it would do so before the next forward
    assert wrapped.logger is not None
    wrapped.logger.set_runtime_stats_and_log()  # where it tells
    told = wrapped._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices")
    names = names_of(wrapped)
    return [names[int(index)] for index in str(told).replace(",", " ").split()] if told else None


def fix_order(wrapped: DistributedDataParallel, order: Sequence[str]) -> None:
    """Have gradients averaged in the same buckets as in another run, from the first step on. Ranks: all.

    The reducer lays its buckets out anew behind its first backward, in the order in which that one gave the
    gradients; and where a gradient lies decides in which order the processes' shares of it are added up. So
    a run that goes on from a checkpoint would begin with another layout than the run that never stopped had
    by then, and differ from it in the last bits. This gives the reducer its first backward: over a sum of
    the parameters, in an order that makes their gradients come as they did in that run.

    No code of anybody's runs, no generator is drawn from, and gradients are as they were.

    Args:
        wrapped: Nothing was averaged by it yet.
        order: What `learned_order` gave in the other run: the same names as here.
    """
    names = names_of(wrapped)
    by_name = dict(zip(names, trained_by(wrapped), strict=True))
    parameters = [by_name[name] for name in reversed(order)]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    with _without_hooks(parameters), torch.enable_grad():
        wrapped.reducer.prepare_for_backward([])
        chain(parameters).backward()
    wrapped.reducer._rebuild_buckets()
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient


def names_of(wrapped: DistributedDataParallel) -> list[str]:
    """The names of the parameters whose gradients are averaged, as `trained_by` lists them."""
    plain = plain_names(wrapped.module)
    names = {id(one): plain(name).removeprefix("module.") for name, one in wrapped.module.named_parameters()}
    return [names[id(parameter)] for parameter in trained_by(wrapped)]


def join_with_zeros(wrapped: DistributedDataParallel) -> None:
    """Take part in the averaging of a step that this process has no loss for, with nothing to add.

    Ranks: those without a loss, while the others run backward. Blocks: until all have come as far.
    """
    parameters = trained_by(wrapped)
    if wrapped.find_unused_parameters:
        # Only what is used anywhere gets a gradient: one parameter is enough to take part.
        parameters = parameters[:1]
    with torch.enable_grad():
        total = chain(parameters)
    wrapped.reducer.prepare_for_backward([total] if wrapped.find_unused_parameters else [])
    total.backward(torch.zeros_like(total))


def trained_by(wrapped: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters whose gradients are averaged, in the order in which the reducer numbers them."""
    return list(wrapped._build_params_for_reducer()[0])


def chain(parameters: Sequence[Tensor]) -> Tensor:
    """A number that depends on every parameter; its backward gives gradients from the last to the first."""
    device = parameters[0].device
    total: Tensor | None = None
    for parameter in parameters:
        term = (torch.view_as_real(parameter) if parameter.is_complex() else parameter).sum().to(device)
        total = term if total is None else total + term
    assert total is not None
    return total


@contextmanager
def _without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A block in whose backward nobody's hooks on these parameters run; the reducer's are of another kind."""
    emptied = []
    for parameter in parameters:
        for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)):
            if hooks:
                emptied.append((hooks, dict(hooks)))
                hooks.clear()
    try:
        yield
    finally:
        for hooks, held in emptied:
            hooks.update(held)


def without_gradient(wrapped: DistributedDataParallel, error: RuntimeError) -> list[str] | None:
    """The names of the parameters that the last step did not use, if that is what the error is about."""
    message = str(error)
    if _UNFINISHED not in message:
        return None
    found = _INDICES.search(message)
    names = names_of(wrapped)
    return [names[index] for index in (map(int, found.group(1).split()) if found else ())]


def broadcast_tensors(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every process rank 0's values, in place. Ranks: all. Blocks: until they have arrived."""
    values = [tensor.detach() for tensor in tensors if tensor.numel()]
    under_way = [dist.broadcast(value, 0, group=group, async_op=True) for value in values]
    for one in under_way:
        if one is not None:
            one.wait()
