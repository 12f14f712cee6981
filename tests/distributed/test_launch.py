"""``python train.py``: the script is rank 0, which starts the others; they end when it does, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ConfigError
from holdfast.strategies.launch import command_to_run_again

ROOT = Path(__file__).parents[2]

MODEL = """
import os, signal, sys, time
from pathlib import Path
import torch
import holdfast as pl
from torch.utils.data import DataLoader, TensorDataset

RANK = os.environ.get("RANK", "0")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def rows():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=2)

def trainer(**arguments):
    given = dict(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )
    return pl.Trainer(**{**given, **arguments})
"""


class Job:
    """A script under way, in a session of its own."""

    def __init__(self, place: Path, script: str, *how: str, stdin: Any = subprocess.DEVNULL) -> None:
        (place / "train.py").write_text(MODEL + script)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, *(how or ("train.py",))], cwd=place, env=environment, stdin=stdin, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started: list[int] = []

    def read(self, word: str) -> list[str]:
        """The rest of the next line of stdout that begins with a word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.split()
            if words and words[0] == word:
                return words[1:]
        raise AssertionError(f"no line {word!r}; stderr:\n{self.process.communicate(timeout=60)[1]}")

    def end(self) -> tuple[int, list[str], str]:
        """The exit code, the lines of stdout that were not read, and stderr; all writers have ended by then."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out.splitlines(), err


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Any]:
    begun: list[Job] = []

    def start(script: str, *how: str, **options: Any) -> Job:
        begun.append(Job(tmp_path, script, *how, **options))
        return begun[-1]

    yield start
    for job in begun:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def test_requests_one_after_the_other(jobs: Any) -> None:
    """What every process runs, what rank 0 runs alone, and what follows the last request of all."""
    job = jobs(
        """
if __name__ == "__main__":
    Path("elsewhere").mkdir(exist_ok=True)
    os.chdir("elsewhere")  # the others start where this one did
    pl.seed_everything(1)
    model = Model()
    alone = trainer(devices=1, enable_checkpointing=None, default_root_dir="alone")
    alone.fit(model, rows())
    two = trainer(strategy="ddp", devices=2)
    say("trained-alone", RANK, alone.checkpoint_callback.best_model_path, alone.global_step)
    two.validate(model, rows(), verbose=False)
    say("validated", RANK, two.callback_metrics["val"].item())
    two.fit(model, rows())
    result = trainer().validate(model, rows(), verbose=False)
    say("between", RANK, result[0]["val"], two.global_step)
    trainer(devices=2).fit(model, rows())
    print("after", RANK, os.path.basename(os.getcwd()), sys.argv[1], torch.get_num_threads())
""",
        "-m", "train", "argument",
    )  # fmt: skip
    code, lines, err = job.end()
    assert (code, [line for line in lines if line.startswith("after")]) == (
        0,
        ["after 0 elsewhere argument 1"],
    ), err
    found = {
        word: {tuple(line.split()[2:]) for line in lines if line.split()[0] == word}
        for word in ("trained-alone", "validated", "between")
    }
    assert [len(values) for values in found.values()] == [1, 1, 1], lines
    saved, steps = found["trained-alone"].pop()
    assert (Path(saved).is_file(), steps) == (True, "8")
    assert len(list((job.place / "elsewhere" / "alone").rglob("*.ckpt"))) == 1
    assert found["between"].pop()[1] == "4"  # two processes share the rows
    assert sorted(line.split()[1] for line in lines) == ["0", "0", "0", "0", "1", "1", "1"]
    assert "Warning" not in err


FAILING = """
class Failing(Model):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            say("at-step", RANK, os.getpid())
            if RANK == "1" and sys.argv[1] == "raises":
                raise ValueError("no more")
            if RANK == "1" and sys.argv[1] == "is-killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if sys.argv[1] == "waits":
                time.sleep(600)
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    trainer(strategy="ddp", devices=2).fit(Failing(), rows())
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "rank 1 failed with ValueError: no more.\n"),
        ("is-killed", "rank 1 was killed by SIGKILL.\n"),
    ],
)
def test_a_started_process_fails(how: str, told: str, jobs: Any) -> None:
    code, _, err = jobs(FAILING, "train.py", how).end()
    assert code == 1
    assert f"[rank0]: holdfast.errors.RankFailed: {told}" in err, err
    assert ("[rank1]: ValueError: no more" in err) == (how == "raises")


def test_nothing_outlives_rank_zero(jobs: Any) -> None:
    job = jobs(FAILING, "train.py", "waits")
    ranks = dict([job.read("at-step"), job.read("at-step")])
    os.kill(int(ranks["0"]), signal.SIGKILL)
    code, _, err = job.end()  # when the pipes are closed all that wrote to them are gone
    assert code == -signal.SIGKILL
    assert err.endswith("rank 1 ends: rank 0, which has started it, is gone\n")
    assert "TCPStore" not in err  # whose stack torch would show


def test_ctrl_c(jobs: Any) -> None:
    """It goes to the terminal's whole foreground group; all processes stop at the same safe point."""
    job = jobs(
        """
class Slow(Model):
    def on_train_batch_end(self, *args):
        if self.global_step == 1:
            say("stepped", RANK)
        time.sleep(0.05)

if __name__ == "__main__":
    endless = trainer(
        strategy="ddp", devices=2, max_epochs=-1, enable_checkpointing=None, default_root_dir="runs"
    )
    try:
        endless.fit(Slow(), rows())
    finally:
        say("left-at", RANK, endless.global_step)
"""
    )
    for _ in range(2):
        job.read("stepped")
    os.killpg(job.process.pid, signal.SIGINT)
    code, lines, err = job.end()
    assert code == 130, err
    left = [line.split() for line in lines if line.startswith("left-at")]
    assert sorted(rank for _, rank, _ in left) == ["0", "1"]
    assert len({step for *_, step in left}) == 1
    assert len(list((job.place / "runs").rglob("stopped.ckpt"))) == 1
    assert "Traceback" not in err, err


def test_a_script_from_standard_input(jobs: Any, tmp_path: Path) -> None:
    script = tmp_path / "piped"
    script.write_text(MODEL + "trainer(devices=3).fit(Model(), rows())\n")
    with script.open() as stdin:
        code, _, err = jobs("", "-", stdin=stdin).end()
    assert code == 1
    assert err.splitlines()[-1] == (
        "holdfast.errors.ConfigError: Trainer(devices=3) starts 2 further processes by running the command of this "
        "one again, which does not work in a script that is read from standard input. Put the code into a file, "
        "and run `python FILE`, or `torchrun --nproc-per-node 3 FILE`. With devices=1 it trains here."
    )


def test_where_there_is_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "package", "--lr", "1"])
    assert command_to_run_again(2) == ["-X", "dev", "-m", "package", "--lr", "1"]
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ConfigError) as refused:
        command_to_run_again(2)
    assert str(refused.value) == (
        "Trainer(devices=2) starts 1 further process by running the command of this one again, which does not work "
        "in the interactive interpreter. Put the code into a file, and run `python FILE`, or `torchrun "
        "--nproc-per-node 2 FILE`. With devices=1 it trains here."
    )

    class Notebook:
        @staticmethod
        def get_ipython() -> object:
            return object()

    monkeypatch.setitem(sys.modules, "IPython", Notebook)
    with pytest.raises(ConfigError, match="which does not work in a notebook"):
        command_to_run_again(2)
