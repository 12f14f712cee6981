"""``holdfast verify``: whether every byte of files, or of all files in directories, is as it was written."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint import catalog, choice, contents, directories, origin
from holdfast.checkpoint.verify import EVERY_BYTE, NOTHING, ZIP_CHECKSUMS, verify
from holdfast.cli import show
from holdfast.cli.show import Cell, Page
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointNotFound,
    HoldfastError,
)

LENGTHS = "lengths"
_CHECKED = {
    EVERY_BYTE: "every byte",
    ZIP_CHECKSUMS: "torch's checksums; what lies between them has none",
    LENGTHS: "lengths alone; safetensors has no checksums",
    NOTHING: "not checked; this format of torch has no checksums",
}
_STYLES = {"ok": "green", "bad": "bold red", "unread": "yellow", "same": "dim", "unchecked": "yellow"}


@dataclass
class Verdict:
    """What became of one file.

    Attributes:
        state: "ok", "bad", "unread" (it could not be read), "unchecked" or "same" (as one that was verified).
        checked: what was: one of the words above.
        error: what is wrong.
    """

    path: str
    state: str
    size_bytes: int = 0
    checked: str | None = None
    error: str | None = None
    same_as: str | None = None


def run(arguments: argparse.Namespace) -> int:
    """Verify; 1 if a file is bad, else 2 if one could not be read or there is none."""
    began = time.monotonic()
    page = Page()
    verdicts: list[Verdict] = []
    paths = list(_files(arguments.paths))
    seen: dict[tuple[int, int], str] = {}
    for number, (path, explicit) in enumerate(paths, 1):
        verdict = _one(path, explicit, seen, f"{number} of {len(paths)}")
        if verdict is not None:
            verdicts.append(verdict)
            if not arguments.json:
                _print(page, verdict)
    seconds = time.monotonic() - began
    states = [verdict.state for verdict in verdicts]
    if arguments.json:
        show.as_json({"ok": bool(states) and not {"bad", "unread"} & set(states), "files": _rows(verdicts)})
    elif len(verdicts) != 1:
        _print_sum(page, verdicts, seconds)
    if "bad" in states:
        return 1
    return 2 if "unread" in states or not states else 0


def _files(paths: list[str]) -> Iterator[tuple[str, bool]]:
    """Each file that is meant, and whether it was named itself."""
    for path in paths:
        if os.path.isdir(path) and not directories.is_sharded(path):
            entries = catalog.scan(path, recursive=True)
            if not entries:
                show.complain(f"No *{catalog.SUFFIX} in {path} or below it.")
            yield from sorted((entry.path, False) for entry in entries)
        else:
            yield path, True


def _one(path: str, explicit: bool, seen: dict[tuple[int, int], str], place: str) -> Verdict | None:
    if os.path.islink(path) and not os.path.exists(path):
        return Verdict(path, "unread", error="It is a link to a file that does not exist.")
    size = _size(path)
    try:
        first = seen.setdefault(choice.identity(path), path)
    except OSError:  # a URL, or a name of nothing, which verify() has words for
        first = path
    if first != path:
        return Verdict(path, "same", size, same_as=first)
    with _Progress(place, path, size):
        try:
            return _verified(path)
        except CheckpointNotFound as error:
            gone = not explicit and not os.path.lexists(path)  # deleted since it was listed, for a newer one
            return None if gone else Verdict(path, "unread", error=str(error))
        except (CheckpointCorrupt, CheckpointIncomplete) as error:
            return Verdict(path, "bad", size, error=str(error).partition("\nNewest whole checkpoint")[0])
        except HoldfastError as error:
            return Verdict(path, "unread", error=str(error))


def _size(path: str) -> int:
    """Length of a file, or of the files of a directory."""
    with contextlib.suppress(OSError):
        if directories.is_sharded(path):
            place = directories.standing(path)
            return sum(item.stat().st_size for item in os.scandir(place))
        return os.stat(path).st_size
    return 0


def _verified(path: str) -> Verdict:
    try:
        report = verify(path)
    except CheckpointIncomplete:
        size_bytes = _safetensors_size(path)
        if size_bytes is None:
            raise
        return Verdict(path, "ok", size_bytes, LENGTHS)
    state = "unchecked" if report.checked == NOTHING else "ok"
    return Verdict(path, state, report.size_bytes, report.checked)


def _safetensors_size(path: str) -> int | None:
    """The size of a safetensors file whose header fits it; None for any other file."""
    if not path.endswith(".safetensors") or origin.is_url(path):
        return None
    try:
        with contents.opened(path) as opened:
            return opened.size_bytes if opened.maker == "safetensors" else None
    except CheckpointError as error:
        if "safetensors" in str(error).partition(" is not ")[2]:
            raise
        return None


class _Progress:
    """Says on a terminal which file is being read, until it has been."""

    def __init__(self, place: str, path: str, size_bytes: int) -> None:
        self._text = f"verifying {place}: {show.escape(os.path.basename(path))} ({show.size(size_bytes)})"
        self._shown = sys.stderr.isatty() and size_bytes > 50_000_000

    def __enter__(self) -> None:
        if self._shown:
            sys.stderr.write(f"\r{self._text[:78]}")
            sys.stderr.flush()

    def __exit__(self, *error: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _print(page: Page, verdict: Verdict) -> None:
    path = show.escape(verdict.path)
    mark = Cell(f"{verdict.state:<11}", _STYLES[verdict.state])
    if verdict.error is not None:
        page.line(mark, path)
        for line in verdict.error.split("\n"):
            page.line(show.escape(line), indent=11)
        return
    if verdict.same_as is not None:
        page.line(mark, path, Cell(f"  the same file as {show.escape(verdict.same_as)}", "dim"))
        return
    page.line(
        mark, path, Cell(f"  {show.size(verdict.size_bytes)}  {_CHECKED[verdict.checked or NOTHING]}", "dim")
    )


def _print_sum(page: Page, verdicts: list[Verdict], seconds: float) -> None:
    if not verdicts:
        return
    count = {state: sum(one.state == state for one in verdicts) for state in _STYLES}
    size_bytes = sum(one.size_bytes for one in verdicts if one.state != "same")
    parts = [f"{count['ok']} ok"]
    parts += [f"{count[state]} {words}" for state, words in _WORDS.items() if count[state]]
    if count["same"]:
        parts.append(show.plural(count["same"], "further name"))
    text = f"{show.plural(len(verdicts), 'file')}: {', '.join(parts)}"
    page.line(Cell(text, "bold"), f"  {show.size(size_bytes)} in {seconds:.2f} s")


_WORDS = {"bad": "bad", "unread": "could not be read", "unchecked": "not checked"}


def _rows(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [
        {
            "path": one.path,
            "state": one.state,
            "size_bytes": one.size_bytes,
            "checked": one.checked,
            "error": one.error,
            "same_file_as": one.same_as,
        }
        for one in verdicts
    ]
