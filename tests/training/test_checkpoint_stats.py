"""What saving cost is counted, compared and shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint.report import SaveReport
from holdfast.loggers import CSVLogger
from holdfast.training.checkpoint_stats import CheckpointStats
from holdfast.training.progress import Progress
from tests.training.saved_in_background import Before, every_step, fit, gate


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


class Run:
    """Steps of known lengths, beside saves and between them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stats = CheckpointStats()
        self.progress = Progress()
        self.in_flight: list[object] = []
        self.stats.steps_begin(self.progress, writing=False)

    def steps(self, count: int, each_s: float) -> None:
        self.progress.total_batches += count
        self.clock.now_s += count * each_s

    def save(self) -> None:
        with self.stats.aside(self.progress, self.in_flight):
            self.clock.now_s += 0.5
            self.in_flight.append(object())

    def settle(self, **costs: Any) -> None:
        with self.stats.aside(self.progress, self.in_flight):
            self.in_flight.clear()
            self.stats.add(report(**costs))
            self.clock.now_s += 0.25

    def validate(self, seconds: float) -> None:
        with self.stats.aside(self.progress, self.in_flight):
            self.clock.now_s += seconds


def report(**costs: Any) -> SaveReport:
    return SaveReport(
        "a.ckpt",
        (),
        **{"size_bytes": 2_000_000_000, "blocked_s": 0.5, "durable_s": 1.5, "background": True, **costs},
    )


class TestSlowdown:
    def test_is_what_steps_beside_a_save_take_more_than_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(Clock(monkeypatch))
        run.steps(10, 1.0)
        run.save()
        run.steps(4, 1.2)
        run.settle()
        run.steps(10, 1.0)
        assert run.stats.slowdown_s is not None
        run.save()
        run.steps(2, 1.1)
        run.settle()
        assert run.stats.slowdown_s == pytest.approx(4 * 0.2 + 2 * 0.1)

    def test_has_no_part_in_what_steps_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(Clock(monkeypatch))
        run.steps(10, 1.0)
        run.save()
        run.clock.now_s += 0.3
        run.steps(4, 1.2)
        run.settle(waited_s=0.3)
        assert run.stats.slowdown_s == pytest.approx(4 * 0.2)
        assert run.stats.waited_s == 0.3

    def test_knows_validation_and_the_end_of_an_epoch_from_steps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Run(Clock(monkeypatch))
        run.steps(4, 1.0)
        run.validate(50.0)
        run.save()
        run.validate(50.0)
        run.steps(4, 1.25)
        run.stats.steps_end(run.progress)
        run.clock.now_s += 70.0
        run.settle()
        run.stats.steps_begin(run.progress, writing=False)
        run.steps(4, 1.0)
        run.stats.steps_end(run.progress)
        assert run.stats.slowdown_s == pytest.approx(4 * 0.25)

    def test_is_unknown_where_there_is_nothing_to_compare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(Clock(monkeypatch))
        run.steps(2, 1.0)
        run.save()
        run.steps(2, 3.0)
        run.settle()
        assert run.stats.slowdown_s is None

    def test_is_none_where_they_are_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(Clock(monkeypatch))
        run.steps(4, 1.0)
        run.save()
        run.steps(4, 0.9)
        run.settle()
        assert run.stats.slowdown_s == 0.0


def test_the_sums_and_the_last_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = CheckpointStats()
    for number in range(120):
        stats.add(report(size_bytes=1_000_000 + number, queued_s=0.1, waited_s=0.01, write_s=0.002))
    assert (stats.saves, stats.size_bytes) == (120, 120_000_000 + sum(range(120)))
    assert stats.blocked_s == pytest.approx(120 * 0.4)
    assert stats.queued_s == pytest.approx(12.0)
    assert (stats.waited_s, stats.durable_s) == (pytest.approx(1.2), pytest.approx(180.0))
    assert stats.gb_per_s == pytest.approx(stats.size_bytes / 0.24 / 1e9)
    assert [one.size_bytes for one in stats.reports] == [1_000_020 + number for number in range(100)]


def test_it_is_a_table_of_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch))
    assert str(run.stats) == "nothing was saved"
    for _ in range(3):
        run.steps(10, 1.0)
        run.save()
        run.steps(4, 1.1)
        run.settle(blocked_s=0.006, waited_s=0.02, write_s=1.0)
    run.stats.deleted, run.stats.failed, run.stats.discarded = 2, 1, 0
    assert str(run.stats).splitlines() == [
        "saves     3, 6.0 GB, 2 GB/s, durable after 1.50 s on average",
        "training  blocked 0.018 s, behind other saves 0.000 s, before a step 0.060 s, steps slower by 1.14 s",
        "files     deleted 2, failed 1",
    ]


def test_of_a_run(tmp_path: Path) -> None:
    """A save that the next one has to wait for is seen in the sums."""
    with gate() as held:
        run = fit(
            ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2),
            Before(3, lambda trainer: held.open()),
            max_epochs=2,
        )
    stats = run.checkpoint_stats
    assert (stats.saves, stats.deleted, stats.failed, stats.discarded) == (8, 7, 0, 0)
    assert stats.size_bytes == sum(one.size_bytes for one in stats.reports)
    assert [Path(one.path).name for one in stats.reports] == [f"step={step}.ckpt" for step in range(2, 17, 2)]
    assert all(one.background for one in stats.reports)
    assert all(one.blocked_s > 0 and one.durable_s > one.write_s > 0 for one in stats.reports)
    assert stats.queued_s > 0
    again = fit(every_step(tmp_path / "other"), limit_train_batches=2)
    assert again.checkpoint_stats.saves == 2


def test_the_loggers_get_it_where_that_is_wanted(tmp_path: Path) -> None:
    """At the step that was saved, and not in a run that does not ask for it."""
    rows = {}
    for wanted in (True, False):
        logger = CSVLogger(tmp_path / str(wanted))
        fit(every_step(tmp_path / "a", log_cost=wanted), logger=logger, log_every_n_steps=1)
        header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        names = header.split(",")
        rows[wanted] = [dict(zip(names, line.split(","), strict=True)) for line in lines]
    costs = [row for row in rows[True] if row["checkpoint/size_bytes"]]
    assert [int(row["step"]) for row in costs] == list(range(8))
    assert all(float(row["checkpoint/durable_s"]) > 0 and not row["loss"] for row in costs)
    named = {name for row in rows[True] for name in row if name.startswith("checkpoint/")}
    assert named == {
        f"checkpoint/{name}" for name in ("blocked_s", "waited_s", "durable_s", "size_bytes", "gb_per_s")
    }
    assert not any("checkpoint" in name for row in rows[False] for name in row)
