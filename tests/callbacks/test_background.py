"""What ModelCheckpoint says of its saves, by size and by how they were written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from holdfast.callbacks import ModelCheckpoint
from holdfast.callbacks.checkpoint_view import View
from holdfast.callbacks.save_line import format_seconds, save_line
from holdfast.checkpoint.report import SaveReport
from holdfast.utilities import rank_zero
from tests.training.saved_in_background import fit
from tests.training.test_estimate import Wider

BLOCK = {
    "size_bytes": 1_200_000_000,
    "blocked_s": 0.0061,
    "durable_s": 0.62,
    "write_s": 0.571,
    "background": True,
}


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({}, "1.2 GB  blocked 0.006 s, durable after 0.62 s (2.1 GB/s)"),
        (
            {"waited_s": 0.0214},
            "1.2 GB  blocked 0.006 s, before the step 0.021 s, durable after 0.62 s (2.1 GB/s)",
        ),
        ({"waited_s": 0.0004}, "1.2 GB  blocked 0.006 s, durable after 0.62 s (2.1 GB/s)"),
        ({"attempts": 3}, "1.2 GB  blocked 0.006 s, durable after 0.62 s (2.1 GB/s), 3 attempts"),
        ({"background": False, "blocked_s": 0.62}, "1.2 GB in 0.62 s (2.1 GB/s)"),
        ({"write_s": 0.0}, "1.2 GB  blocked 0.006 s, durable after 0.62 s"),
        ({"size_bytes": 28_400, "durable_s": 0.0123}, "28.4 kB in 0.01 s"),
    ],
)
def test_the_line(costs: dict[str, Any], said: str) -> None:
    report = SaveReport("a.ckpt", (), **{**BLOCK, **costs})
    line = save_line(
        ["runs/a.ckpt"], step=18, report=report, monitor=None, score=None, before=View(), after=View(),
        save_top_k=1, deleted=["runs/b.ckpt"],
    )  # fmt: skip
    assert line == f"saved a.ckpt  step 18  {said}  deleted b.ckpt"


def test_times() -> None:
    assert [format_seconds(one) for one in (0, 0.0061, 0.0996, 0.62, 9.5, 12.34)] == [
        "0.000 s", "0.006 s", "0.100 s", "0.62 s", "9.50 s", "12.3 s",
    ]  # fmt: skip


def test_a_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of some megabytes, and all in all where that is asked for."""
    lines: list[str] = []
    monkeypatch.setattr(rank_zero.logger, "info", lines.append)
    fit(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, verbose=True), module=Wider)
    seconds = r"[\d.]+ s"
    told = f"3.4 MB  blocked {seconds}(, before the step {seconds})?, durable after {seconds} \\([\\d.e+-]+ GB/s\\)"
    shown = [line for line in lines if line.startswith("saved")]
    assert len(shown) == 4
    for number, line in enumerate(shown, 1):
        deleted = f"  deleted step={2 * number - 2}.ckpt" if number > 1 else ""
        assert re.fullmatch(f"saved step={2 * number}.ckpt  step {2 * number}  {told}{deleted}", line), line
    assert re.fullmatch(
        f"saves     4, 13.[\\d] MB, [\\d.e+-]+ GB/s, durable after {seconds} on average\n"
        f"training  blocked {seconds}, behind other saves {seconds}, before a step {seconds}"
        f"(, steps slower by {seconds})?\n"
        "files     deleted 3",
        lines[-1],
    ), lines[-1]
