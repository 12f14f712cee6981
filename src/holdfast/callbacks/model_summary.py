"""The table of the model's parts, printed when fit starts."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.base import Callback
from holdfast.utilities import model_summary

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class ModelSummary(Callback):
    """Print the model's parts when fit starts: name, type, parameters, whether they train, sizes.

    Derive and override `show` to present the summary in another way.

    Args:
        max_depth: How deep to go into submodules; 0 prints the total alone, -1 goes all the way.
        **summarize_kwargs: Accepted for compatibility.

    Raises:
        ConfigError: ``max_depth`` is below -1.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        model_summary.check_depth(max_depth, f"{type(self).__name__}(max_depth={max_depth!r})")
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table on rank 0.

        Ranks: all of them sum up, because the example input may run through layers that communicate.
        """
        summary = model_summary.summarize(pl_module, self._max_depth)
        if trainer.is_global_zero:
            self.show(summary)

    def show(self, summary: model_summary.ModelSummary) -> None:
        """Print the table on stderr."""
        if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
            print_rich(summary)
        else:
            sys.stderr.write(f"{summary}\n")


def print_rich(summary: model_summary.ModelSummary, header_style: str = "bold") -> None:
    """Print the table with rich, on stderr, as wide as the terminal allows."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)
    columns = summary.columns()
    if columns:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style=header_style)
        for heading in columns:
            number = heading in model_summary.NUMBERS
            table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for cells, state in zip(zip(*columns.values()), columns["state"]):
            table.add_row(*map(Text, cells), style="dim" if state == "frozen" else None)
        console.print(table)
    name, _, rest = summary.total_line.partition(" ")
    console.print(Text.assemble((name, "bold"), f" {rest}"))
