"""Text for a terminal or a pipe: what a file says is escaped, columns are aligned, a pipe gets no colours.

Where the output is a terminal, rich lays it out for its width; elsewhere nothing is wrapped or cut.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple


def escape(text: object) -> str:
    r"""Text that cannot drive a terminal: what is not printable is written as ``\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def size(size_bytes: float) -> str:
    """A size with its unit, in powers of 1000: ``1.2 MB``."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size_bytes /= 1000
        if size_bytes < 999.95:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1000:.1f} TB"


def number(value: float) -> str:
    """A number with 4 significant digits."""
    return f"{value:.4g}"


def age(seconds: float) -> str:
    """How long ago something was, in its largest unit: ``3 min``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def plural(count: int, what: str, many: str | None = None) -> str:
    """``1 tensor``, ``2,304 tensors``."""
    return f"{count:,} {what if count == 1 else many or what + 's'}"


def value(found: Any, limit: int = 60) -> str:
    """A value as one would write it, on one line and cut if it is long."""
    if isinstance(found, dict) and {"tensor", "shape"} == set(found):
        text = f"tensor {found['tensor']} {shape(found['shape'])}"
    elif isinstance(found, dict) and {"class"} == set(found):
        text = f"<{found['class']}>"
    else:
        text = found if isinstance(found, str) and found and found == found.strip() else _written(found)
    text = escape(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _written(found: Any) -> str:
    if isinstance(found, float):
        return f"{found:.6g}"
    if isinstance(found, dict):
        return "{" + ", ".join(f"{key}: {_written(one)}" for key, one in list(found.items())[:50]) + "}"
    if isinstance(found, list):
        return "[" + ", ".join(_written(one) for one in found[:50]) + "]"
    return repr(found)


def shape(lengths: Sequence[int]) -> str:
    """``64 x 3 x 7``; a number by itself is ``scalar``."""
    return " x ".join(map(str, lengths)) or "scalar"


def finite(found: Any) -> Any:
    """A float as JSON has it: those that it lacks become text."""
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found


def as_json(found: dict[str, Any]) -> None:
    """Print one object, the same for a terminal and a pipe."""
    sys.stdout.write(json.dumps(found, indent=2, allow_nan=False).replace("\x7f", "\\u007f") + "\n")


def complain(message: str) -> None:
    """Print an error's message to stderr."""
    text = "\n".join(escape(line) for line in message.split("\n"))
    sys.stderr.write(f"holdfast: {text}\n")


class Column(NamedTuple):
    """A column of a table."""

    title: str
    right: bool = False
    fold: bool = False
    """Whether a narrow terminal may break its text into lines."""


class Cell(NamedTuple):
    """A text in a table with how a terminal shows it: any of rich's styles."""

    text: str
    style: str = ""


class Page:
    """What a command prints to stdout."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self._console: Any = None

    @property
    def width(self) -> int:
        """Columns of the terminal; a pipe has no end of them."""
        return int(self.console.width) if self.terminal else 10_000

    @property
    def console(self) -> Any:
        """Rich's, made when it is needed."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(markup=False, emoji=False, highlight=False)
        return self._console

    def line(self, *parts: str | Cell, indent: int = 0) -> None:
        """Print a line made of parts; what comes from a file has to be escaped.

        Args:
            parts: its text.
            indent: columns that it stands in from the left, and on a terminal also what it continues in.
        """
        cells = [part if isinstance(part, Cell) else Cell(part) for part in parts]
        if not self.terminal:
            sys.stdout.write(f"{' ' * indent}{''.join(cell.text for cell in cells)}".rstrip() + "\n")
            return
        from rich.padding import Padding
        from rich.text import Text

        text = Text(overflow="fold")
        for cell in cells:
            text.append(cell.text, style=cell.style or None)
        self.console.print(Padding(text, (0, 0, 0, indent)) if indent else text)

    def table(
        self, columns: Sequence[Column], rows: Sequence[Sequence[str | Cell]], *, header: bool = True
    ) -> None:
        """Print rows under their titles, indented by two; columns that are empty throughout are left out."""
        if not rows:
            return
        cells = [[one if isinstance(one, Cell) else Cell(one) for one in row] for row in rows]
        used = [index for index in range(len(columns)) if any(row[index].text for row in cells)]
        columns, cells = [columns[i] for i in used], [[row[i] for i in used] for row in cells]
        if self.terminal:
            self._rich_table(columns, cells, header)
            return
        titles = [Cell(column.title) for column in columns]
        whole = [titles, *cells] if header else cells
        widths = [max(len(row[index].text) for row in whole) for index in range(len(columns))]
        for row in whole:
            parts = [
                cell.text.rjust(width) if column.right else cell.text.ljust(width)
                for cell, width, column in zip(row, widths, columns, strict=True)
            ]
            sys.stdout.write(f"  {'  '.join(parts)}".rstrip() + "\n")

    def _rich_table(self, columns: Sequence[Column], rows: list[list[Cell]], header: bool) -> None:
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=header, header_style="dim")
        for column in columns:
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                no_wrap=not column.fold,
                overflow="fold" if column.fold else "ellipsis",
            )
        for row in rows:
            table.add_row(*(Text(cell.text, style=cell.style) for cell in row))
        self.console.print(Padding(table, (0, 0, 0, 2)))
