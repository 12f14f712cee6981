"""What a training step costs over a raw PyTorch loop: holdfast, Lightning and Accelerate in one run.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --only holdfast-bare holdfast-log --rounds 25
    python benchmarks/step_overhead.py --profile holdfast-bare

Every contender trains one epoch of the same tiny network on the same kind of loader, taking turns with a raw
loop: 50 steps the one, 50 steps the other. The clock is read inside the training step when the turn changes,
and the ratio is that of the two sums: what slows the machine down for a while slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import importlib
import json
import logging
import os
import platform
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn import functional

from relay import Timing, race
from workload import Workload

Tick = Callable[[int], None]
Contender = Callable[[Workload, Tick, str], None]

BLOCK_STEPS = 50


def train_raw(work: Workload, tick: Tick, own_dataset: bool) -> None:
    model, loader = work.network(), work.loader(own_dataset=own_dataset)
    optimizer = work.make_optimizer(model.parameters())
    model.train()
    for batch_idx, (inputs, labels) in enumerate(loader):
        tick(batch_idx)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()


def train_accelerate(work: Workload, tick: Tick) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = work.network()
    model, optimizer, loader = accelerator.prepare(
        model, work.make_optimizer(model.parameters()), work.loader()
    )
    model.train()
    for batch_idx, (inputs, labels) in enumerate(loader):
        tick(batch_idx)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        optimizer.step()


def make_module(pl: Any, work: Workload, tick: Tick, log: dict[str, Any] | None) -> Any:
    """The same LightningModule, written once, for whichever package ``pl`` is."""

    class TinyModule(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = work.network()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            tick(batch_idx)
            inputs, labels = batch
            loss = functional.cross_entropy(self.network(inputs), labels)
            if log is not None:
                self.log("loss", loss, **log)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.make_optimizer(self.parameters())

    return TinyModule()


BARE = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def module_contender(
    name: str, log: dict[str, Any] | None = None, *, bare: bool = True, own_dataset: bool = False
) -> Contender:
    def train(work: Workload, tick: Tick, root: str) -> None:
        pl = importlib.import_module({"lightning": "lightning.pytorch"}.get(name, name))
        switches = BARE if bare else {}
        trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=root, **switches)
        trainer.fit(make_module(pl, work, tick, log), work.loader(own_dataset=own_dataset))

    return train


ON_STEP: dict[str, Any] = {"on_step": True, "on_epoch": False}
ON_BOTH: dict[str, Any] = {"on_step": True, "on_epoch": True}
ON_BAR: dict[str, Any] = {"prog_bar": True}

CONTENDERS: dict[str, Contender] = {
    "control": lambda work, tick, root: train_raw(work, tick, own_dataset=False),
    "accelerate": lambda work, tick, root: train_accelerate(work, tick),
    "lightning-bare": module_contender("lightning"),
    "lightning-log": module_contender("lightning", ON_STEP),
    "lightning-defaults": module_contender("lightning", ON_BAR, bare=False),
    "holdfast-bare": module_contender("holdfast"),
    "holdfast-log": module_contender("holdfast", ON_STEP),
    "holdfast-log-epoch": module_contender("holdfast", ON_BOTH),
    "holdfast-defaults": module_contender("holdfast", ON_BAR, bare=False),
    "holdfast-own-dataset": module_contender("holdfast", own_dataset=True),
}
TARGETS = {
    "holdfast-bare": 1.10,
    "holdfast-log": 1.15,
    "holdfast-log-epoch": 1.15,
    "holdfast-defaults": 1.30,
    "holdfast-own-dataset": 1.30,
}


@contextlib.contextmanager
def quiet_terminal() -> Iterator[None]:
    """Points stdout and stderr at a pseudo-terminal that a child process drains.

    A progress bar draws itself only on a terminal; into a pipe it would cost less than it does in use.
    """
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    drain = subprocess.Popen(
        [sys.executable, "-c", "import os\nwhile os.read(0, 65536): pass"],
        stdin=leader,
        stderr=subprocess.DEVNULL,
    )
    saved = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.dup2(follower, 1)
        os.dup2(follower, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, fd in enumerate(saved, start=1):
            os.dup2(fd, target)
            os.close(fd)
        os.close(follower)
        os.close(leader)
        drain.kill()
        drain.wait()


Pair = tuple[Timing, Timing]


def has_own_dataset(name: str) -> bool:
    return name.endswith("own-dataset")


def run_once(name: str, arguments: argparse.Namespace) -> Pair:
    """The timings of a contender and of the raw loop that it took turns with."""
    blocks, warmup_blocks = arguments.blocks, arguments.warmup_blocks
    work = Workload((blocks + warmup_blocks) * BLOCK_STEPS + 1, arguments.hidden, arguments.optimizer)

    # The number of threads is a setting of each thread's own.
    def contender(tick: Tick) -> None:
        torch.set_num_threads(arguments.threads)
        CONTENDERS[name](work, tick, root)

    def raw(tick: Tick) -> None:
        torch.set_num_threads(arguments.threads)
        train_raw(work, tick, has_own_dataset(name))

    torch.manual_seed(0)
    gc.collect()
    with tempfile.TemporaryDirectory() as root, quiet_terminal():
        return race(contender, raw, BLOCK_STEPS, warmup_blocks, blocks)


def measure(names: list[str], arguments: argparse.Namespace) -> dict[str, list[Pair]]:
    """One pair a round for each name, in another random order each round, after an unrecorded round."""
    shuffler = random.Random(arguments.seed)
    pairs: dict[str, list[Pair]] = {name: [] for name in names}
    for round_number in range(arguments.rounds + 1):
        for name in shuffler.sample(names, len(names)):
            pair = run_once(name, arguments)
            if round_number > 0:
                pairs[name].append(pair)
        if sys.stderr.isatty():
            end = "\n" if round_number == arguments.rounds else ""
            print(f"\rround {round_number} of {arguments.rounds}", end=end, file=sys.stderr)
    return pairs


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are medians over the rounds, with the quartiles beside them."""

    name: str
    wall_us: float
    wall_ratio: float = 1.0
    cpu_ratio: float = 1.0
    low_ratio: float = 1.0
    high_ratio: float = 1.0
    target: float | None = None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "pass" if self.wall_ratio <= self.target else "MISS"


def summarize(pairs: dict[str, list[Pair]]) -> list[Row]:
    rows = []
    for own_dataset, name in ((False, "raw"), (True, "raw-own-dataset")):
        runs = [raw for own, two in pairs.items() if has_own_dataset(own) is own_dataset for _, raw in two]
        if runs:
            rows.append(Row(name, statistics.median(run.wall_us for run in runs)))
    for name, own in pairs.items():
        wall = [mine.wall_us / raw.wall_us for mine, raw in own]
        cpu = [mine.cpu_us / raw.cpu_us for mine, raw in own]
        low, middle, high = quartiles(wall)
        wall_us = statistics.median(mine.wall_us for mine, _ in own)
        rows.append(Row(name, wall_us, middle, statistics.median(cpu), low, high, TARGETS.get(name)))
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(rows: list[Row]) -> str:
    lines = [
        "| contender | us a step | ratio | quartiles | ratio, CPU time | target | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"<= {row.target:.2f}"
        spread = f"{row.low_ratio:.2f} - {row.high_ratio:.2f}"
        lines.append(
            f"| {row.name} | {row.wall_us:.0f} | {row.wall_ratio:.2f} | {spread} | {row.cpu_ratio:.2f} "
            f"| {target} | {row.verdict} |"
        )
    return "\n".join(lines)


def installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    packages = ("torch", "lightning", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "optimizer": arguments.optimizer,
        "hidden": arguments.hidden,
        "steps": arguments.blocks * BLOCK_STEPS,
        "warmup": arguments.warmup_blocks * BLOCK_STEPS,
        "rounds": arguments.rounds,
    }


def profile(name: str, arguments: argparse.Namespace) -> None:
    """Prints where the time goes; cProfile inflates Python calls, so read it for order, not for size."""
    work = Workload(arguments.blocks * BLOCK_STEPS, arguments.hidden, arguments.optimizer)
    profiler = cProfile.Profile()
    for profiled in (False, True):
        with tempfile.TemporaryDirectory() as root, quiet_terminal():
            if profiled:
                profiler.enable()
            CONTENDERS[name](work, lambda batch_idx: None, root)
            profiler.disable()
    package = name.split("-")[0]
    print(f"everything, by its own time ({work.batches} steps)")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(arguments.top)
    print(f"{package}'s own functions")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(rf"[/\\]{package}[/\\]", arguments.top)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=16, help="timed turns of 50 steps (default: %(default)s)"
    )
    parser.add_argument("--warmup-blocks", type=int, default=4, help="turns before (default: %(default)s)")
    parser.add_argument(
        "--hidden", type=int, default=32, help="width of the hidden layer (default: %(default)s)"
    )
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contenders")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="measure these alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument(
        "--profile", choices=list(CONTENDERS), help="profile one contender and measure nothing"
    )
    parser.add_argument("--top", type=int, default=30, help="lines of the profile (default: %(default)s)")
    return parser.parse_args(argv)


def chosen(only: list[str] | None) -> list[str]:
    """The contenders to run: those asked for, less the peers not installed."""
    missing = {name for name in ("lightning", "accelerate") if installed(name) == "not installed"}
    wanted = CONTENDERS if only is None else set(only)
    return [name for name in CONTENDERS if name in wanted and name.split("-")[0] not in missing]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.profile:
        profile(arguments.profile, arguments)
        return 0
    pairs = measure(chosen(arguments.only), arguments)
    rows = summarize(pairs)
    if arguments.json:
        raw = {name: [[asdict(timing) for timing in pair] for pair in own] for name, own in pairs.items()}
        table_rows = [{**asdict(row), "verdict": row.verdict} for row in rows]
        print(json.dumps({"environment": environment(arguments), "rows": table_rows, "pairs": raw}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in environment(arguments).items()), end="\n\n")
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
