"""The sizes of what goes into a model's layers and comes out, from its example input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.utilities.nested import move_to_device

if TYPE_CHECKING:
    from torch import nn

UNKNOWN_SIZE = "?"

Size = list[Any] | str
"""``[6, 4]`` of one tensor, a list of such for several, ``"?"`` for anything else."""


def sizes_of_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[Size, Size]]:
    """Run ``model.example_input_array`` through the model and return each layer's first sizes, in and out.

    A tuple or list is passed as several arguments, a dict as keyword arguments. The model is in evaluation
    mode and without gradients meanwhile. Afterwards every module's mode, every buffer and the generators of
    random numbers are as before: a run with this call is bit-identical to one without. (Only what ``forward``
    itself may do to plain attributes, or to parameters in place, stays done.)

    Args:
        model: The model. Without an example input, or with lazy parameters that it would give their first
            values, nothing is run.
        layers: The submodules to look at, by name. One that is not called is left out of what is returned.
    """
    import torch
    from torch.nn.parameter import is_lazy

    example = getattr(model, "example_input_array", None)
    if example is None or any(is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        return {}
    found: dict[str, tuple[Size, Size]] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = args or tuple(kwargs.values())
            found.setdefault(name, (size_of(inputs[0] if len(inputs) == 1 else inputs), size_of(output)))

        return record

    with ExitStack() as stack:
        for name, layer in layers.items():
            if not isinstance(layer, torch.jit.ScriptModule):
                stack.enter_context(_hooked(layer, recorder(name)))
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.no_grad())
        example = move_to_device(example, getattr(model, "device", torch.device("cpu")))
        precision = getattr(getattr(model, "_trainer", None), "precision_plugin", None)
        if precision is not None:
            example = precision.convert_input(example)
            stack.enter_context(precision.forward_context())
        model.eval()
        if isinstance(example, dict):
            model(**example)
        elif isinstance(example, (list, tuple)):
            model(*example)
        else:
            model(example)
    return found


def size_of(data: Any) -> Size:
    """Return the shape of a tensor as a list, of a list or tuple the list of those of its items."""
    if hasattr(data, "shape"):
        return list(data.shape)
    if isinstance(data, (list, tuple)):
        return [size_of(item) for item in data]
    return UNKNOWN_SIZE


@contextmanager
def _hooked(layer: nn.Module, hook: Any) -> Iterator[None]:
    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run a block in which the model may be called; then modes, buffers and random numbers are as before."""
    import torch

    from holdfast.utilities.seed import isolate_rng

    modes = [(module, module.training) for module in model.modules()]
    # Some layers count or average in buffers even in evaluation mode.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with isolate_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
            for module, mode in modes:
                module.training = mode
