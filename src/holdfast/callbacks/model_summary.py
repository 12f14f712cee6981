"""A table of the model's parts, printed when fit starts."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Callback
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


@dataclass(frozen=True)
class SummaryRow:
    """One submodule, with the parameters in it and below it, each counted once."""

    name: str
    type: str
    parameters: int
    trainable: int
    size_bytes: int

    @property
    def state(self) -> str:
        """``trainable``, ``frozen``, or how much of it is trainable; "" without parameters."""
        if self.parameters == 0:
            return ""
        if self.trainable == 0:
            return "frozen"
        if self.trainable == self.parameters:
            return "trainable"
        return f"{self.trainable / self.parameters:.0%} trainable"


def summarize(module: nn.Module, max_depth: int = 1) -> list[SummaryRow]:
    """List a model's submodules down to ``max_depth``, then the model as a whole under the name "".

    Parameters of lazy modules count 0 until they have a shape. Tied parameters count in every row that
    they are in, and once in the last.

    Args:
        module: The model.
        max_depth: How deep to go; 0 leaves only the last row, -1 goes all the way.
    """
    rows = [
        _row(name, child)
        for name, child in module.named_modules()
        if name and (max_depth == -1 or name.count(".") < max_depth)
    ]
    return [*rows, _row("", module)]


def _row(name: str, module: nn.Module) -> SummaryRow:
    from torch.nn.parameter import is_lazy

    parameters = [p for p in module.parameters() if not is_lazy(p)]
    return SummaryRow(
        name=name,
        type=type(module).__name__,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        size_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def format_count(count: int) -> str:
    """Write a number with 3 significant digits and its unit: ``1.2 M``."""
    number = float(count)
    for unit in ("", " K", " M", " B"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if unit == "" or number >= 99.95 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f} T"


class ModelSummary(Callback):
    """Print the model's parts when fit starts: name, type, parameters, whether they train, size.

    Args:
        max_depth: How deep to go into submodules; 0 prints the total alone, -1 goes all the way.
        **summarize_kwargs: Accepted for compatibility.

    Raises:
        ConfigError: ``max_depth`` is below -1.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        if max_depth < -1:
            raise ConfigError(
                f"ModelSummary(max_depth={max_depth}) means nothing: 1 lists the model's own parts, 0 none, "
                "-1 all levels."
            )
        self._max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, on rank 0."""
        if trainer.is_global_zero and self._max_depth >= -1:
            rows = summarize(pl_module, self._max_depth)
            if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
                _print_rich(rows)
            else:
                sys.stderr.write(plain_table(rows) + "\n")


def total_line(total: SummaryRow) -> str:
    """Say how much there is in all: ``1.2 M parameters, 1.1 M trainable, 4.8 MB``."""
    return (
        f"{format_count(total.parameters)} parameters, {format_count(total.trainable)} trainable, "
        f"{_size_text(total)}"
    )


def plain_table(rows: list[SummaryRow]) -> str:
    """Set the rows as columns of text, with the total below."""
    *parts, total = rows
    cells = [_HEADINGS, *(_cells(row) for row in parts)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([*(lines if parts else []), f"{total.type}: {total_line(total)}"])


def _print_rich(rows: list[SummaryRow]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    *parts, total = rows
    console = Console(stderr=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if column in _RIGHT else "left")
    for row in parts:
        table.add_row(*(Text(cell) for cell in _cells(row)), style="dim" if row.state == "frozen" else None)
    if parts:
        console.print(table)
    console.print(Text(total.type, style="bold"), Text(total_line(total)))


_HEADINGS = ("name", "type", "parameters", "state", "size")
_RIGHT = (2, 4)


def _cells(row: SummaryRow) -> tuple[str, ...]:
    return row.name, row.type, format_count(row.parameters), row.state, _size_text(row)


def _size_text(row: SummaryRow) -> str:
    megabytes = row.size_bytes / 1e6
    return f"{megabytes:.1f} MB" if megabytes >= 0.1 or megabytes == 0 else f"{megabytes:.3f} MB"
