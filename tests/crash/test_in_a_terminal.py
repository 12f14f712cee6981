"""Ctrl-C where a live bar is drawn: what is said stays readable, and the bar is left where the run stands."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

WIDTH = 100

SCRIPT = """
import signal, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import holdfast as pl
from holdfast.callbacks import RichProgressBar, TQDMProgressBar

bar_name, hook, root = sys.argv[1:]

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.stop("training_step", batch_idx)
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.stop("validation_step", batch_idx)

    def stop(self, hook, batch_idx):
        if hook == hook_of_the_signal and batch_idx == 2:
            signal.raise_signal(signal.SIGINT)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

hook_of_the_signal = hook
bar = RichProgressBar() if bar_name == "rich" else TQDMProgressBar()
bar._interval_s = 0.0  # draw at each batch of validation, at the first two of training
loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
trainer = pl.Trainer(
    max_epochs=1, default_root_dir=root, callbacks=[bar], logger=False,
    num_sanity_val_steps=0, enable_model_summary=False,
)
print("begin")
trainer.fit(Module(), loader, loader)
"""


def screen_of(*arguments: str) -> tuple[int, list[str]]:
    """Run the script in a terminal; return its exit code and what is on the screen in the end."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    written = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux says so when the last one has closed it
            break
        if not data:
            break
        written += data
    os.close(leader)
    return process.wait(), drawn(written.decode())


def drawn(written: str) -> list[str]:
    """The lines of a terminal after line feeds, returns, cursor up and erased lines."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(re.sub(r"\D", "", part) or 1)
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[row] = lines[row][:column] if part == "\x1b[K" else ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def said(hook: str) -> str:
    what = hook.removesuffix("_step").replace("training", "batch")
    return f"SIGINT: saving when this {what} is done, then leaving (Ctrl-C again to leave at once)"


@pytest.mark.parametrize(
    ("hook", "step", "done"), [("training_step", 3, "3/4"), ("validation_step", 4, "4/4")]
)
def test_the_live_bar(tmp_path: os.PathLike[str], hook: str, step: int, done: str) -> None:
    code, (*above, bar) = screen_of("rich", hook, os.fspath(tmp_path))
    assert code == 130
    assert [re.sub(r"\d[\d.]* kB in .*", "SIZE", line) for line in above] == [
        "begin",
        said(hook),
        f"saved checkpoints/stopped.ckpt  step {step}  SIZE",
    ]
    assert re.fullmatch(rf"Epoch 1/1 [━╸╺]+ {done}( .*)?", bar)


@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_the_tqdm_bar(tmp_path: os.PathLike[str], hook: str) -> None:
    code, lines = screen_of("tqdm", hook, os.fspath(tmp_path))
    assert code == 130
    assert said(hook) in lines
    assert sum(line.startswith("Epoch 0:") for line in lines) == 1
