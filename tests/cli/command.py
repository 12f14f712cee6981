"""Runs the command as a user does, in a process of its own, and makes the directories that it is shown."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from holdfast.callbacks import lineage
from holdfast.checkpoint import sharded
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.cli import main

ROOT = Path(__file__).parents[2]
KEY = (
    "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return {**kept, "COLUMNS": "80", "PYTHONPATH": str(ROOT / "src"), **more}


def child(*arguments: object, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, its output piped."""
    command = [sys.executable, "-m", "holdfast", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120, check=False, **more
    )


def holdfast(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which takes a hundredth of the time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        here = os.getcwd()
        os.chdir(cwd or here)
        try:
            code = main(list(map(str, arguments)))
        finally:
            os.chdir(here)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


def as_json(*arguments: object, cwd: Path | None = None, code: int = 0) -> Any:
    ran = holdfast(*arguments, "--json", cwd=cwd)
    assert (ran.returncode, ran.stderr) == (code, "")
    return json.loads(ran.stdout)


def save(path: Path, payload: Any, *, ago_s: float = 0.0, **summary: Any) -> Path:
    """Write a file of ours that says it is ``ago_s`` seconds old."""
    import time

    now = time.time() - ago_s
    with mock.patch("time.time", return_value=now):
        CheckpointEngine().save(payload, path, summary=summary)
    return path


def a_save(
    path: Path, step: int, *, score: float | None = None, names: tuple[str, ...] = (), ago_s: float = 0.0,
    **more: Any,
) -> Path:  # fmt: skip
    """Write a small file that says of itself what those of a run with a ModelCheckpoint do."""
    said: dict[str, Any] = {"step": step, "epoch": step // 10, "exact": True, "kind": "full"}
    if score is not None:
        said["metrics"] = {"val_loss": score}
        said |= lineage.summary_extra(KEY, run="0011223344556677", names=(path.name, *names), score=score)
    payload = {"state_dict": {"w": torch.full((10,), float(step))}, "global_step": step}
    return save(path, payload, ago_s=ago_s, **{**said, **more})


def flip(path: Path, at: int) -> None:
    """Change one byte."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# -- the run that docs/command.md shows ----------------------------------------------------------------------


def a_transformer(step: int) -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed.weight": (1000, 64)}
    for index in range(4):
        shapes[f"layers.{index}.attention.weight"] = (192, 64)
        shapes[f"layers.{index}.attention.bias"] = (192,)
        shapes[f"layers.{index}.norm.weight"] = (64,)
    weights = OrderedDict(
        (name, torch.randn(shape, generator=generator) + step / 10_000) for name, shape in shapes.items()
    )
    weights["head.weight"] = weights["embed.weight"]
    return weights


def a_payload(step: int, lr: float) -> dict[str, Any]:
    """The shape of what a trainer saves, without a training to wait for."""
    weights = a_transformer(step)
    names = [name for name in weights if name != "head.weight"]
    options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    optimizer = {
        "state": {
            index: {
                "step": torch.tensor(float(step)),
                "exp_avg": weights[name] / step,
                "exp_avg_sq": weights[name] ** 2,
            }
            for index, name in enumerate(names)
        },
        "param_groups": [{**options, "params": list(range(len(names)))}],
    }
    return {
        "epoch": step // 100 - 1,
        "global_step": step,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights,
        "hyper_parameters": {"width": 64, "layers": 4, "lr": lr, "betas": (0.9, 0.999), "data": Path("wiki")},
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"step_size": 30, "gamma": 0.1, "last_epoch": step // 100, "_last_lr": [lr]}],
        "callbacks": {KEY: {"monitor": "val_loss", "best_model_score": torch.tensor(0.25)}},
        "holdfast": {
            "format_version": 1,
            "progress": {"epoch": step // 100 - 1, "batch": 100, "stage": "end", "total_batches": step},
            "command": {"optimizers": [{"class": "AdamW"}], "schedulers": [{"class": "StepLR"}]},
            "environment": {"torch": "2.13.0", "python": "3.12.4", "machine": "x86_64", "threads": 8},
        },
    }


def a_run(directory: Path) -> None:
    """``runs/a``: three ranked files, ``last.ckpt``; ``runs/b``, whose only file is bad; and a sharded one."""
    losses = {100: 0.62, 200: 0.25, 300: 0.31}
    ages_s = {100: 392, 200: 272, 300: 92}  # each stays the same number of minutes for another 50 seconds
    a = directory / "runs" / "a"
    for step, loss in losses.items():
        name = f"epoch={step // 100 - 1}-step={step}.ckpt"
        extra = lineage.summary_extra(KEY, run="0011223344556677", names=(name, "last.ckpt"), score=loss)
        save(
            a / name,
            a_payload(step, 0.001 if step < 300 else 0.0005),
            ago_s=ages_s[step],
            step=step, epoch=step // 100 - 1, metrics={"val_loss": loss, "val_acc": 1 - loss / 2}, exact=True,
            kind="full", **extra,
        )  # fmt: skip
    os.link(a / "epoch=2-step=300.ckpt", a / "last.ckpt")
    b = save(
        directory / "runs" / "b" / "last.ckpt", a_payload(100, 0.1), ago_s=604, step=100, epoch=0, exact=True
    )
    content = b.read_bytes()
    flip(b, content.index(a_transformer(100)["embed.weight"].numpy().tobytes()) + 1000)
    rest, tensors = sharded.split(a_payload(300, 0.0005))
    sharded.save(
        directory / "sharded" / "last.ckpt", rest, tensors, rank=0, world_size=1, summary={"step": 300}
    )
