"""Kill a training run in the middle of an epoch, start it again, compare it with one that was never stopped.

    make demo        or:  python examples/demo.py [--kills 3] [--workers 2]

Three acts. First ``examples/digits.py`` runs from beginning to end. Then the same command starts in another
folder and is killed with SIGKILL, which a process can neither see coming nor clean up after. Then it is given
once more, and goes on. At the end every tensor of the two final checkpoints is compared bit for bit: weights,
BatchNorm's statistics, the optimizer's state. The exit code is 1 if a single bit differs.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table

from digits import DigitsData, DigitsNet, fingerprint

BATCHES_PER_EPOCH = 45
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def command(root: Path, args: argparse.Namespace) -> list[str]:
    """The one command of the demo; only the folder differs between the two runs."""
    script = str(Path(__file__).with_name("digits.py"))
    return [sys.executable, script, f"--root={root}", f"--epochs={args.epochs}", f"--workers={args.workers}"]


def start(root: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    shown = shlex.join(["python", "examples/digits.py", *command(root, args)[2:]])
    console.print(f"[bold green]$[/] [bold]{shown}[/]")
    return subprocess.Popen(command(root, args))


def run_to_the_end(root: Path, args: argparse.Namespace) -> float:
    """Run the command and return its wall time in seconds; a run that fails ends the demo."""
    began = time.monotonic()
    code = start(root, args).wait()
    if code != 0:
        console.print(f"[bold red]The run in {root} ended with exit code {code}.[/]")
        sys.exit(1)
    return time.monotonic() - began


def pulse(root: Path) -> tuple[int, int, int]:
    """(step, epoch, batch) of the last batch that the run in ``root`` finished; zeros before the first."""
    try:
        step, epoch, batch = (root / "pulse.txt").read_text().split()
    except (FileNotFoundError, ValueError):  # not there yet, or caught in the middle of being written
        return 0, 0, 0
    return int(step), int(epoch), int(batch)


def kill_in_mid_epoch(root: Path, args: argparse.Namespace, epoch: int) -> tuple[int, int, int]:
    """Start the command and SIGKILL it at a random batch of ``epoch``; returns where it was hit."""
    # Between two saves, so that there is work to be lost.
    first = epoch * BATCHES_PER_EPOCH
    step = random.SystemRandom().choice([first + b for b in range(8, 38) if (first + b) % 20 > 5])
    process = start(root, args)
    while pulse(root)[0] < step:
        if process.poll() is not None:
            console.print("[bold red]The run ended before it could be killed.[/]")
            sys.exit(1)
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    console.show_cursor()
    return pulse(root)


def newest_saved_step(root: Path) -> int:
    return max(int(path.stem.rpartition("step=")[2]) for path in root.rglob("newest-*.ckpt"))


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nest of dicts and lists, with the path to it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}/{index}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def accuracy(model: DigitsNet) -> float:
    """Share of the validation digits that the model names rightly, counted here and not by the run."""
    data = DigitsData()
    data.setup("validate")
    images, labels = data.val_set.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def compare(left: Path, right: Path) -> tuple[int, list[str]]:
    """How many tensors the two checkpoints' weights and optimizer states hold, and which of them differ."""
    kept = ("state_dict", "optimizer_states", "lr_schedulers")
    both = [torch.load(path, weights_only=True) for path in (left, right)]
    ours, theirs = (dict(tensors({key: payload[key] for key in kept})) for payload in both)
    different = [n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs]
    different += [n for n in ours.keys() & theirs.keys() if not same_bits(ours[n], theirs[n])]
    return len(ours), sorted(different)


def same_log(left: Path, right: Path) -> bool:
    """Whether the two runs' metrics.csv agree in every byte: no gap, no row twice."""
    first, second = (next(root.rglob("metrics.csv")).read_bytes() for root in (left, right))
    return first == second


def report(whole: Path, killed: Path, kills: list[tuple[int, int, int, int]], epochs: int) -> bool:
    """Print the proof; True if not one bit differs and the model is any good."""
    count, different = compare(whole / "final.ckpt", killed / "final.ckpt")
    logs_agree = same_log(whole, killed)
    models = [DigitsNet.load_from_checkpoint(root / "final.ckpt") for root in (whole, killed)]
    good = all(accuracy(model) > 0.95 for model in models)

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("never stopped")
    table.add_column("killed and started again")
    places = [f"at step {step}, in epoch {epoch + 1} of {epochs}" for step, epoch, _, _ in kills]
    table.add_row("killed", "-", "\n".join(places))
    again = [f"from step {saved}, {step - saved} batches done again" for step, _, _, saved in kills]
    table.add_row("went on", "-", "\n".join(again))
    table.add_row("accuracy", *(f"{accuracy(model):.2%}" for model in models))
    table.add_row("weights", *(f"{fingerprint(model)[:16]}…" for model in models))
    tensors_line = f"[bold green]All {count} tensors are bit-identical:[/] weights, BatchNorm, optimizer."
    if different:
        tensors_line = f"[bold red]{len(different)} of {count} tensors differ.[/]"
    log_line = "[bold green]The logged metrics are the same,[/] row by row."
    if not logs_agree:
        log_line = "[bold red]The logged metrics differ.[/]"
    proven = good and logs_agree and not different
    title, colour = ("PROVEN", "green") if proven else ("FAILED", "red")
    body = Group(table, "", tensors_line, log_line)
    console.print(Panel(body, title=f"[bold]{title}[/]", border_style=colour, padding=(1, 2), expand=False))
    for name in different:
        console.print(f"  differs: {name}")
    if not good:
        console.print("[bold red]The accuracy is not above 95%.[/]")
    return proven


def main() -> None:
    """Run the three acts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/demo"), help="where both runs go")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--kills", type=int, default=1, help="how many times the second run is killed")
    args = parser.parse_args()
    if not 1 <= args.kills < args.epochs - 1:
        parser.error(f"--kills has to be at least 1 and less than epochs - 1 = {args.epochs - 1}")
    whole, killed = args.root / "uninterrupted", args.root / "killed"
    for earlier in (whole, killed):
        shutil.rmtree(earlier, ignore_errors=True)

    console.print(Rule("1. A run that nobody stops", style="cyan"))
    console.print(f"It took {run_to_the_end(whole, args):.0f} s.\n")

    console.print(Rule("2. The same command in another folder, with kill -9 in mid-epoch", style="cyan"))
    kills = []
    for number in range(1, args.kills + 1):
        step, epoch, batch = kill_in_mid_epoch(killed, args, epoch=args.epochs * number // (args.kills + 1))
        saved = newest_saved_step(killed)
        kills.append((step, epoch, batch, saved))
        console.print(
            f"\n[bold red]SIGKILL[/] at step {step}: epoch {epoch + 1} of {args.epochs}, "
            f"after batch {batch} of {BATCHES_PER_EPOCH}. Newest checkpoint: step {saved}.\n"
        )
    console.print(Rule("3. The same command once more", style="cyan"))
    run_to_the_end(killed, args)
    console.print()
    sys.exit(0 if report(whole, killed, kills, args.epochs) else 1)


if __name__ == "__main__":
    main()
