"""Arguments, errors and exit codes of the command ``holdfast``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import holdfast
from holdfast.cli import diff, inspect, ls, merge, show, verify
from holdfast.errors import HoldfastError

FINE, FOUND, TROUBLE = 0, 1, 2
_BROKEN_PIPE, _INTERRUPTED = 141, 130  # what a shell says of a process that such a signal has ended

_EXAMPLES = """\
examples:
  holdfast ls -r runs                      all checkpoints below runs
  holdfast inspect runs/a/last.ckpt        also .pt, .pth, .safetensors and URLs
  holdfast verify runs && echo "all good"
  holdfast diff runs/a/last.ckpt runs/b/last.ckpt
  holdfast merge runs/c/last.ckpt one.ckpt

exit code: 0 fine, 1 something bad or different was found, 2 cannot be read
"""

_LS = """\
List the checkpoints in a directory, newest first: step, epoch, metrics, size,
age, which are not whole and why, which is the best and which the last, and
where ckpt_path="auto" would start. Further names of one file are said so.
Only the files' last kilobytes are read; `holdfast verify` reads every byte."""

_INSPECT = """\
Show what a checkpoint holds: its parameters by module, hyperparameters,
optimizers and all the rest, and what takes how much room. Reads files of
holdfast, PyTorch Lightning, torch.save and safetensors. No tensor is read, and
nothing in the file is run: a class that it names is shown by its name."""

_VERIFY = """\
Read every byte of checkpoints and compare its checksum; name the tensor that
is bad. Directories are searched to the bottom; one that is a sharded
checkpoint is checked file by file. Files of torch.save and
PyTorch Lightning have a checksum for each record too, but none for what is
around them; other files have none, and that is said."""

_DIFF = """\
Show what is different between two checkpoints: keys, shapes, dtypes,
hyperparameters, and how far each module's weights have moved: the L2 norm of
the change over that of A's numbers, and the largest change. A model alone in
each file is compared with the other, whatever wrote it."""


_MERGE = """\
Write a sharded checkpoint, the directory that strategy="fsdp" saves, as one
ordinary file: what one process would have saved. Every byte is checked first,
and tensors are streamed: it takes a few megabytes of memory beside what is not
in shards. The directory stays as it is."""


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    top = argparse.ArgumentParser(
        prog="holdfast",
        description="Look at checkpoints: which there are, what is in them, whether they are whole.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"holdfast {holdfast.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], short: str, long: str, examples: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=short,
            description=long,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    one = command(
        "ls", ls.run, "what checkpoints a directory holds", _LS,
        "  holdfast ls lightning_logs/version_0/checkpoints\n"
        "  holdfast ls -r runs --monitor val_acc --mode max\n"
        "  holdfast ls runs/a --json | jq -r .auto\n",
    )  # fmt: skip
    one.add_argument("directory", metavar="DIR", nargs="?", default=".", help="where to look (default: here)")
    one.add_argument("-r", "--recursive", action="store_true", help="look into the directories below it too")
    one.add_argument("--monitor", metavar="NAME", help="rank by this metric (default: as the files were)")
    one.add_argument("--mode", choices=("min", "max"), help="which end of it is better (default: min)")
    one.add_argument("--suffix", metavar="EXT", action="append", help="how names end (default: .ckpt)")

    two = command(
        "inspect", inspect.run, "what a checkpoint holds", _INSPECT,
        "  holdfast inspect runs/a/last.ckpt\n"
        "  holdfast inspect model.safetensors --tensors\n"
        "  holdfast inspect last.ckpt --json | jq .hyper_parameters.lr\n",
    )  # fmt: skip
    two.add_argument("file", metavar="FILE", help="a checkpoint, or the URL of one")
    two.add_argument("--tensors", action="store_true", help="list each tensor, the optimizers' too")

    three = command(
        "verify", verify.run, "whether every byte is as it was written", _VERIFY,
        "  holdfast verify runs/a/last.ckpt\n"
        "  holdfast verify runs && rsync -a runs backup:\n",
    )  # fmt: skip
    three.add_argument("paths", metavar="PATH", nargs="+", help="files, or directories of them")

    four = command(
        "diff", diff.run, "what is different between two checkpoints", _DIFF,
        "  holdfast diff epoch=1.ckpt epoch=2.ckpt\n"
        "  holdfast diff last.ckpt exported.safetensors --tensors\n",
    )  # fmt: skip
    four.add_argument("first", metavar="A", help="a checkpoint, or the URL of one")
    four.add_argument("second", metavar="B", help="another")
    four.add_argument("--tensors", action="store_true", help="list each tensor that has changed")

    five = command(
        "merge", merge.run, "a sharded checkpoint as one file", _MERGE,
        "  holdfast merge runs/a/last.ckpt merged.ckpt\n",
    )  # fmt: skip
    five.add_argument("directory", metavar="DIR", help="a sharded checkpoint")
    five.add_argument("out", metavar="OUT", help="the file to write")
    five.add_argument("--force", action="store_true", help="replace OUT if it is there")

    for each in (one, two, three, four, five):
        each.add_argument("--json", action="store_true", help="print one JSON object; see docs/command.md")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments; those of the process by default.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; the interpreter would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(argv: list[str]) -> int:
    made = parser()
    if not argv:
        made.print_help()
        return TROUBLE
    try:
        arguments = made.parse_args(argv)
    except SystemExit as end:  # argparse has said what there is to say
        return int(end.code or 0)
    try:
        code: int = arguments.run(arguments)
        return code
    except BrokenPipeError:
        raise
    except HoldfastError as error:
        show.complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        show.complain(f"{where}{error.strerror or error}.")
    return TROUBLE
