"""What a model is made of: its submodules with their parameters, modes and sizes, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.errors import ConfigError
from holdfast.utilities.example_forward import UNKNOWN_SIZE, Size, sizes_of_layers

if TYPE_CHECKING:
    from torch import nn

OWN_PARAMETERS = "own parameters"


@dataclass(frozen=True)
class LayerSummary:
    """One submodule, with the parameters in it and below it, each counted once."""

    name: str
    layer_type: str
    num_parameters: int
    trainable_parameters: int
    size_bytes: int
    training: bool
    in_size: Size = UNKNOWN_SIZE
    out_size: Size = UNKNOWN_SIZE

    @property
    def state(self) -> str:
        """``trainable``, ``frozen``, or how much of it is trainable; "" without parameters."""
        if self.num_parameters == 0:
            return ""
        if self.trainable_parameters == 0:
            return "frozen"
        if self.trainable_parameters == self.num_parameters:
            return "trainable"
        return f"{self.trainable_parameters / self.num_parameters:.0%} trainable"


class ModelSummary:
    """A model's submodules down to ``max_depth``, and the model as a whole; ``str()`` gives the table.

    Tied parameters count in every layer that they are in, and once in all. Parameters of lazy modules count
    0 until they have a shape. With an ``example_input_array`` the sizes of what goes in and comes out are
    there too; finding them leaves the model and the random numbers as they were.

    Args:
        model: The model.
        max_depth: How deep to go into submodules: 1 lists the model's own, 0 none, -1 all levels.

    Raises:
        ConfigError: ``max_depth`` is not such a number.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        check_depth(max_depth, f"ModelSummary(max_depth={max_depth!r})")
        self.max_depth = max_depth
        self._named = [
            (name, module)
            for name, module in model.named_modules()
            if name and (max_depth == -1 or name.count(".") < max_depth)
        ]
        sizes = sizes_of_layers(model, dict(self._named)) if self._named else {}
        self.has_sizes = bool(sizes)
        self.layers = [_layer(name, module, *sizes.get(name, ())) for name, module in self._named]
        self.model = _layer("", model)
        own = model._parameters.values()
        self.own_parameters = sum(p.numel() for p in own if p is not None and not _is_lazy(p))
        modes = [module.training for module in model.modules() if module is not model]
        self.total_training_modes = {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The listed submodules."""
        return self._named

    @property
    def layer_names(self) -> list[str]:
        """Their names."""
        return [layer.name for layer in self.layers]

    @property
    def layer_types(self) -> list[str]:
        """Their classes' names."""
        return [layer.layer_type for layer in self.layers]

    @property
    def param_nums(self) -> list[int]:
        """How many parameters each has."""
        return [layer.num_parameters for layer in self.layers]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each is in training mode."""
        return [layer.training for layer in self.layers]

    @property
    def in_sizes(self) -> list[Size]:
        """The size of each one's input."""
        return [layer.in_size for layer in self.layers]

    @property
    def out_sizes(self) -> list[Size]:
        """The size of each one's output."""
        return [layer.out_size for layer in self.layers]

    @property
    def total_parameters(self) -> int:
        """Parameters in all, each counted once."""
        return self.model.num_parameters

    @property
    def trainable_parameters(self) -> int:
        """Of these, how many are trained."""
        return self.model.trainable_parameters

    @property
    def total_layer_params(self) -> int:
        """The sum over the listed submodules."""
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """Megabytes (10^6 bytes) that the parameters take in memory."""
        return self.model.size_bytes / 1e6

    @property
    def total_line(self) -> str:
        """How much there is in all: ``Net: 1.2 M parameters, 1.1 M trainable, 4.8 MB``."""
        in_eval = self.total_training_modes["eval"]
        return (
            f"{self.model.layer_type}: {format_count(self.total_parameters)} parameters, "
            f"{format_count(self.trainable_parameters)} trainable, {format_size(self.model.size_bytes)}"
            + (f", {in_eval} module{'s' * (in_eval != 1)} in eval mode" if in_eval else "")
        )

    def columns(self) -> dict[str, list[str]]:
        """The table's columns by heading; empty when no submodule is listed."""
        if not self.layers:
            return {}
        layers, counts = self.layers, self.param_nums
        own, blank = [], []
        if self.own_parameters:
            own, blank, counts = [OWN_PARAMETERS], [""], [*counts, self.own_parameters]
        columns = {
            "name": [*self.layer_names, *own],
            "type": [*self.layer_types, *blank],
            "parameters": [format_count(count) for count in counts],
            "state": [*(layer.state for layer in layers), *blank],
            "size": [*(format_size(layer.size_bytes) for layer in layers), *blank],
        }
        if len({layer.training for layer in layers}) > 1:
            columns["mode"] = [*("train" if layer.training else "eval" for layer in layers), *blank]
        if self.has_sizes:
            columns["in"] = [*(str(size) for size in self.in_sizes), *blank]
            columns["out"] = [*(str(size) for size in self.out_sizes), *blank]
        return columns

    def __str__(self) -> str:
        lines = []
        for heading, cells in self.columns().items():
            column = [heading, *cells]
            width = max(map(len, column))
            lines.append([c.rjust(width) if heading in NUMBERS else c.ljust(width) for c in column])
        return "\n".join([*("  ".join(line).rstrip() for line in zip(*lines)), self.total_line])

    __repr__ = __str__


NUMBERS = ("parameters", "size")
"""Headings whose column is aligned to the right."""


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Return the `ModelSummary` of a model, down to ``max_depth`` levels."""
    return ModelSummary(lightning_module, max_depth)


def check_depth(max_depth: int, what: str) -> None:
    """Raise unless ``max_depth`` is -1, 0 or more.

    Raises:
        ConfigError: It is not; the message begins with ``what``.
    """
    if not isinstance(max_depth, int) or max_depth < -1:
        raise ConfigError(
            f"{what} means nothing: 1 lists the model's own parts, 0 none, 2 their parts too, -1 all levels."
        )


def format_count(count: int) -> str:
    """Write a number with 3 significant digits and its unit: ``1.2 M``."""
    number = float(count)
    for unit in ("", " K", " M", " B"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if unit == "" or number >= 99.95 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.1f} T" if number < 99.95 else f"{number:,.0f} T"


def format_size(size_bytes: int) -> str:
    """Write a number of bytes with its unit: ``4.8 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def _layer(
    name: str, module: nn.Module, in_size: Size = UNKNOWN_SIZE, out_size: Size = UNKNOWN_SIZE
) -> LayerSummary:
    parameters = [p for p in module.parameters() if not _is_lazy(p)]
    return LayerSummary(
        name=name,
        layer_type=type(module).__name__,
        num_parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        size_bytes=sum(p.numel() * p.element_size() for p in parameters),
        training=module.training,
        in_size=in_size,
        out_size=out_size,
    )


def _is_lazy(parameter: nn.Parameter) -> bool:
    from torch.nn.parameter import is_lazy

    return bool(is_lazy(parameter))
