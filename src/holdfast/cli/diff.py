"""``holdfast diff``: what is different between two files, and how far each module has moved."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from typing import Any

from holdfast.checkpoint import contents
from holdfast.checkpoint.compare import Change, Comparison, Pair, compare, slashed
from holdfast.cli import show
from holdfast.cli.show import Cell, Column, Page

_MOST_ROWS = 40
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters", "hparams")
_STEPS = ("step", "epoch")
_SETTINGS = re.compile(r"(?<=\w)\{.*\}", re.DOTALL)  # what tells two callbacks of one class apart


def run(arguments: argparse.Namespace) -> int:
    """Compare two files; 1 if they differ."""
    with contents.opened(arguments.first) as first, contents.opened(arguments.second) as second:
        found = compare(first, second)
        facts = {name: (_fact(first, name), _fact(second, name)) for name in _STEPS}
    if arguments.json:
        show.as_json(_as_json(arguments, found, facts))
    else:
        _print(Page(), arguments, found, facts)
    return 0 if found.equal else 1


def _fact(opened: contents.Contents, name: str) -> int | None:
    if opened.summary is not None:
        return opened.summary.step if name == "step" else opened.summary.epoch
    top = opened.value if isinstance(opened.value, dict) else {}
    known = top.get("global_step" if name == "step" else name)
    return known if type(known) is int else None


def _sum(pairs: list[Pair]) -> Change:
    """Over several tensors: whole numbers, such as counters of batches, would drown the weights."""
    total = Change()
    for pair in pairs:
        total.add(pair.change if pair.is_measure else Change(pair.change.tensors, pair.change.changed))
    return total


def _modules(pairs: list[Pair], depth: int) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(".".join(pair.name.split(".")[:-1][:depth]), []).append(pair)
    return found


def _models(found: Comparison) -> dict[str, list[Pair]]:
    models: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        if pair.model is not None:
            models.setdefault(pair.model, []).append(pair)
    return models


def _parts(found: Comparison) -> dict[str, list[Pair]]:
    parts: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        if pair.model is None:
            parts.setdefault(pair.name.partition("/")[0], []).append(pair)
    return parts


# -- JSON ----------------------------------------------------------------------------------------------------


def _as_json(arguments: argparse.Namespace, found: Comparison, facts: dict[str, Any]) -> dict[str, Any]:
    hyperparameters = [one for one in found.values if one[0][0] in _HYPERPARAMETERS]
    made: dict[str, Any] = {
        "a": arguments.first,
        "b": arguments.second,
        "equal": found.equal,
        **{name: list(pair) for name, pair in facts.items()},
        "only_in_a": [slashed(path) for path in found.only_first],
        "only_in_b": [slashed(path) for path in found.only_second],
        "shapes": [{"name": name, "a": list(a), "b": list(b)} for name, a, b in found.shapes],
        "dtypes": [{"name": name, "a": a, "b": b} for name, a, b in found.dtypes],
        "hyper_parameters": [{"name": slashed(path[1:]), "a": a, "b": b} for path, a, b in hyperparameters],
        "values": [
            {"path": slashed(path), "a": a, "b": b}
            for path, a, b in found.values
            if path[0] not in _HYPERPARAMETERS
        ],
        "models": [
            {
                "key": key,
                **_change(_sum(pairs)),
                "modules": [
                    {"name": name, **_change(_sum(inside))} for name, inside in _modules(pairs, 1000).items()
                ],
            }
            for key, pairs in _models(found).items()
        ],
        "parts": [{"key": key, **_change(_sum(pairs))} for key, pairs in _parts(found).items()],
    }
    if arguments.tensors:
        made["tensors"] = [
            {"name": pair.name, "model": pair.model, **_change(pair.change)}
            for pair in found.pairs
            if pair.change.changed
        ]
    return made


def _change(change: Change) -> dict[str, Any]:
    return {
        "tensors": change.tensors,
        "changed": change.changed,
        "relative_change": show.finite(change.relative),
        "largest_change": show.finite(change.largest),
    }


# -- text ----------------------------------------------------------------------------------------------------


def _print(page: Page, arguments: argparse.Namespace, found: Comparison, facts: dict[str, Any]) -> None:
    for letter, path in (("A", arguments.first), ("B", arguments.second)):
        index = "AB".index(letter)
        told = [f"{name} {pair[index]}" for name, pair in facts.items() if pair[index] is not None]
        page.line(Cell(letter, "bold"), f"  {show.escape(path)}", Cell(f"  {'  '.join(told)}", "dim"))
    tensors = show.plural(len(found.pairs), "tensor")
    if found.equal:
        page.line()
        page.line(Cell("equal", "bold green"), f"  {tensors} and all values are the same, bit for bit")
        return
    _print_only(page, "only in A", found.only_first)
    _print_only(page, "only in B", found.only_second)
    shapes = [(show.escape(n), show.shape(a), show.shape(b)) for n, a, b in found.shapes]
    _print_table(page, "other shapes", shapes)
    _print_table(
        page, "other dtypes", [(show.escape(n), show.escape(a), show.escape(b)) for n, a, b in found.dtypes]
    )
    _print_values(page, found)
    for key, pairs in _models(found).items():
        _print_model(page, key, pairs)
    _print_parts(page, found)
    if arguments.tensors:
        page.line()
        page.line(Cell("every tensor that has changed", "bold"))
        rows = [_row(show.escape(pair.name), pair.change) for pair in found.pairs if pair.change.changed]
        page.table(_COLUMNS, rows)


def _print_only(page: Page, title: str, paths: list[tuple[str, ...]]) -> None:
    if not paths:
        return
    page.line()
    page.line(Cell(title, "bold"))
    for path in paths[:_MOST_ROWS]:
        page.line(show.escape(slashed(tuple(_SETTINGS.sub("", part) for part in path))), indent=2)
    _more(page, len(paths))


def _more(page: Page, count: int) -> None:
    if count > _MOST_ROWS:
        page.line(Cell(f"  ... {count - _MOST_ROWS:,} more: --json has them all", "dim"))


def _print_table(page: Page, title: str, rows: list[tuple[str, str, str]]) -> None:
    if rows:
        page.line()
        page.line(Cell(title, "bold"))
        page.table(
            [Column("name", fold=True), Column("A", fold=True), Column("B", fold=True)], rows[:_MOST_ROWS]
        )
        _more(page, len(rows))


def _print_values(page: Page, found: Comparison) -> None:
    """Hyperparameters and the optimizers' options are shown; of all else, how much of it differs."""
    rows: list[tuple[str, str, str]] = []
    options: list[tuple[str, str, str]] = []
    others: dict[str, int] = {}
    for path, a, b in found.values:
        if path[0] in _HYPERPARAMETERS:
            rows.append((show.escape(slashed(path[1:])), show.value(a), show.value(b)))
        elif "param_groups" in path or path[0] == "lr_schedulers":
            options.append((show.escape(slashed(path)), show.value(a), show.value(b)))
        elif path not in (("epoch",), ("global_step",)):  # these stand at the top
            others[path[0]] = others.get(path[0], 0) + 1
    _print_table(page, "hyperparameters", rows)
    _print_table(page, "optimizers and schedulers", options)
    if others:
        page.line()
        told = ", ".join(f"{show.escape(key)} {count}" for key, count in others.items())
        page.line(Cell("other values", "bold"), f"  {told} (--json shows them)")


_COLUMNS = [
    Column("module", fold=True), Column("tensors", right=True), Column("changed", right=True),
    Column("relative", right=True), Column("largest", right=True),
]  # fmt: skip


def _print_model(page: Page, key: str, pairs: list[Pair]) -> None:
    total = _sum(pairs)
    page.line()
    title = show.escape(key) or "tensors"
    if not total.changed:
        page.line(Cell(title, "bold"), f"  {show.plural(total.tensors, 'tensor')}, all equal bit for bit")
        return
    page.line(Cell(title, "bold"), f"  {total.changed:,} of {show.plural(total.tensors, 'tensor')} changed")
    page.table(_COLUMNS, [*_module_rows(pairs), _row("(all)", total)])


def _module_rows(pairs: list[Pair]) -> Iterator[list[str | Cell]]:
    """As deep as fits a screen."""
    depth = 1
    while depth < 30:
        deeper = _modules(pairs, depth + 1)
        if len(deeper) > _MOST_ROWS or (len(deeper) == len(_modules(pairs, depth)) and depth > 6):
            break
        depth += 1
    rows = _modules(pairs, depth)
    for name, inside in list(rows.items())[:_MOST_ROWS]:
        yield _row(show.escape(name) or ".", _sum(inside))
    if len(rows) > _MOST_ROWS:
        yield [f"... {len(rows) - _MOST_ROWS:,} more", "", "", "", ""]


def _row(name: str, change: Change) -> list[str | Cell]:
    if not change.changed:
        return [Cell(name, "dim"), Cell(str(change.tensors), "dim"), Cell("-", "dim"), "", ""]
    told = [name, str(change.tensors), str(change.changed)]
    if not change.measured:
        return [*told, "", ""]
    return [
        *told,
        _percent(change.relative),
        "?" if math.isnan(change.largest) else show.number(change.largest),
    ]


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "?" if math.isnan(share) else "inf"
    if share >= 10:
        return f"{100 * share:,.0f}%"
    return f"{100 * share:.3g}%" if share >= 1e-5 or not share else f"{100 * share:.1e}%"


def _print_parts(page: Page, found: Comparison) -> None:
    rows = [_row(show.escape(key), _sum(pairs)) for key, pairs in _parts(found).items()]
    if rows:
        page.line()
        page.line(Cell("other tensors", "bold"))
        page.table(_COLUMNS, rows)
