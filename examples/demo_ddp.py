"""Kill one process of a job in mid-epoch, let torchrun start it again, compare with one that nobody touched.

    make demo-ddp        or:  python examples/demo_ddp.py [--epochs 5]

Three acts, all of ``examples/digits_ddp.py`` on real digits. First two processes train from beginning to end.
Then the same job starts in another folder and one of the two is killed with SIGKILL: torchrun's agent ends
the other and starts both again, and they go on from the newest checkpoint, with no hand on the keyboard. The
two final checkpoints are compared bit for bit. At last the job goes on from the same checkpoint on ONE
process, and the rows that each step trained on are compared. The exit code is 1 if a bit or a row differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table

from demo import accuracy, compare, console, newest_saved_step, same_log
from digits import DigitsNet, fingerprint

BATCHES_PER_EPOCH = 45
ROWS = 1437
QUIET = ("saved ", "checkpoints go to", "Seed set", "sha256")
SCRIPT = Path(__file__).with_name("digits_ddp.py")
TORCHRUN = ["--standalone", "--nproc-per-node=2", "--max-restarts=2"]


class Job:
    """A job in a folder, with what it says on the screen and the agent's long tracebacks cut short.

    Args:
        root: Its folder.
        epochs: How many it trains.
        processes: Two under torchrun, or one without.
    """

    def __init__(self, root: Path, epochs: int, processes: int = 2) -> None:
        self.root = root
        self.said: list[str] = []
        arguments = [f"--root={root}", f"--epochs={epochs}"]
        launcher = ["torchrun", *TORCHRUN] if processes > 1 else ["python"]
        shown = shlex.join([*launcher, f"examples/{SCRIPT.name}", *arguments])
        console.print(f"[bold green]$[/] [bold]{shown}[/]")
        command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN]
        self.process = subprocess.Popen(
            [*(command if processes > 1 else [sys.executable]), str(SCRIPT), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        in_traceback = False
        for line in self.process.stdout:
            line = line.rstrip()
            self.said.append(line)
            text = line.removeprefix("[rank0]: ")
            agent = line.partition("] ")[2] if "torch/distributed/" in line else ""
            if "closing signal" in agent or "failed (exitcode" in agent:
                console.print(f"torchrun: {agent}", style="yellow", markup=False)
            elif text.startswith("Traceback ("):
                in_traceback = True
            elif text.startswith("holdfast.errors."):
                in_traceback = False
                console.print(f"the other one: {text}", style="yellow", markup=False)
            elif line.startswith(("epoch ", "resumed ")) or not (in_traceback or agent or text != line):
                in_traceback = False
                if line and not line.startswith(QUIET):
                    console.print(line, markup=False)

    def end(self) -> None:
        """Wait for its end; one that fails ends the demo, with all that it said."""
        code = self.process.wait()
        self._reader.join()
        if code != 0:
            console.print("\n".join(self.said), markup=False)
            console.print(f"[bold red]The job in {self.root} ended with exit code {code}.[/]")
            sys.exit(1)

    def pulse(self, rank: int) -> tuple[int, int, int, int]:
        """(step, epoch, batch, process) of the last batch that a rank finished; zeros before the first."""
        try:
            step, epoch, batch, pid = map(int, (self.root / f"pulse-{rank}.txt").read_text().split())
        except (FileNotFoundError, ValueError):  # not there yet, or caught in the middle of being written
            return 0, 0, 0, 0
        return step, epoch, batch, pid

    def kill_one_in_mid_epoch(self, epoch: int, aside: Path) -> tuple[int, int, int]:
        """SIGKILL rank 1 at a random batch of ``epoch``; copy what is saved ``aside`` and return where."""
        # Between two saves, so that there is work to be lost.
        first = epoch * BATCHES_PER_EPOCH
        step = random.SystemRandom().choice([first + b for b in range(8, 38) if 5 < (first + b) % 20 < 16])
        while self.pulse(1)[0] < step:
            if self.process.poll() is not None:
                console.print("[bold red]The job ended before a process could be killed.[/]")
                sys.exit(1)
            time.sleep(0.001)
        pid = self.pulse(1)[3]
        os.kill(pid, signal.SIGSTOP)  # so that what it says of itself is where it was hit
        where = self.pulse(1)
        os.kill(pid, signal.SIGKILL)
        shutil.copytree(self.root, aside, ignore=shutil.ignore_patterns("rows-*"))
        return where[:3]


def rows_of(root: Path, since: int = 0) -> dict[tuple[int, int], list[int]]:
    """The rows of each global batch from step ``since`` on, by (epoch, batch)."""
    found: dict[tuple[int, int], dict[str, list[int]]] = {}
    for path in root.glob("rows-*.txt"):
        for line in path.read_text().splitlines():
            epoch, batch, *rows = map(int, line.split())
            if epoch * BATCHES_PER_EPOCH + batch >= since:
                found.setdefault((epoch, batch), {})[path.name] = rows  # done again, the last counts
    return {at: sorted(row for rows in parts.values() for row in rows) for at, parts in found.items()}


def report(root: Path, killed_at: tuple[int, int, int], saved: int, epochs: int) -> bool:
    """Print the proof; True if not one bit and not one row differs, and the models are any good."""
    whole, killed, alone = (root / name for name in ("uninterrupted", "killed", "one-process"))
    count, different = compare(whole / "final.ckpt", killed / "final.ckpt")
    logs_agree = same_log(whole, killed)
    expected = rows_of(whole, since=saved)
    rows_agree = rows_of(alone, since=saved) == expected
    once = [
        sum(len(rows) for (at, _), rows in rows_of(whole).items() if at == epoch) for epoch in range(epochs)
    ]
    models = [DigitsNet.load_from_checkpoint(at / "final.ckpt") for at in (whole, killed, alone)]
    good = all(accuracy(model) > 0.9 for model in models)

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "never stopped", "started again", "gone on alone"):
        table.add_column(title)
    step, epoch, _ = killed_at
    place = f"step {step}, epoch {epoch + 1}/{epochs}"
    table.add_row("processes", "2", "2", "2, then 1")
    table.add_row("rank 1 killed", "-", place, place)
    table.add_row("went on from", "-", f"step {saved}", f"step {saved}")
    table.add_row("accuracy", *(f"{accuracy(model):.2%}" for model in models))
    table.add_row("weights", *(f"{fingerprint(model)[:12]}…" for model in models))
    tensors_line = f"[bold green]All {count} tensors are bit-identical[/] after the restart."
    if different:
        tensors_line = f"[bold red]{len(different)} of {count} tensors differ after the restart.[/]"
    log_line = "[bold green]The logged metrics are the same,[/] row by row."
    if not logs_agree:
        log_line = "[bold red]The logged metrics differ.[/]"
    rows_line = f"[bold green]On one process {len(expected)} steps had the rows[/] of the job of two."
    if not rows_agree:
        rows_line = "[bold red]On one process the steps had other rows.[/]"
    epochs_line = "[bold green]Each epoch had all 1,437 rows, once.[/]"
    if set(once) != {ROWS}:
        epochs_line = f"[bold red]The epochs had {once} rows, not {ROWS} each.[/]"
    proven = good and logs_agree and rows_agree and not different and set(once) == {ROWS}
    title, colour = ("PROVEN", "green") if proven else ("FAILED", "red")
    body = Group(table, "", tensors_line, log_line, rows_line, epochs_line)
    console.print(Panel(body, title=f"[bold]{title}[/]", border_style=colour, padding=(1, 2), expand=False))
    for name in different:
        console.print(f"  differs: {name}")
    if not good:
        console.print("[bold red]The accuracy is not above 90%.[/]")
    return proven


def main() -> None:
    """Run the three acts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/demo-ddp"), help="where all jobs go")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs has to be at least 2")
    whole, killed, alone = (args.root / name for name in ("uninterrupted", "killed", "one-process"))
    for earlier in (whole, killed, alone):
        shutil.rmtree(earlier, ignore_errors=True)

    console.print(Rule("1. A job of two processes that nobody touches", style="cyan"))
    began = time.monotonic()
    Job(whole, args.epochs).end()
    console.print(f"It took {time.monotonic() - began:.0f} s.\n")

    console.print(
        Rule("2. The same job in another folder, with kill -9 of one process in mid-epoch", style="cyan")
    )
    job = Job(killed, args.epochs)
    where = job.kill_one_in_mid_epoch(args.epochs // 2, aside=alone)
    saved = newest_saved_step(alone)
    step, epoch, batch = where
    console.print(
        f"\n[bold red]SIGKILL[/] of rank 1 at step {step}: epoch {epoch + 1} of {args.epochs}, after batch "
        f"{batch} of {BATCHES_PER_EPOCH}. Newest checkpoint: step {saved}.\n"
    )
    job.end()

    console.print()
    console.print(Rule("3. From the same checkpoint on one process", style="cyan"))
    Job(alone, args.epochs, processes=1).end()
    console.print()
    sys.exit(0 if report(args.root, where, saved, args.epochs) else 1)


if __name__ == "__main__":
    main()
