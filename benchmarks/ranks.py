"""What several processes cost, on one machine: connecting, agreeing, saving, going on, and memory of loading.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --ranks 1 2 4 --mib 512 --dir /mnt/disk
    python benchmarks/ranks.py --only agreement memory

Every rank is a new interpreter, and gloo joins them. With more ranks than cores the times are those of a
machine that is too small: what counts is how they grow. docs/scale.md tells what follows for large jobs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 1 << 20


# -- ranks ---------------------------------------------------------------------------------------------------


def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returns on each rank of a new job."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, answers, function, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    failed = [one for one in found.values() if isinstance(one, str)]
    if failed:
        raise SystemExit(failed[0])
    return [found[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, answers: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        answers.put((rank, function(*args)))
    except BaseException as error:
        answers.put((rank, f"failed: {type(error).__name__}: {error}"))
        raise


def trainer_for(root: Path, **arguments: Any) -> Any:
    import holdfast as pl

    return pl.Trainer(
        strategy="ddp", accelerator="cpu", default_root_dir=root, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


# -- connecting and agreeing ---------------------------------------------------------------------------------


class Counted:
    """A store that counts what is asked of it."""

    calls = 0

    def __init__(self, store: Any) -> None:
        self._store = store

    def clone(self) -> Counted:
        return Counted(self._store.clone())

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)

        def counted(*args: Any) -> Any:
            Counted.calls += 1
            return found(*args)

        return counted


def agreement(root: Path, rounds: int) -> dict[str, Any]:
    """Connect, meet, and have an action of one rank done by all at the same tick of a loop of 2 ms steps."""
    import torch.distributed as dist

    from holdfast.strategies.agreement import Agreement

    began = time.monotonic()
    trainer = trainer_for(root, max_epochs=1)
    strategy = trainer.strategy
    strategy.setup_environment()
    found: dict[str, Any] = {"connect_s": time.monotonic() - began}
    rank, world_size = strategy.global_rank, strategy.world_size
    agreed = Agreement(Counted(strategy.store.clone()), rank, world_size)
    agreed.meet("begin", "")
    times, before = [], Counted.calls
    for number in range(rounds):
        dist.barrier(group=strategy.coordination)
        began = time.monotonic()
        agreed.meet(f"meeting {number}", "")
        times.append(time.monotonic() - began)
    found["meet_s"] = statistics.median(times)
    found["calls_of_a_meeting"] = (Counted.calls - before) / rounds

    tick, held = [0], [0]
    agreed.begin(lambda: tick[0], lambda: held.__setitem__(0, 1))
    posted: dict[int, float] = {}
    done: dict[int, float] = {}
    agreed.meet("loop", "")
    before = Counted.calls
    for step in range(rounds * 20):
        if step % 20 == 0 and rank == world_size - 1:
            posted[step // 20] = time.monotonic()
            agreed.post("act", step // 20)
        time.sleep(0.002)
        dist.barrier(group=strategy.coordination)  # as gradients keep ranks together
        tick[0] += 1
        if held[0]:
            held[0] = 0
            for action in agreed.due(tick[0]):
                done[action.value] = time.monotonic()
            held[0] = int(agreed.pending)
    agreed.meet("end", "")
    found["calls_of_an_action"] = (Counted.calls - before) / rounds
    found["posted"], found["done"] = posted, done
    agreed.end()
    dist.barrier(group=strategy.coordination)
    agreed.close()
    return found


def report_agreement(ranks: int, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    found = run(ranks, agreement, root, args.rounds)
    posted = found[-1]["posted"]
    late = [max(one["done"][n] for one in found) - at for n, at in posted.items() if n in found[0]["done"]]
    return {
        "connect s": max(one["connect_s"] for one in found),
        "meeting ms": 1e3 * max(one["meet_s"] for one in found),
        "stop agreed and reached ms": 1e3 * statistics.median(late),
        "store calls of a meeting, all ranks": sum(one["calls_of_a_meeting"] for one in found),
        "store calls of an action, all ranks": sum(one["calls_of_an_action"] for one in found),
    }


# -- saving and going on -------------------------------------------------------------------------------------


def module_of(size_bytes: int) -> Any:
    """A module whose weights and AdamW's state have ``size_bytes``, and a loader of batches of one row."""
    import torch

    import holdfast as pl
    from states import Weights

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Weights(size_bytes // 3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.stack([parameter.mean() for parameter in self.parameters()]).sum() * batch[0].mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    rows = torch.utils.data.TensorDataset(torch.ones(1024, 1))
    torch.manual_seed(0)
    return Module(), torch.utils.data.DataLoader(rows, 1)


class Anonymous:
    """The memory that is this process's alone (RssAnon), now and at its highest since `begin`."""

    def __init__(self) -> None:
        self.highest_bytes = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now_bytes() -> int:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._ends.wait(0.001):
            self.highest_bytes = max(self.highest_bytes, self.now_bytes())

    @contextmanager
    def watched(self) -> Iterator[Anonymous]:
        self._thread.start()
        try:
            yield self
        finally:
            self._ends.set()
            self._thread.join()


def saving(root: Path, size_bytes: int) -> dict[str, Any]:
    """Train 6 steps with a save at every third, and say what it cost."""
    from holdfast.callbacks import ModelCheckpoint

    module, data = module_of(size_bytes)
    trainer = trainer_for(
        root, max_epochs=1, max_steps=6, callbacks=[ModelCheckpoint(every_n_train_steps=3, filename="{step}")]
    )
    trainer.fit(module, data)
    stats = trainer.checkpoint_stats
    payload_bytes = 0
    if trainer.is_global_zero:
        from holdfast.checkpoint.load import load

        ranks = load(trainer.checkpoint_callback.best_model_path)["holdfast"].get("ranks") or [{}]
        payload_bytes = max(len(pickle.dumps(one)) for one in ranks)
    return {
        "saves": stats.saves, "blocked_s": stats.blocked_s, "durable_s": stats.durable_s,
        "bytes_of_a_rank": payload_bytes,
    }  # fmt: skip


def report_saving(ranks: int, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    found = run(ranks, saving, root / f"saving-{ranks}", args.mib * MIB)
    first = found[0]
    shutil.rmtree(root / f"saving-{ranks}", ignore_errors=True)
    return {
        "a save blocks s": first["blocked_s"] / max(1, first["saves"]),
        "durable after s": first["durable_s"] / max(1, first["saves"]),
        "bytes of what differs, a rank": first["bytes_of_a_rank"],
    }


def _import_what_torch_puts_off() -> None:
    """Step and load an optimizer, for which torch imports 60 MiB of itself."""
    import torch

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def going_on(path: str, root: Path, size_bytes: int, naive: bool) -> dict[str, Any]:
    """Read and verify the file on all ranks at once, and resume from it; watch the memory."""
    import torch

    import holdfast as pl
    from holdfast.checkpoint.load import load_mapped

    module, data = module_of(size_bytes)
    trainer = trainer_for(root, max_epochs=1, max_steps=7, enable_checkpointing=False)
    trainer.strategy.setup_environment()
    trainer.strategy.barrier()
    began = time.monotonic()
    loaded = load_mapped(path, own=("holdfast",), skip=("optimizer_states",) if naive else ())
    read_s = time.monotonic() - began
    loaded.release()
    del loaded
    trainer.strategy.barrier()
    _import_what_torch_puts_off()
    live = Anonymous.now_bytes()
    if naive:
        # What a hand-written script does on each rank.
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
        with Anonymous().watched() as memory:
            payload = torch.load(path, weights_only=False)
            module.load_state_dict(payload["state_dict"])
            optimizer.load_state_dict(payload["optimizer_states"][0])
        return {"over_live": memory.highest_bytes - live, "read_s": read_s}

    class Before(pl.Callback):
        """All is restored."""

        memory: Anonymous
        after = 0

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.after = Anonymous.now_bytes()
            memory.highest_bytes, Before.peak = 0, memory.highest_bytes

    before = Before()
    trainer.callbacks.append(before)
    with Anonymous().watched() as memory:
        began = time.monotonic()
        trainer.fit(module, data, ckpt_path=path)
        fit_s = time.monotonic() - began
    return {
        "over_live": Before.peak - live, "kept": before.after - live, "read_s": read_s, "fit_s": fit_s,
    }  # fmt: skip


def report_memory(ranks: int, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    at = root / "source"
    if not at.exists():
        run(1, saving, at, args.mib * MIB)
    path = str(next(at.rglob("*.ckpt")))
    found = run(ranks, going_on, path, root, args.mib * MIB, False)
    naive = run(ranks, going_on, path, root, args.mib * MIB, True)
    weights = args.mib / 3
    return {
        "file MiB": os.path.getsize(path) / MIB,
        "read and verified by all at once s": max(one["read_s"] for one in found),
        "private memory over the model, highest MiB a rank": max(one["over_live"] for one in found) / MIB,
        "  of that when training begins": max(one["kept"] for one in found) / MIB,
        "  the optimizer's state is": 2 * weights,
        "torch.load and load_state_dict, highest MiB a rank": max(one["over_live"] for one in naive) / MIB,
        "private memory of all ranks, highest MiB": sum(one["over_live"] for one in found) / MIB,
    }


REPORTS: dict[str, Callable[[int, Path, argparse.Namespace], dict[str, Any]]] = {
    "agreement": report_agreement, "saving": report_saving, "memory": report_memory,
}  # fmt: skip


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def main() -> None:
    """Measure, and print a table for each subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--mib", type=int, default=192, help="weights and optimizer state")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dir", type=Path, help="where files go; a temporary directory by default")
    parser.add_argument("--only", nargs="+", choices=list(REPORTS), default=list(REPORTS))
    parser.add_argument("--json", type=Path, help="put the figures here too")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="ranks-", dir=args.dir))
    figures: dict[str, dict[int, dict[str, Any]]] = {}
    try:
        for name in args.only:
            counts = [ranks for ranks in args.ranks if name != "agreement" or ranks > 1]
            figures[name] = {ranks: REPORTS[name](ranks, root, args) for ranks in counts}
            print(f"\n{name}, {os.cpu_count()} cores, {args.mib} MiB of state")
            print(f"{'ranks':54}" + "".join(f"{ranks:>10}" for ranks in counts))
            for line in figures[name][counts[0]]:
                row = "".join(f"{shown(figures[name][ranks][line]):>10}" for ranks in counts)
                print(f"{line:54}{row}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
