"""``holdfast ls``: what checkpoints a directory holds, from the tails of the files alone."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from holdfast.checkpoint import catalog, choice, commit
from holdfast.checkpoint.catalog import Entry
from holdfast.cli import show
from holdfast.cli.show import Cell, Column
from holdfast.errors import CheckpointNotFound, HoldfastError

_MARKS = {"auto": "cyan", "best": "bold green", "last": "bold"}


class Best(NamedTuple):
    """The best checkpoint by one metric."""

    entry: Entry
    monitor: str
    mode: str
    score: float


class Listing(NamedTuple):
    """What there is."""

    directory: str
    entries: list[Entry]
    same_as: dict[str, str]
    best: list[Best]
    last: Entry | None
    auto: Entry | None
    restore: Entry | None
    temporary: int


def run(arguments: argparse.Namespace) -> int:
    """List a directory; 1 if there is nothing to list."""
    suffixes = tuple(arguments.suffix or (catalog.SUFFIX,))
    try:
        entries = catalog.scan(arguments.directory, arguments.recursive, suffixes)
    except CheckpointNotFound as error:
        show.complain(str(error))
        return 1
    best = list(_best(entries, arguments.monitor, arguments.mode or "min"))
    listing = Listing(
        arguments.directory,
        entries,
        choice.second_names(entries, first=[one.entry.path for one in best]),
        best,
        choice.last(entries),
        choice.auto(entries),
        choice.restore(entries) if len({os.path.dirname(one.path) for one in entries}) == 1 else None,
        _count_temporary(arguments.directory, arguments.recursive),
    )
    if arguments.json:
        show.as_json(_as_json(listing))
    elif entries:
        _print(listing, arguments.monitor)
    else:
        show.complain(_nothing(arguments, suffixes))
    return 0 if entries else 1


def _nothing(arguments: argparse.Namespace, suffixes: tuple[str, ...]) -> str:
    where = arguments.directory
    what = " or ".join(f"*{suffix}" for suffix in suffixes)
    below = 0
    if not arguments.recursive:
        try:
            below = len(catalog.scan(where, recursive=True, suffix=suffixes))
        except HoldfastError:
            pass
    if below:
        return f"No {what} in {where}, but {below} below it: holdfast ls -r {where}"
    return f"No {what} in {where}{' or below it' if arguments.recursive else ''}."


def _best(entries: list[Entry], monitor: str | None, mode: str) -> Iterator[Best]:
    """The best by the metric that was asked for, or by each that a callback has ranked files on."""
    whole = [entry for entry in entries if entry.whole and not entry.foreign]
    scores: dict[tuple[str, str], list[tuple[Entry, float]]] = {}
    if monitor is not None:
        scores[monitor, mode] = [(e, e.metrics[monitor]) for e in whole if monitor in e.metrics]
    else:
        for entry in whole:
            for standing in choice.standings(entry):
                scores.setdefault((standing.monitor, standing.mode), []).append((entry, standing.score))
    for (name, end), scored in scores.items():
        found = choice.best(scored, end)
        if found is not None:
            yield Best(found, name, end, next(score for entry, score in scored if entry is found))


def _count_temporary(directory: str, recursive: bool) -> int:
    places = [place for place, _, _ in os.walk(directory)] if recursive else [directory]
    return sum(commit.is_temporary(name) for place in places for name in _names(place))


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # what was there a moment ago
        return []


# -- JSON ----------------------------------------------------------------------------------------------------


def _as_json(listing: Listing) -> dict[str, Any]:
    return {
        "directory": listing.directory,
        "checkpoints": [_entry_as_json(entry, listing) for entry in listing.entries],
        "best": [
            {
                "path": one.entry.path,
                "monitor": one.monitor,
                "mode": one.mode,
                "score": show.finite(one.score),
            }
            for one in listing.best
        ],
        "last": listing.last.path if listing.last else None,
        "auto": listing.auto.path if listing.auto else None,
        "restore": listing.restore.path if listing.restore else None,
        "temporary_files": listing.temporary,
    }


def _entry_as_json(entry: Entry, listing: Listing) -> dict[str, Any]:
    return {
        "path": entry.path,
        "step": entry.step,
        "epoch": entry.epoch,
        "metrics": {name: show.finite(metric) for name, metric in entry.metrics.items()},
        "size_bytes": entry.size_bytes,
        "saved_at": entry.saved_at,
        "whole": entry.whole,
        "reason": entry.reason,
        "exact": entry.exact,
        "kind": entry.kind,
        "foreign": entry.foreign,
        "same_file_as": listing.same_as.get(entry.path),
    }


# -- text ----------------------------------------------------------------------------------------------------


def _print(listing: Listing, monitor: str | None) -> None:
    page, now = show.Page(), time.time()
    metrics = _metrics(listing, monitor)
    longest = max(len(_name(entry, listing)) for entry in listing.entries)
    shown = list(_fitting(metrics, page.width - longest - 56))
    columns = [
        Column("name", fold=longest > page.width // 2),
        Column("step", right=True), Column("epoch", right=True),
        *(Column(show.escape(name), right=True) for name in shown),
        Column("size", right=True), Column("age", right=True), Column("", fold=True),
    ]  # fmt: skip
    further: dict[str, list[Entry]] = {}
    for entry in listing.entries:
        if entry.path in listing.same_as:
            further.setdefault(listing.same_as[entry.path], []).append(entry)
    rows: list[list[str | Cell]] = []
    for entry in listing.entries:
        if entry.path not in listing.same_as:
            rows.append(_row(entry, listing, shown, now))
            for other in further.get(entry.path, ()):
                blank = [""] * (len(columns) - 2)
                rows.append([Cell(_name(other, listing), "dim"), *blank, Cell("the same file", "dim")])
    files = [entry for entry in listing.entries if entry.path not in listing.same_as]
    total = show.size(sum(entry.size_bytes for entry in files))
    bad = sum(not entry.whole for entry in files)
    head = f"  {show.plural(len(files), 'checkpoint')}, {total}"
    page.line(
        Cell(show.escape(listing.directory), "bold"), head, Cell(f", {bad} not whole" if bad else "", "red")
    )
    page.table(columns, rows)
    for footer in _footers(listing, len(metrics) - len(shown)):
        page.line(*footer)


def _metrics(listing: Listing, monitor: str | None) -> list[str]:
    """Which metrics there are: what files are ranked by first."""
    names = [monitor] if monitor else [one.monitor for one in listing.best]
    names += [name for entry in listing.entries for name in entry.metrics]
    return list(dict.fromkeys(names))


def _fitting(metrics: list[str], width: int) -> Iterator[str]:
    """The first few, as many as a terminal has room for; one in any case."""
    for index, name in enumerate(metrics):
        width -= max(8, len(name)) + 2
        if width < 0 and index:
            return
        yield name


def _name(entry: Entry, listing: Listing) -> str:
    return show.escape(os.path.relpath(entry.path, listing.directory))


def _row(entry: Entry, listing: Listing, metrics: list[str], now: float) -> list[str | Cell]:
    notes = []
    for one in listing.best:
        if one.entry is entry:
            notes.append("best" if len(listing.best) == 1 else f"best {show.escape(one.monitor)}")
    names = {path for path, first in listing.same_as.items() if first == entry.path} | {entry.path}
    if listing.last is not None and listing.last.path in names:
        notes.append("last")
    if any(start is not None and start.path in names for start in (listing.auto, listing.restore)):
        notes.append("auto")
    style = next(
        (style for mark, style in _MARKS.items() if mark in notes or mark in " ".join(notes).split()), ""
    )
    if entry.foreign:
        notes.append("foreign")
    elif entry.whole and entry.kind == "weights":
        notes.append("weights only")
    elif entry.whole and not entry.exact:
        notes.append("inexact")
    if not entry.whole:
        notes, style = [*notes, "" if entry.foreign else "not whole"], "yellow" if entry.foreign else "red"
    return [
        Cell(_name(entry, listing), "bold" if style and entry.whole else ""),
        "" if entry.step is None else str(entry.step),
        "" if entry.epoch is None else str(entry.epoch),
        *(show.number(entry.metrics[name]) if name in entry.metrics else "" for name in metrics),
        show.size(entry.size_bytes),
        show.age(now - entry.saved_at) if entry.saved_at else "",
        Cell(", ".join(filter(None, notes)), style),
    ]


def _footers(listing: Listing, hidden: int) -> Iterator[list[str | Cell]]:
    for one in listing.best:
        label = f"{show.escape(one.monitor)} {show.number(one.score)} ({one.mode})"
        yield [Cell("best", "dim"), f"  {_name(one.entry, listing)}  {label}"]
    told = []
    if listing.auto is not None:
        told.append(f'ckpt_path="auto" would go on from {_start(listing.auto, listing)}')
    if listing.restore is not None:
        told.append(f"Checkpointer.restore would go on from {_start(listing.restore, listing)}")
    if not told and any(not entry.whole for entry in listing.entries):
        told.append('ckpt_path="auto" would refuse: not one of these is whole')
    elif not told and all(entry.kind == "weights" for entry in listing.entries):
        told.append('ckpt_path="auto" would start afresh: these hold weights only')
    for line in told:
        yield [Cell("auto", "dim"), f"  {line}"]
    for entry in listing.entries:
        if not entry.whole and entry.path not in listing.same_as:
            yield [Cell("note", "dim"), f"  {_name(entry, listing)}: {show.escape(entry.reason)}"]
    if hidden > 0:
        yield [Cell(f"{show.plural(hidden, 'more metric')}: a wider terminal or --json shows them", "dim")]
    if listing.temporary:
        files = show.plural(listing.temporary, "temporary file")
        yield [
            Cell(f"{files} of a save that is under way, or that was killed: the next save tidies up", "dim")
        ]


def _start(entry: Entry, listing: Listing) -> str:
    return _name(entry, listing) + ("" if entry.step is None else f" at step {entry.step}")
