"""A signal on some rank: all stop at the same batch, one file holds it, and a resume is exact."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint

from .ranks import Ended, run_ranks, start_ranks
from .saving_jobs import Model, checkpoint, files, loader, new_model, trainer_in, weights

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


class Signalled(Model):
    """Sends its own process a signal in a hook, on some ranks.

    Args:
        where: The hook.
        batches: How many batches are done then.
        number: The signal.
        ranks: Those that get it.
        times: How often.
    """

    def __init__(self, where: str, batches: int, number: int, ranks: tuple[int, ...], times: int = 1) -> None:
        super().__init__()
        self.where, self.batches, self.number, self.ranks, self.times = where, batches, number, ranks, times

    def _here(self, where: str) -> None:
        if (where, self.trainer.progress.total_batches) == (self.where, self.batches) and self.times:
            times, self.times = self.times, 0
            if self.trainer.global_rank in self.ranks:
                for _ in range(times):
                    os.kill(os.getpid(), self.number)

    def setup(self, stage: str) -> None:
        self._here("setup")

    def on_train_start(self) -> None:
        self._here("on_train_start")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._here("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self._here("on_train_batch_end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._here("validation_step")
        super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, payload: dict[str, Any]) -> None:
        self._here("on_save_checkpoint")

    def on_train_epoch_end(self) -> None:
        self._here("on_train_epoch_end")


def fit(place: Path, how: tuple[Any, ...] | None, ckpt_path: str | None = None) -> list[float]:
    pl.seed_everything(1)
    model = new_model() if how is None else Signalled(*how)
    model.load_state_dict(new_model().state_dict())
    pl.seed_everything(2)
    kept = checkpoint(place, every_n_train_steps=5, save_top_k=-1)
    trainer = trainer_in(place, kept, stop_signals=("SIGTERM", "SIGUSR1"), val_check_interval=4)
    try:
        trainer.fit(model, loader(), loader(8), ckpt_path=ckpt_path)
    finally:
        print(f"ended after {trainer.progress.total_batches}", flush=True)
        sys.stdout.flush()
    return weights(model)


def batches_of(ended: list[Ended]) -> list[int]:
    return [int(re.findall(r"ended after (\d+)", one.output)[-1]) for one in ended]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The weights that a run without any signal ends with."""
    found = run_ranks(fit, tmp_path_factory.mktemp("whole"), None)
    assert found[0] == found[1]
    weights: list[float] = found[0]
    return weights


CASES = {
    "rank 0": ("training_step", 2, TERM, (0,)),
    "rank 1": ("training_step", 2, TERM, (1,)),
    "all ranks, twice": ("on_train_batch_end", 3, TERM, (0, 1), 2),
    "SIGUSR1": ("training_step", 5, USR1, (1,)),
    "Ctrl-C on rank 1": ("training_step", 2, INT, (1,)),
    "during a save": ("on_save_checkpoint", 5, TERM, (1,)),
    "during validation": ("validation_step", 4, TERM, (1,)),
    "the end of an epoch": ("on_train_epoch_end", 8, TERM, (1,)),
    "the last batch but one": ("on_train_batch_end", 15, TERM, (1,)),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_stop_at_the_same_batch_and_a_resume_is_exact(
    tmp_path: Path, case: str, uninterrupted: list[float]
) -> None:
    how = CASES[case]
    ended = start_ranks(fit, tmp_path, how).wait(60)
    code = 130 if how[2] == INT else 143
    assert [one.code for one in ended] == [code, code], [one.error + one.output for one in ended]
    batches = batches_of(ended)
    assert batches[0] == batches[1] >= how[1]
    assert [name for name in files(tmp_path) if "stopped" in name] == ["stopped.ckpt"]
    saved = torch.load(next(tmp_path.rglob("stopped.ckpt")), weights_only=True)
    assert saved["holdfast"]["progress"]["total_batches"] == batches[0]
    name = signal.Signals(how[2]).name
    said = re.findall(rf"(?m)^{name}.*(?:saving|leaving).*$", ended[0].output)
    assert len(said) == 1 and (how[3] != (1,) or said == [f"{name} on rank 1: saving, then leaving"])
    assert not re.findall(r"(?m)^SIG.*$", ended[1].output)
    again = run_ranks(fit, tmp_path, None, "auto")
    assert again == [uninterrupted, uninterrupted]
    if batches[0] < 15:  # a later save of the run's has taken its place
        assert not [name for name in files(tmp_path) if "stopped" in name]


@pytest.mark.parametrize("where", ["setup", "on_train_start"])
def test_before_anything_is_trained_all_leave_and_nothing_is_saved(tmp_path: Path, where: str) -> None:
    ended = start_ranks(fit, tmp_path, (where, 0, TERM, (1,))).wait(60)
    assert [one.code for one in ended] == [143, 143], [one.error + one.output for one in ended]
    assert batches_of(ended) == [0, 0]
    assert files(tmp_path) == []
    assert ended[0].output.count("nothing is saved: nothing was trained yet") == 1


def test_after_the_last_batch_all_leave_with_everything_saved(
    tmp_path: Path, uninterrupted: list[float]
) -> None:
    ended = start_ranks(fit, tmp_path, ("on_train_epoch_end", 16, TERM, (1,))).wait(60)
    assert [one.code for one in ended] == [143, 143], [one.error + one.output for one in ended]
    assert batches_of(ended) == [16, 16]
    saved = torch.load(next(tmp_path.rglob("stopped.ckpt")), weights_only=True)["state_dict"]
    found = [value for name in ("layer.weight", "layer.bias") for value in saved[name].flatten().tolist()]
    assert found == uninterrupted


class Waiting(ModelCheckpoint):
    """Goes on from the end of its second save when all ranks have been asked to stop; says where that was."""

    saves = 0

    def committed(self, trainer: Any, plan: Any, report: Any) -> None:
        super().committed(trainer, plan, report)
        self.saves += 1
        if self.saves == 2:
            if trainer.global_rank == 1:
                os.kill(os.getpid(), TERM)
            while not trainer.strategy.agreement.pending:
                time.sleep(0.001)
            print(f"asked after {trainer.progress.total_batches}", flush=True)


def asked_beside_a_save(place: Path) -> None:
    kept = Waiting(place / "kept", every_n_train_steps=20, save_top_k=-1)
    trainer = trainer_in(place, kept)
    try:
        trainer.fit(new_model(), loader(1024))
    finally:
        print(f"ended after {trainer.progress.total_batches}", flush=True)


def test_a_signal_while_saves_are_carried_out_is_not_forgotten(tmp_path: Path) -> None:
    ended = start_ranks(asked_beside_a_save, tmp_path).wait(60)
    assert [one.code for one in ended] == [143, 143], [one.error + one.output for one in ended]
    asked = [int(re.findall(r"asked after (\d+)", one.output)[0]) for one in ended]
    assert asked[0] == asked[1] and batches_of(ended) == [asked[0] + 1] * 2


def twice_ctrl_c(place: Path) -> None:
    fit(place, ("training_step", 2, INT, (1,), 2))


def test_a_second_ctrl_c_on_one_rank_ends_all_at_once_and_saves_nothing(tmp_path: Path) -> None:
    ended = start_ranks(twice_ctrl_c, tmp_path).wait(60)
    assert "KeyboardInterrupt" in ended[1].error
    assert "rank 1 failed with KeyboardInterrupt" in ended[0].error
    assert files(tmp_path) == []


def requeued(place: Path, counts: Path) -> None:
    """A job of SLURM's, whose `scontrol` notes that it was called."""
    counts.mkdir(exist_ok=True)
    tool = counts / f"bin{os.environ['RANK']}"
    tool.mkdir()
    (tool / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {counts}/called\n")
    (tool / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{tool}:{os.environ['PATH']}"
    os.environ.update(
        SLURM_JOB_ID="7", SLURM_JOB_NAME="train", SLURM_NTASKS="2", SLURM_PROCID=os.environ["RANK"],
        SLURM_LOCALID=os.environ["RANK"], SLURM_NODEID="0", SLURM_JOB_NODELIST="localhost",
    )  # fmt: skip
    fit(place, ("training_step", 2, USR1, (1,)))


def test_slurm_is_asked_once_to_start_the_job_again(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    ended = start_ranks(requeued, tmp_path / "run", counts).wait(60)
    assert [one.code for one in ended] == [143, 143], [one.error + one.output for one in ended]
    assert (counts / "called").read_text().splitlines() == ["requeue 7"]
    assert files(tmp_path / "run") == ["stopped.ckpt"]
