"""Saving and loading beside the peers: durable, in the background, restored, many small tensors, memory.

One process holds one state and everybody saves that, in turns, in another random order each round. Whoever
does not make files durable by himself is followed by fsync, inside the measured time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import savers
import states
from savers import remove

PACKAGES = ("torch", "holdfast", "safetensors", "torchsnapshot", "lightning")


@dataclass(frozen=True)
class Row:
    """One line: the median, the ratio to what it is measured by (median of the ratios of each round)."""

    section: str
    name: str
    seconds: float
    ratio: float | None = None
    target: str = ""
    verdict: str = ""
    more: str = ""


def timed(work: Callable[[], Any]) -> float:
    gc.collect()
    began = perf_counter()
    work()
    return perf_counter() - began


def rounds(
    contenders: dict[str, Callable[[], dict[str, float]]], count: int, seed: int
) -> dict[str, list[dict[str, float]]]:
    """What each contender measured in each round; the first round is for warming up."""
    shuffler = random.Random(seed)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(count + 1):
        for name in shuffler.sample(list(contenders), len(contenders)):
            values = contenders[name]()
            if number:
                found[name].append(values)
            print(f"\r{number}/{count} {name}".ljust(60), end="", file=sys.stderr)
    print("\r".ljust(60), file=sys.stderr)
    return found


def median(values: list[dict[str, float]], key: str = "seconds") -> float:
    return statistics.median(one[key] for one in values)


def ratio(mine: list[dict[str, float]], theirs: list[float]) -> float:
    return statistics.median(one["seconds"] / other for one, other in zip(mine, theirs, strict=True))


def verdict(value: float, most: float) -> str:
    return "pass" if value <= most else "MISS"


# -- sections ------------------------------------------------------------------------------------------------


def save_section(arguments: argparse.Namespace, root: Path) -> list[Row]:
    """Until durable: file and directory fsynced."""
    module, optimizer = states.trained(int(arguments.mib * 2**20))
    state = states.state_of(module, optimizer)
    raw = savers.RawWrites(states.size_of(state))
    ways: dict[str, savers.Save] = {
        "raw O_DIRECT write": raw.direct,
        "raw buffered write": raw.buffered,
        "holdfast": savers.holdfast,
        "torch.save + fsync": savers.torch_save,
        "safetensors + fsync": savers.safetensors_save,
        "DCP": savers.dcp_save,
        "torchsnapshot + fsync": savers.torchsnapshot_save,
        "Lightning + fsync": savers.lightning_save,
    }
    missing = {"safetensors": "safetensors", "torchsnapshot": "torchsnapshot", "Lightning": "lightning"}
    for start, package in missing.items():
        if not savers.installed(package):
            ways = {name: way for name, way in ways.items() if not name.startswith(start)}

    def run(way: savers.Save) -> dict[str, float]:
        path = root / "saved"
        try:
            return {"seconds": timed(lambda: way(state, path))}
        finally:
            remove(path)

    found = rounds(
        {name: functools.partial(run, way) for name, way in ways.items()}, arguments.rounds, arguments.seed
    )
    pairs = zip(found["raw O_DIRECT write"], found["raw buffered write"], strict=True)
    limit = [min(one["seconds"], other["seconds"]) for one, other in pairs]
    rows = []
    for name, values in found.items():
        value = ratio(values, limit)
        target, passed = ("<= 1.15", verdict(value, 1.15)) if name == "holdfast" else ("", "")
        rows.append(Row("save until durable", name, median(values), value, target, passed))
    return rows


def background_section(arguments: argparse.Namespace, root: Path) -> list[Row]:
    """How long the call takes, how long the next step then waits, and when it is durable."""
    module, optimizer = states.trained(int(arguments.mib * 2**20))
    kinds: dict[str, Callable[[], Any]] = {
        "holdfast": lambda: savers.Holdfast(module, optimizer),
        "DCP async": lambda: savers.Dcp(overlapping=False),
        "DCP async, overlapping stager": lambda: savers.Dcp(overlapping=True),
    }
    if savers.installed("torchsnapshot"):
        kinds["torchsnapshot async"] = savers.Torchsnapshot
    if savers.installed("lightning"):
        kinds["Lightning AsyncCheckpointIO"] = savers.LightningAsync

    def run(saver: Any) -> dict[str, float]:
        # As a run does: the state_dicts are made for each save.
        path = root / "saved"
        gc.collect()
        try:
            began = perf_counter()
            wait = saver.save(states.state_of(module, optimizer), path)
            returned = perf_counter()
            # What a forward and backward pass would give it, with the processor to itself.
            torch.randn(64, 64) @ torch.randn(64, 64)
            while perf_counter() - returned < arguments.step_s:
                torch.randn(256, 256) @ torch.randn(256, 256)
            steps = perf_counter()
            saver.before_step()
            stepped = perf_counter()
            wait()
            return {
                "seconds": returned - began,
                "wait": stepped - steps,
                "durable": perf_counter() - began,
            }
        finally:
            remove(path)

    made = {name: kind() for name, kind in kinds.items()}
    # A run's first two snapshots are copied at once and compared; those after them are what is measured.
    for _ in range(2):
        run(made["holdfast"])
    found = rounds(
        {name: functools.partial(run, one) for name, one in made.items()}, arguments.rounds, arguments.seed
    )
    for one in made.values():
        one.close()
    rows = []
    for name, values in found.items():
        seconds = median(values)
        target, passed = ("<= 0.020 s", verdict(seconds, 0.020)) if name == "holdfast" else ("", "")
        wait, durable = median(values, "wait"), median(values, "durable")
        more = f"waits {wait:.3f} s before the step, durable after {durable:.2f} s"
        rows.append(Row("background save returns", name, seconds, None, target, passed, more))
    return rows


def restore_section(arguments: argparse.Namespace, root: Path) -> list[Row]:
    """Into a module and an optimizer that are there already."""
    module, optimizer = states.trained(int(arguments.mib * 2**20))
    state = states.state_of(module, optimizer)
    theirs, ours, dcp_path = root / "torch.pt", root / "holdfast.ckpt", root / "dcp"
    torch.save(state, theirs)
    savers.holdfast(state, ours)
    savers.dcp_save(state, dcp_path)
    os.sync()

    def into(payload: dict[str, Any], *, in_memory: bool) -> None:
        module.load_state_dict(payload["state_dict"])
        (saved,) = payload["optimizer_states"]
        if in_memory:
            for one in saved["state"].values():
                one.update({key: value.clone() for key, value in one.items()})
        optimizer.load_state_dict(saved)

    def torch_mapped(*, in_memory: bool) -> None:
        into(torch.load(theirs, mmap=True, weights_only=True), in_memory=in_memory)

    def torch_plain() -> None:
        into(torch.load(theirs, weights_only=True), in_memory=False)

    def holdfast() -> None:
        from holdfast.checkpoint.load import load

        into(load(ours), in_memory=False)

    def dcp() -> None:
        import torch.distributed.checkpoint as dcp

        live = states.state_of(module, optimizer)
        with savers.quiet():
            dcp.load(live, storage_reader=dcp.FileSystemReader(dcp_path), no_dist=True)
        module.load_state_dict(live["state_dict"])
        optimizer.load_state_dict(live["optimizer_states"][0])

    ways: dict[str, Callable[[], None]] = {
        "torch.load(mmap), optimizer left mapped": lambda: torch_mapped(in_memory=False),
        "torch.load(mmap), all in memory": lambda: torch_mapped(in_memory=True),
        "torch.load": torch_plain,
        "DCP": dcp,
        "holdfast, every checksum checked, all in memory": holdfast,
    }
    found = rounds(
        {name: functools.partial(lambda way: {"seconds": timed(way)}, way) for name, way in ways.items()},
        arguments.rounds,
        arguments.seed,
    )
    base = [one["seconds"] for one in found["torch.load(mmap), optimizer left mapped"]]
    rows = []
    for name, values in found.items():
        value = ratio(values, base)
        target, passed = ("<= 1.75", verdict(value, 1.75)) if name.startswith("holdfast") else ("", "")
        rows.append(Row("restore a module and its optimizer", name, median(values), value, target, passed))
    return rows


def small_section(arguments: argparse.Namespace, root: Path) -> list[Row]:
    """Where it is the number of tensors that costs, not their size."""
    state, tenth = states.small_tensors(arguments.tensors), states.small_tensors(arguments.tensors // 10)
    theirs, ours, dcp_path = root / "small.pt", root / "small.ckpt", root / "small"
    torch.save(state, theirs)
    savers.holdfast(state, ours)
    savers.dcp_save(tenth, dcp_path)

    def saved(way: savers.Save, what: dict[str, Any]) -> dict[str, float]:
        path = root / "saved"
        try:
            return {"seconds": timed(lambda: way(what, path))}
        finally:
            remove(path)

    def loaded(way: Callable[[], Any]) -> dict[str, float]:
        return {"seconds": timed(way)}

    def load_ours() -> Any:
        from holdfast.checkpoint.load import load

        return load(ours)

    def load_dcp() -> None:
        import torch.distributed.checkpoint as dcp

        with savers.quiet():
            dcp.load(tenth, storage_reader=dcp.FileSystemReader(dcp_path), no_dist=True)

    names = f"{arguments.tensors:,} tensors of 1 KiB"
    fewer = f"{arguments.tensors // 10:,}"
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "save: holdfast": lambda: saved(savers.holdfast, state),
        "save: torch.save + fsync": lambda: saved(savers.torch_save, state),
        f"save: DCP, {fewer} tensors": lambda: saved(savers.dcp_save, tenth),
        "load: holdfast, every checksum checked": lambda: loaded(load_ours),
        "load: torch.load(mmap)": lambda: loaded(lambda: torch.load(theirs, mmap=True, weights_only=True)),
        f"load: DCP, {fewer} tensors": lambda: loaded(load_dcp),
    }
    found = rounds(ways, max(1, arguments.rounds // 3), arguments.seed)
    most = {"save: holdfast": 2.5, "load: holdfast, every checksum checked": 3.5}
    rows = []
    for name, values in found.items():
        seconds = median(values)
        limit = most.get(name)
        target, passed = (f"<= {limit} s", verdict(seconds, limit)) if limit else ("", "")
        rows.append(Row(names, name, seconds, None, target, passed))
    return rows


MEMORY = {
    "save: holdfast": "<= 64 MiB",
    "save: torch.save": "",
    "save in the background: holdfast": "<= 1.05 x the state",
    "save in the background: Lightning AsyncCheckpointIO": "",
    "load: holdfast": "<= 64 MiB over what it returns",
    "load: torch.load": "",
}


def memory_section(arguments: argparse.Namespace, root: Path) -> list[Row]:
    """How far the peak of a fresh process's own memory rises over what it held before."""
    rows = []
    for name, target in MEMORY.items():
        if "Lightning" in name and not savers.installed("lightning"):
            continue
        command = [
            sys.executable,
            __file__,
            "--memory-of",
            name,
            "--mib",
            str(arguments.mib),
            "--dir",
            str(root),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        grown, held = json.loads(run.stdout.splitlines()[-1])
        limits = {
            "<= 64 MiB": 64.0,
            "<= 1.05 x the state": 1.05 * held,
            "<= 64 MiB over what it returns": 64 + held,
        }
        passed = verdict(grown, limits[target]) if target else ""
        rows.append(
            Row("memory", name, 0.0, None, target, passed, f"{grown:.0f} MiB for a state of {held:.0f}")
        )
    return rows


def measure_memory(name: str, arguments: argparse.Namespace, root: Path) -> None:
    module, optimizer = states.trained(int(arguments.mib * 2**20))
    state = states.state_of(module, optimizer)
    held = states.size_of(state) / 2**20
    path = root / "memory.ckpt"
    # What is loaded once for all: modules, thread stacks.
    savers.holdfast({"w": torch.ones(4)}, path)
    savers.torch_save({"w": torch.ones(4)}, path)
    if name.startswith("load"):
        (savers.holdfast if "holdfast" in name else savers.torch_save)(state, path)
        del module, optimizer, state
        gc.collect()
    before = reset_peak()
    if name == "save: holdfast":
        savers.holdfast(state, path)
    elif name == "save: torch.save":
        savers.torch_save(state, path)
    elif name == "save in the background: holdfast":
        saver: Any = savers.Holdfast(module, optimizer)
        for _ in range(4):
            wait = saver.save(states.state_of(module, optimizer), path)
            saver.before_step()
            wait()
    elif name.startswith("save in the background"):
        saver = savers.LightningAsync()
        for _ in range(4):
            saver.save(states.state_of(module, optimizer), path)()
    elif name == "load: holdfast":
        from holdfast.checkpoint.load import load

        kept: Any = load(path)
        assert kept
    else:
        kept = torch.load(path, weights_only=True)
    print(json.dumps([(peak() - before) / 1024, held]))


def reset_peak() -> int:
    """Forget the peak so far; returns what is in use now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise LookupError(key)


SECTIONS = {
    "save": save_section,
    "background": background_section,
    "restore": restore_section,
    "small": small_section,
    "memory": memory_section,
}


def table(rows: list[Row]) -> str:
    lines = ["| work | contender | seconds | ratio | target | | |", "|---|---|---:|---:|---:|---|---|"]
    for row in rows:
        seconds = f"{row.seconds:.3f}" if row.seconds else ""
        shown = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = (row.section, row.name, seconds, shown, row.target, row.verdict, row.more)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "python": platform.python_version(),
        **{package: of(package) for package in PACKAGES},
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "mib": arguments.mib,
        "rounds": arguments.rounds,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--mib", type=float, default=1024, help="size of the state (default: %(default)s)")
    parser.add_argument("--tensors", type=int, default=100_000, help="small ones (default: %(default)s)")
    parser.add_argument("--step-s", type=float, default=0.35, help="a step's forward and backward")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contenders")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="measure these alone")
    parser.add_argument("--dir", help="where to save; default: a temporary directory in the current one")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--memory-of", choices=list(MEMORY), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments, Path(arguments.dir))
        return 0
    rows: list[Row] = []
    # Not where temporary files usually go: that may be memory.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir or os.getcwd()) as root:
        for name in arguments.only or SECTIONS:
            rows += SECTIONS[name](arguments, Path(root))
            gc.collect()
    if arguments.json:
        print(
            json.dumps(
                {"environment": environment(arguments), "rows": [asdict(row) for row in rows]}, indent=1
            )
        )
    else:
        print(", ".join(f"{key} {value}" for key, value in environment(arguments).items()), end="\n\n")
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
