"""FSDP: a run saved by each rank's part goes on from it, on as many ranks, on others, and in one process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint import sharded
from holdfast.errors import CheckpointCorrupt, StorageError
from holdfast.strategies.fsdp import FSDPStrategy

from .fsdp_models import Net, Restored, different, listing, loader, trainer_for, whole
from .ranks import run_ranks, start_ranks


def saver(place: Any, **options: Any) -> ModelCheckpoint:
    settings: dict[str, Any] = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}", **options}
    return ModelCheckpoint(dirpath=place, **settings)


def state_of(trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "weights": whole(dict(trainer.lightning_module.state_dict())),
        "optimizers": whole([one.state_dict() for one in trainer.optimizers]),
        "schedulers": [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs],
        "step": trainer.global_step,
        "random": torch.rand(2).tolist(),
    }


class Dropping(Net):
    """Draws in forward, with another dropout on every rank."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(rows, 0.2, self.training))


def seeded() -> None:
    pl.seed_everything(7, verbose=False)
    torch.manual_seed(7 + int(os.environ["RANK"]))


# -- the same number of ranks --------------------------------------------------------------------------------


def whole_and_resumed(root: str, model: dict[str, Any], options: dict[str, Any], stop: int) -> Any:
    """A run that never stops, and one that is stopped after some batches and goes on in another trainer."""
    ends = []
    for place, stops in (("whole", None), ("resumed", stop)):
        for max_steps in [stops] if stops else []:
            seeded()
            first = trainer_for(
                "fsdp", f"{root}/{place}", callbacks=[Stop(max_steps), saver_of(root, place)], **options
            )
            first.fit(Dropping(**model), loader(shuffle=True))
        seeded()
        net = Dropping(**model)
        trainer = trainer_for(
            "fsdp", f"{root}/{place}", callbacks=[saver_of(root, place)], max_epochs=2, **options
        )
        trainer.fit(net, loader(shuffle=True), ckpt_path="auto" if stops else None)
        ends.append(({**state_of(trainer), "buffers": dict(net.named_buffers())}, net.seen))
    return ends


def saver_of(root: str, place: str) -> ModelCheckpoint:
    return saver(f"{root}/{place}", every_n_train_steps=1000)


class Stop(pl.Callback):
    """Saves after some batches, wherever that is in a window, and ends the run."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.progress.total_batches == self.batches:
            trainer.save_requests.append(trainer.checkpoint_callbacks[0])
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("ranks", "model", "options", "stop"),
    [
        (3, {"norm": True}, {}, 3),
        (2, {"optimizer": "sgd"}, {"accumulate_grad_batches": 3}, 4),
        (
            2,
            {"optimizer": "nadam", "norm": True},
            {"accumulate_grad_batches": 2, "precision": "bf16-mixed"},
            3,
        ),
        (2, {"manual": True}, {}, 2),
    ],
    ids=["3 ranks, BatchNorm", "in a window", "in a window of bfloat16", "manual"],
)
def test_a_resumed_run_ends_bit_identical(
    tmp_path: Path, ranks: int, model: Any, options: Any, stop: int
) -> None:
    for (never, seen), (resumed, seen_after) in run_ranks(
        whole_and_resumed, str(tmp_path), model, options, stop, ranks=ranks
    ):
        assert different(never, resumed) == []
        assert seen[-len(seen_after) :] == seen_after and 0 < len(seen_after) < len(seen)


# -- other numbers of ranks, other strategies ----------------------------------------------------------------


def go_on(
    strategy: str, root: str, steps: int, kind: str = "sharded", model: Any = None, source: str = "auto"
) -> Any:
    """Train some steps further; what the fit began from and what it saved last."""
    seeded()
    watch, net = Restored(), Net(**({"norm": True} if model is None else model))
    chosen: Any = FSDPStrategy(state_dict_type=kind) if strategy == "fsdp" else strategy
    trainer = trainer_for(chosen, root, callbacks=[watch, saver(root)], max_steps=steps, max_epochs=-1)
    trainer.fit(net, loader(24 // trainer.world_size // 2), ckpt_path=source)
    ranks = {"buffers": {name: one.clone() for name, one in net.named_buffers()}}
    return {"weights": watch.weights, "optimizers": watch.optimizers, **state_of(trainer), **ranks} | {
        "from": (watch.weights, watch.optimizers),
        "seen": net.seen,
    }


def in_file(path: str | Path) -> tuple[dict[str, Any], list[Any]]:
    """Weights and optimizer states of a checkpoint, a file or a directory."""
    found = pl.load(path)
    return dict(found["state_dict"]), found["optimizer_states"]


def numbered(optimizers: list[Any]) -> list[Any]:
    return [one["state"] for one in optimizers]


def assert_began_from(ended: Any, path: Path) -> None:
    weights, optimizers = ended["from"]
    saved_weights, saved_optimizers = in_file(path)
    assert different(weights, saved_weights) == []
    assert different(numbered(optimizers), numbered(saved_optimizers)) == []


def test_two_ranks_then_three_then_one_then_ddp_and_back(tmp_path: Path) -> None:
    root = str(tmp_path)
    two = run_ranks(go_on, "fsdp", root, 2)
    means = [rank["buffers"]["net.1.running_mean"] for rank in two]
    assert not torch.equal(*means)  # each rank's own, and each is kept
    assert in_file(tmp_path / "step=2.ckpt")[0]["net.1.running_mean"].equal(means[0])
    three = run_ranks(go_on, "fsdp", root, 4, ranks=3)
    for ended in three:  # on another number of ranks all go on from rank 0's buffers
        assert_began_from(ended, tmp_path / "step=2.ckpt")
    # The global batches are those of the 2 ranks, each row of the epoch once.
    rows = sorted(value for rank in (*two, *three) for batch in rank["seen"] for value in batch)
    assert [round(value * 24) for value in rows] == sorted(list(range(24)) * 2)
    (one,) = run_ranks(go_on, "fsdp", root, 6, ranks=1)
    assert_began_from(one, tmp_path / "step=4.ckpt")
    for ended in run_ranks(go_on, "ddp", root, 8):
        assert_began_from(ended, tmp_path / "step=6.ckpt")
    for ended in run_ranks(go_on, "fsdp", root, 10):
        assert_began_from(ended, tmp_path / "step=8.ckpt")
    kinds = {name: (tmp_path / name).is_dir() for name in listing(tmp_path)}
    assert kinds == {
        "step=10.ckpt": True, "step=2.ckpt": True, "step=4.ckpt": True, "step=6.ckpt": True, "step=8.ckpt": False,
    }  # fmt: skip


def test_full_files_of_fsdp_and_files_of_one_process(tmp_path: Path) -> None:
    root = str(tmp_path)
    run_ranks(go_on, "auto", root, 2, ranks=1)
    for ended in run_ranks(go_on, "fsdp", root, 4, "full", ranks=3):
        assert_began_from(ended, tmp_path / "step=2.ckpt")
    (one,) = run_ranks(go_on, "auto", root, 6, ranks=1)
    assert_began_from(one, tmp_path / "step=4.ckpt")
    assert [(tmp_path / name).is_file() for name in listing(tmp_path)] == [True, True, True]
    # The whole model is in it, and opens without holdfast.
    opened = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert tuple(opened["state_dict"]["net.0.weight"].shape) == (7, 5)


def test_a_directory_in_one_process(tmp_path: Path) -> None:
    saved = run_ranks(go_on, "fsdp", str(tmp_path), 2, "sharded", {"optimizer": "sgd"})[0]
    built = Net.load_from_checkpoint(tmp_path / "step=2.ckpt")
    assert built.hparams["optimizer"] == "sgd"
    assert different(dict(built.state_dict()), saved["weights"]) == []
    alone = trainer_for("auto", str(tmp_path))
    alone.validate(built, loader(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert different(dict(built.state_dict()), saved["weights"]) == []


class Apart(Net):
    """One layer is every rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(5, 1, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + self.own(rows)


def train_apart(root: str, steps: int) -> Any:
    net, watch = Apart(), Restored()
    strategy = FSDPStrategy(ignored_parameters=set(net.own.parameters()))
    trainer = trainer_for(strategy, root, callbacks=[watch, saver(root)], max_steps=steps, max_epochs=-1)
    trainer.fit(net, loader(), ckpt_path="auto")
    return watch.weights, watch.optimizers, state_of(trainer)


def test_ignored_parameters_are_each_ranks_own(tmp_path: Path) -> None:
    before = run_ranks(train_apart, str(tmp_path), 2)
    after = run_ranks(train_apart, str(tmp_path), 4)
    assert not torch.equal(before[0][2]["weights"]["own.weight"], before[1][2]["weights"]["own.weight"])
    for (_, _, left), (weights, optimizers, _) in zip(before, after, strict=True):
        assert different(left["weights"], weights) == []
        assert different(left["optimizers"], optimizers) == []


# -- names, retention, and what goes on beside training ------------------------------------------------------


def keep_one(root: str) -> Any:
    net = Net()
    best = saver(
        f"{root}/best", save_top_k=1, monitor="loss", mode="max", save_last=True, every_n_train_steps=1
    )
    trainer = trainer_for("fsdp", root, callbacks=[best])
    trainer.fit(net, loader())
    trainer.save_checkpoint(f"{root}/now.ckpt")
    there = os.path.isfile(f"{root}/now.ckpt/manifest.json")
    trainer.validate(net, loader(), ckpt_path="best", verbose=False)
    trainer.predict(net, loader(), ckpt_path=f"{root}/now.ckpt")
    return best.best_model_path, best.last_model_path, there, whole(dict(net.state_dict()))


def test_names_and_retention(tmp_path: Path) -> None:
    first, second = run_ranks(keep_one, str(tmp_path))
    assert first[:3] == second[:3]
    best, last, there, weights = first
    assert there  # durable when save_checkpoint returns
    assert listing(tmp_path / "best") == sorted([Path(best).name, "last.ckpt"])
    sharded.verify(best)
    sharded.verify(last)
    assert different(dict(pl.load(tmp_path / "now.ckpt")["state_dict"]), weights) == []


class HeldBack(pl.Callback):
    """Lets the writing of the first save go on when four more batches are trained."""

    def __init__(self, root: str) -> None:
        self.root, self.at_save, self.when = root, {}, -1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == 2:
            self.at_save = whole(dict(trainer.lightning_module.state_dict()))
        if step == 6:
            assert listing(f"{self.root}/held") == []
            Path(f"{self.root}/go{trainer.global_rank}").touch()


def save_beside(root: str) -> Any:
    real = sharded.save
    rank = int(os.environ["RANK"])

    def held_back(*args: Any, **kwargs: Any) -> Any:
        while not os.path.exists(f"{root}/go{rank}"):
            time.sleep(0.01)
        return real(*args, **kwargs)

    sharded.save = held_back
    watch = HeldBack(root)
    trainer = trainer_for(
        "fsdp", root, callbacks=[watch, saver(f"{root}/held", every_n_train_steps=2)], max_steps=6
    )
    os.makedirs(f"{root}/held", exist_ok=True)
    trainer.limit_train_batches = 6
    trainer.checkpoint_callbacks[0].on_train_batch_end = once(trainer.checkpoint_callbacks[0])
    trainer.fit(Net(), loader())
    return watch.at_save


def once(callback: ModelCheckpoint) -> Any:
    """The hook of a callback as it is up to the first save; none is asked for while that is held back."""
    hook = callback.on_train_batch_end

    def until_first(trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step <= 2:
            hook(trainer, *args)

    return until_first


def test_training_goes_on_while_parts_are_written(tmp_path: Path) -> None:
    at_save = run_ranks(save_beside, str(tmp_path))[0]
    (name,) = [name for name in listing(tmp_path / "held") if name == "step=2.ckpt"]
    assert different(dict(pl.load(tmp_path / "held" / name)["state_dict"]), at_save) == []


# -- what goes wrong -----------------------------------------------------------------------------------------


def fail_on_rank_one(root: str) -> Any:
    from holdfast.checkpoint.shard_file import ShardFile

    real, rank = ShardFile.end, int(os.environ["RANK"])
    calls = []

    def end(file: Any) -> None:
        calls.append(1)
        if rank == 1 and len(calls) >= 2:
            raise OSError(28, "No space left on device")
        real(file)

    ShardFile.end = end  # type: ignore[method-assign]
    net = Net()
    keeping = saver(root, save_top_k=1, monitor="step", mode="max", on_error="raise")
    try:
        trainer_for("fsdp", root, callbacks=[keeping]).fit(net, loader())
    except StorageError as error:
        return str(error), keeping.best_model_path
    return "trained", keeping.best_model_path


def test_what_the_disk_of_one_rank_refuses_is_raised_on_all(tmp_path: Path) -> None:
    told = run_ranks(fail_on_rank_one, str(tmp_path))
    path = tmp_path / "step=4.ckpt"
    for message, best in told:
        assert message.startswith(f"Could not write rank 1's part of {path}: No space left on device"), (
            message
        )
        assert best == str(tmp_path / "step=2.ckpt")
    assert listing(tmp_path) == ["step=2.ckpt"]  # not deleted for one that never came to be
    sharded.verify(tmp_path / "step=2.ckpt")


def die_while_saving(root: str) -> None:
    class Dying(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            while trainer.global_step == 3 and not os.path.exists(f"{root}/step=2.ckpt"):
                time.sleep(0.01)
            if trainer.global_step == 4 and trainer.global_rank == 1:
                os.environ["HOLDFAST_CRASH_AT"] = "shard-writing"

    trainer_for("fsdp", root, callbacks=[Dying(), saver(root)]).fit(Net(), loader())


def test_a_rank_is_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    first, second = start_ranks(die_while_saving, str(tmp_path)).wait()
    assert second.code == -9
    assert first.code != 0 and "RankFailed" in first.error, first
    assert listing(tmp_path) == ["step=2.ckpt"]
    for ended in run_ranks(go_on, "fsdp", str(tmp_path), 4, "sharded", {}):
        assert_began_from(ended, tmp_path / "step=2.ckpt")
    sharded.verify(tmp_path / "step=4.ckpt")
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def resume_damaged(root: str) -> Any:
    net, watch = Net(), Restored()
    trainer = trainer_for("fsdp", root, callbacks=[watch, saver(root)], max_steps=5, max_epochs=-1)
    try:
        trainer.fit(net, loader(), ckpt_path=f"{root}/step=4.ckpt")
    except CheckpointCorrupt as error:
        told = str(error)
    net = Net()
    trainer = trainer_for("fsdp", root, callbacks=[watch, saver(root)], max_steps=5, max_epochs=-1)
    trainer.fit(net, loader(), ckpt_path="auto")
    return told, os.path.basename(str(trainer.ckpt_path)), watch.weights


def test_a_damaged_part_is_passed_over_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(go_on, "fsdp", str(tmp_path), 4, "sharded", {})
    shard = tmp_path / "step=4.ckpt" / "__1_0.distcp"
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for told, name, weights in run_ranks(resume_damaged, str(tmp_path)):
        assert "step=4.ckpt is corrupt: __1_0.distcp" in told
        assert name == "step=2.ckpt"
        assert different(weights, in_file(tmp_path / "step=2.ckpt")[0]) == []
