"""The table that validate and test print."""

from __future__ import annotations

import sys


def show(title: str, per_loader: list[dict[str, float]]) -> None:
    """Print the metrics of each loader: a drawn table on a terminal, plain lines elsewhere."""
    names = sorted({name for metrics in per_loader for name in metrics})
    if not names:
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        table.add_column("metric", style="cyan", no_wrap=True)
        for index in range(len(per_loader)):
            table.add_column("value" if len(per_loader) == 1 else f"loader {index}", justify="right")
        for name in names:
            table.add_row(name, *(_text(metrics.get(name)) for metrics in per_loader))
        Console().print(table)
        return
    width = max(map(len, names))
    for name in names:
        print(f"{title}  {name:<{width}}  " + "  ".join(_text(metrics.get(name)) for metrics in per_loader))


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
