"""A training whose disk, or whose directory, fails while it goes on.

    python failing_run.py ROOT [OPTIONS AS JSON]

OPTIONS["at"] = {step: [event, ...]} says what happens before the batch that follows that many steps; the events
are methods of `Events`. "checkpoint" are further arguments of ModelCheckpoint, "mount" those of a file system in
memory that the checkpoints go to. Says each step; leaves ROOT/final.pt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import disk
import torch
from child import BATCH_SIZE, Net, Rows, say
from saving_child import fact, failure_of, fill
from torch.utils.data import DataLoader

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.checkpoint import commit
from holdfast.checkpoint.load import load

EPOCHS = 3
STEPS = 24
SAVE_EVERY_N_STEPS = 4


class Events(Callback):
    """Lets things happen to the directory of the checkpoints."""

    def __init__(self, directory: Path, at: dict[str, list[list[Any]]]) -> None:
        self.directory = directory
        self.at = {int(step): events for step, events in at.items()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        events = self.at.pop(trainer.global_step, [])
        if events:
            trainer.engine.wait()  # what they do is done to what is saved by then
        for name, *arguments in events:
            getattr(self, name)(*arguments)

    def refuse(self, call: str, number: int, passes: int = 0, fails: int = -1) -> None:
        disk.refuse(call, number, self.directory, passes=passes, fails=fails)

    def accept(self) -> None:
        disk.accept()

    def nothing(self) -> None:
        """Nothing happens, but that saves that were under way have ended."""

    def fill(self) -> None:
        fill(self.directory, "bytes")

    def make_room(self) -> None:
        for path in self.directory.glob("filler*"):
            path.unlink()

    def delete(self) -> None:
        shutil.rmtree(self.directory)

    def rename(self) -> None:
        self.directory.rename(self.directory.with_name("elsewhere"))

    def replace_by_file(self) -> None:
        shutil.rmtree(self.directory)
        self.directory.write_text("in the way")

    def delete_file(self) -> None:
        self.directory.unlink()

    def delete_when_written(self) -> None:
        """Delete the directory in the middle of the next save."""

        def point(name: str) -> None:
            if name == "synced":
                commit.crash_point = as_it_was
                shutil.rmtree(self.directory)

        as_it_was, commit.crash_point = commit.crash_point, point

    def hold(self, name: str) -> None:
        """Wait for a line on stdin at this point of the next save."""

        def point(reached: str) -> None:
            if reached == name:
                commit.crash_point = as_it_was
                say("at", reached)
                sys.stdin.readline()

        as_it_was, commit.crash_point = commit.crash_point, point

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["who"] = trainer.default_root_dir


def be_slow() -> None:
    """Take each file when a line on stdin says so."""
    sync = os.fsync

    def held_up(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            say("disk", "waits")
            sys.stdin.readline()
            say("disk", "goes", time.monotonic())
        sync(fd)

    os.fsync = held_up


def held(directory: Path) -> dict[str, int | None]:
    """Every file below, and the step of what it holds; None for what is not under a final name."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and "filler" not in path.name)
    return {
        str(path.relative_to(directory)): None
        if commit.is_temporary(path.name)
        else load(path)["global_step"]
        for path in paths
    }


def main(root: Path, options: dict[str, Any]) -> None:
    signal.alarm(100)  # ends a run that hangs, and with it the test that waits for it
    torch.set_num_threads(1)
    directory = Path(options.get("directory", root / "checkpoints"))
    if "mount" in options:
        disk.own_mounts()
        disk.mount_memory(directory, options["mount"])
    pl.seed_everything(options.get("seed", 5))
    how = {"every_n_train_steps": SAVE_EVERY_N_STEPS, "save_top_k": -1, "save_last": True}
    checkpoint = ModelCheckpoint(directory, **{**how, **options.get("checkpoint", {})})
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=options.get("epochs", EPOCHS),
        default_root_dir=root,
        logger=False,
        callbacks=[Events(directory, options.get("at", {})), checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = Net()
    rows = Rows(STEPS * BATCH_SIZE // trainer.max_epochs)
    loader = DataLoader(rows, batch_size=BATCH_SIZE, shuffle=True)
    if options.get("slow"):
        be_slow()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failure = failure_of(lambda: trainer.fit(net, loader, ckpt_path=options.get("ckpt_path", "auto")))
    said = [str(warning.message) for warning in caught]
    alone = directory.is_dir() and "directory" not in options
    published = [checkpoint.best_model_path, checkpoint.last_model_path]
    fact(
        failure=failure,
        step=trainer.global_step,
        left=held(directory) if alone else None,
        warnings=said,
        published=published,
        queued_s=trainer.checkpoint_stats.queued_s,
    )
    if failure is None:
        torch.save(net.state_dict(), root / "final.pt")
    disk.accept()
    say("done", trainer.global_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
