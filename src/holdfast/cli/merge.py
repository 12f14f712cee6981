"""``holdfast merge``: a sharded checkpoint, a directory, as one ordinary file."""

from __future__ import annotations

import argparse
import os

from holdfast.checkpoint import directories
from holdfast.cli import show
from holdfast.cli.show import Cell, Page
from holdfast.errors import CheckpointIncomplete, CheckpointNotFound, StorageError


def run(arguments: argparse.Namespace) -> int:
    """Merge a directory into a file."""
    source, out = arguments.directory, arguments.out
    if not os.path.lexists(directories.standing(source)):
        raise CheckpointNotFound(f"There is no checkpoint {source}.", path=source)
    if not directories.is_sharded(source):
        what = "a directory" if os.path.isdir(source) else "a file"
        text = f"{source} is {what}, but no sharded checkpoint: there is nothing to merge."
        raise CheckpointIncomplete(text, path=source)
    if os.path.lexists(out) and not arguments.force:
        raise StorageError(f"{out} is there already. Choose another name, or say --force.", path=out)
    from holdfast.checkpoint.merge import merge  # which needs torch

    report = merge(source, out)
    if arguments.json:
        show.as_json({"path": out, "size_bytes": report.size_bytes, "seconds": report.durable_s})
    else:
        Page().line(
            Cell("merged", "green"),
            f"  {show.escape(source)} into {show.escape(out)}",
            Cell(f"  {show.size(report.size_bytes)} in {report.durable_s:.2f} s", "dim"),
        )
    return 0
