"""What regular saving costs a training run: the same steps with and without it, in processes of their own.

384 MiB of weights and AdamW state, steps of some 350 ms and a save every 10 steps: one save in 3.5 s, far
more often than anyone would. Each contender is a training loop with and without saving; the ratio is that of
the two times. A save is due long before the last step: what it writes in the background is inside the time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import savers

WIDTH, DEPTH = 1638, 12  # weights of 128 MiB; AdamW has two numbers more for each
EVERY = 10
TARGETS = {1: 1.08, 2: 1.15}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows).square().mean()


class Rows(Dataset[Tensor]):
    def __init__(self, steps: int, batch: int) -> None:
        self.count = steps * batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((WIDTH,), 0.001 * (index % 97))


class Clock:
    """Seconds from the first step that counts to the last one."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.seen = 0
        self.began_s = self.last_s = 0.0

    def tick(self) -> None:
        self.last_s = perf_counter()
        if self.seen == self.warmup:
            self.began_s = self.last_s
        self.seen += 1

    @property
    def seconds(self) -> float:
        return self.last_s - self.began_s


def loader(steps: int, batch: int) -> DataLoader[Any]:
    return DataLoader(Rows(steps, batch), batch_size=batch)


def trainer_run(package: str, saving: str, steps: int, batch: int, clock: Clock, root: str) -> None:
    """A Trainer's run; both packages have the same names."""
    if package == "holdfast":
        import holdfast as pl
        from holdfast.callbacks import ModelCheckpoint
    else:
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, rows: Tensor, index: int) -> Tensor:
            clock.tick()
            return self.net(rows)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-5)

    callbacks: list[Any] = []
    plugins: list[Any] = []
    if saving != "none":
        arguments: dict[str, Any] = {"dirpath": root, "every_n_train_steps": EVERY, "save_top_k": 1}
        if package == "holdfast":
            arguments["background"] = saving == "background"
        elif saving == "background":
            from lightning.pytorch.plugins.io import AsyncCheckpointIO

            plugins.append(AsyncCheckpointIO())
        callbacks.append(ModelCheckpoint(**arguments))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=root, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, plugins=plugins,
        enable_checkpointing=saving != "none",
    )  # fmt: skip
    trainer.fit(Module(), loader(steps, batch))


def raw_run(
    saver: Callable[[nn.Module, Any], Any] | None, steps: int, batch: int, clock: Clock, root: str
) -> None:
    """A loop written out, with a peer that saves in the background."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    made = None if saver is None else saver(net, optimizer)
    wait: Callable[[], None] | None = None
    for number, rows in enumerate(loader(steps, batch), 1):
        clock.tick()
        loss = net(rows)
        loss.backward()
        if made is not None:
            made.before_step()
        optimizer.step()
        optimizer.zero_grad()
        if made is not None and number % EVERY == 0:
            if wait is not None:
                wait()
                savers.remove(Path(root) / f"{number - EVERY}")
            state = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}
            wait = made.save(state, Path(root) / str(number))
    if wait is not None:
        wait()
    if made is not None:
        made.close()


CONTENDERS: dict[str, Callable[[int, int, Clock, str], None]] = {
    "holdfast none": lambda *a: trainer_run("holdfast", "none", *a),
    "holdfast background": lambda *a: trainer_run("holdfast", "background", *a),
    "holdfast foreground": lambda *a: trainer_run("holdfast", "foreground", *a),
    "Lightning none": lambda *a: trainer_run("lightning", "none", *a),
    "Lightning foreground": lambda *a: trainer_run("lightning", "foreground", *a),
    "Lightning AsyncCheckpointIO": lambda *a: trainer_run("lightning", "background", *a),
    "raw none": lambda *a: raw_run(None, *a),
    "raw DCP async": lambda *a: raw_run(lambda net, o: savers.Dcp(overlapping=False), *a),
    "raw DCP async, overlapping stager": lambda *a: raw_run(lambda net, o: savers.Dcp(overlapping=True), *a),
}


def calibrated_batch(step_s: float) -> int:
    """Rows for which a forward and backward pass and a step of the optimizer take about so long."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def cost(batch: int) -> float:
        times = []
        for _ in range(4):
            began = perf_counter()
            net(torch.zeros(batch, WIDTH)).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(perf_counter() - began)
        return min(times)

    few, many = cost(32), cost(160)
    return max(8, int(32 + (step_s - few) / max(1e-6, (many - few) / 128)))


def run_child(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    clock = Clock(arguments.warmup)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        CONTENDERS[arguments.child](arguments.steps + arguments.warmup, arguments.batch, clock, arguments.dir)
    print(json.dumps(clock.seconds))


def measure(name: str, batch: int, arguments: argparse.Namespace, root: str) -> float:
    with tempfile.TemporaryDirectory(dir=root) as where:
        command = [
            sys.executable, __file__, "--child", name, "--batch", str(batch), "--steps", str(arguments.steps),
            "--warmup", str(arguments.warmup), "--threads", str(arguments.threads), "--dir", where,
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{name}: {run.stderr[-2000:]}")
    os.sync()
    return float(json.loads(run.stdout.splitlines()[-1]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=35, help="steps that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=11, help="steps before (default: %(default)s)")
    parser.add_argument("--step-s", type=float, default=0.35, help="length of a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contenders")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="measure these alone")
    parser.add_argument("--dir", help="where to save; default: a temporary directory in the current one")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        run_child(arguments)
        return 0
    names = [name for name in CONTENDERS if arguments.only is None or name in arguments.only]
    if not savers.installed("lightning"):
        names = [name for name in names if not name.startswith("Lightning")]
    batch = calibrated_batch(arguments.step_s)
    shuffler = random.Random(arguments.seed)
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir or os.getcwd()) as root:
        for _ in range(arguments.rounds):
            for name in shuffler.sample(names, len(names)):
                times[name].append(measure(name, batch, arguments, root))
    rows = []
    for name, own in times.items():
        base = times.get(f"{name.split()[0]} none", own)
        found = statistics.median(one / other for one, other in zip(own, base, strict=True))
        step_ms = 1000 * statistics.median(own) / (arguments.steps - 1)
        target = TARGETS.get(arguments.threads) if name == "holdfast background" else None
        rows.append({"name": name, "step_ms": step_ms, "ratio": found, "target": target, "runs": own})
    if arguments.json:
        print(json.dumps({"batch": batch, "threads": arguments.threads, "rows": rows}, indent=1))
        return 0
    print(
        f"torch threads {arguments.threads}, batch {batch}, "
        f"{arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    print("| run | ms a step | ratio to the same without saving | target | |\n|---|---:|---:|---|---|")
    for row in rows:
        target = f"<= {row['target']:.2f}" if row["target"] else ""
        passed = "" if not row["target"] else "pass" if row["ratio"] <= row["target"] else "MISS"
        print(f"| {row['name']} | {row['step_ms']:.0f} | {row['ratio']:.2f} | {target} | {passed} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
