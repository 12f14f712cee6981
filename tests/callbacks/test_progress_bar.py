"""What the bars show, and that a step costs them a look at the clock."""

from __future__ import annotations

import copy
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.callbacks import PlainProgressBar, ProgressBar, RichProgressBar
from holdfast.callbacks.progress_bar import default_progress_bar
from holdfast.callbacks.track import Pace, Track, format_duration, format_value
from holdfast.utilities.rank_zero import rank_zero_info


class Run:
    """As much of a trainer as a bar sees, and the hooks in their order."""

    def __init__(self, bar: Any, **attributes: Any) -> None:
        self.bar = bar
        self.state = SimpleNamespace(fn="fit")
        self.current_epoch = 0
        self.max_epochs: int | None = 2
        self.max_steps = -1
        self.global_step = 0
        self.accumulate_grad_batches = 1
        self.batch_idx = 0
        self.num_training_batches: int | float = 4
        self.num_val_batches: list[int | float] = [3]
        self.num_sanity_val_batches: list[int | float] = [2]
        self.num_test_batches: list[int | float] = [2, 3]
        self.num_predict_batches: list[int | float] = [2]
        self.enable_validation = True
        self.sanity_checking = False
        self.is_global_zero = True
        self.progress_bar_metrics: dict[str, Any] = {"loss": 0.123456}
        self.loggers: list[Any] = [SimpleNamespace(version=3)]
        self.__dict__.update(attributes)
        bar.setup(self, None, self.state.fn)

    def batch(self, index: int) -> None:
        self.batch_idx = index
        self.bar.on_train_batch_end(self, None, None, None, index)

    def validate(self) -> None:
        self.bar.on_validation_start(self, None)
        for index in range(3):
            self.bar.on_validation_batch_end(self, None, None, None, index)
        self.bar.on_validation_end(self, None)

    def epoch(self, start: int = 0) -> None:
        if start == 0:
            self.bar.on_train_epoch_start(self, None)
        for index in range(start, 4):
            self.batch(index)
        self.validate()
        self.bar.on_train_epoch_end(self, None)
        self.current_epoch += 1

    def fit(self, start: int = 0) -> None:
        self.sanity_checking = True
        self.validate()
        self.sanity_checking = False
        self.epoch(start)
        self.epoch()
        self.bar.on_train_end(self, None)


def untimed(text: str) -> list[str]:
    text = re.sub(r"\d+\.\d (it/s|s/it)", "RATE", text)
    return re.sub(r"\d+:\d\d", "TIME", text).splitlines()


def test_plain_lines_say_the_start_and_each_epochs_end(capsys: pytest.CaptureFixture[str]) -> None:
    Run(PlainProgressBar()).fit()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert untimed(captured.err) == [
        "Epoch 1/2: 4 batches",
        "Epoch 1/2: 4/4  done in TIME  RATE  loss 0.1235",
        "Epoch 2/2: 4/4  done in TIME  RATE  loss 0.1235",
    ]


def test_plain_lines_inside_an_epoch_are_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(PlainProgressBar(interval_s=0.0), num_training_batches=float("inf"), max_epochs=-1)
    run.bar.on_train_epoch_start(run, None)
    run.batch(0)
    run.batch(1)
    assert untimed(capsys.readouterr().err) == [
        "Epoch 1: ? batches",
        "Epoch 1: 1  loss 0.1235",
        "Epoch 1: 2  RATE  loss 0.1235",
    ]
    run.bar._interval_s = 1000.0
    run.batch(2)
    run.batch(3)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_resumed_epoch_starts_at_its_position(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(PlainProgressBar(interval_s=0.0))
    run.batch(2)
    assert untimed(capsys.readouterr().err) == ["Epoch 1/2: 3/4  loss 0.1235"]


def test_a_step_costs_no_look_at_the_metrics() -> None:
    looked = []

    class Counting(PlainProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            looked.append(trainer.batch_idx)
            return super().get_metrics(trainer, pl_module)

    run = Run(Counting(interval_s=1000.0))
    run.bar.on_train_epoch_start(run, None)
    for index in range(100):
        run.batch(index)
    assert looked == [0]  # the pace is counted from the first batch


def test_test_and_predict_run_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(PlainProgressBar(interval_s=0.0), state=SimpleNamespace(fn="test"))
    run.bar.on_test_start(run, None)
    for loader, count in enumerate((2, 3)):
        for index in range(count):
            run.bar.on_test_batch_end(run, None, None, None, index, loader)
    run.bar.on_test_end(run, None)
    run.bar.on_predict_start(run, None)
    run.bar.on_predict_batch_end(run, None, None, None, 0)
    run.bar.on_predict_end(run, None)
    lines = untimed(capsys.readouterr().err)
    assert lines[0] == "Testing: 1/5"
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "3/5", "4/5", "5/5", "1/2"]


def test_other_ranks_and_a_disabled_bar_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Run(PlainProgressBar(), is_global_zero=False).fit()
    bar = PlainProgressBar()
    bar.disable()
    Run(bar).fit()
    assert bar.is_disabled
    assert capsys.readouterr().err == ""
    bar.enable()
    assert bar.is_enabled


def test_get_metrics_can_be_overridden_and_has_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(PlainProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            items = super().get_metrics(trainer, pl_module)
            assert items.pop("v_num") == 3
            return {**items, "mine": "yes"}

    Run(Mine()).fit()
    assert "loss 0.1235  mine yes" in capsys.readouterr().err


def test_totals_and_descriptions() -> None:
    bar = ProgressBar()
    with pytest.raises(TypeError) as caught:
        _ = bar.trainer
    assert str(caught.value) == "ProgressBar is not attached to a trainer yet: its run has not begun."
    run = Run(bar)
    assert bar.trainer is run  # type: ignore[comparison-overlap]
    assert bar.total_train_batches == 4
    assert bar.total_val_batches == 3
    assert bar.total_val_batches_current_dataloader == 3
    assert bar.has_dataloader_changed(1)
    assert not bar.has_dataloader_changed(1)
    assert bar.total_test_batches_current_dataloader == 3
    bar.reset_dataloader_idx_tracker()
    assert bar.total_test_batches_current_dataloader == 2
    assert bar.total_predict_batches_current_dataloader == 2
    run.max_steps, run.global_step, run.accumulate_grad_batches = 5, 4, 2
    assert bar.total_train_batches == 2
    run.sanity_checking = True
    assert bar.total_val_batches_current_dataloader == 2
    run.enable_validation = False
    assert bar.total_val_batches == 0


def test_pace_leaves_out_the_first_batch_and_pauses() -> None:
    pace = Pace()
    assert pace.rate is None
    assert pace.left_s(10) is None
    pace.note(1, 100.0)
    assert pace.rate is None
    pace.note(3, 101.0)
    assert pace.rate == 2.0
    assert pace.left_s(10) == 3.5
    assert pace.left_s(None) is None
    pace.pause(101.0)
    pace.resume(151.0)
    pace.note(5, 152.0)
    assert pace.rate == 2.0


def test_texts() -> None:
    assert [format_duration(s) for s in (0.4, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
    assert [format_value(v) for v in (0.123456, 3, "x", 1e-9)] == ["0.1235", "3", "x", "1e-09"]
    track = Track("Epoch 1", 10, 0)
    track.at(1, 0.0, {})
    track.at(2, 4.0, {"v_num": 1, "loss": 0.5})
    assert (track.count_text, track.pace_text, track.left_text, track.metrics_text) == (
        "2/10",
        "4.0 s/it",
        "0:32 left",
        "loss 0.5",
    )


class Terminal:
    """A pseudo-terminal in the place of stderr and stdout, and everything that was written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, width: int = 120) -> None:
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()
        self.file = io.TextIOWrapper(os.fdopen(follower, "wb", 0), write_through=True)
        monkeypatch.setattr(sys, "stderr", self.file)
        monkeypatch.setattr(sys, "stdout", self.file)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self._leader, 65536)
            except OSError:
                return
            if not data:
                return
            self._read.append(data)

    def close(self) -> str:
        self.file.close()
        self._thread.join(timeout=10)
        os.close(self._leader)
        return b"".join(self._read).decode()


def screen_lines(written: str) -> list[str]:
    """What a terminal shows in the end: lines, cursor up and erase, which is all that rich uses here."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            number = re.sub(r"\D", "", part)
            if part.endswith("A"):
                row -= int(number or 1)
            elif part.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_the_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    bar = default_progress_bar()
    assert isinstance(bar, RichProgressBar)
    bar._interval_s = 0.0
    run = Run(bar)
    run.bar.on_train_epoch_start(run, None)
    for index in range(4):
        run.batch(index)
        if index == 1:
            rank_zero_info("saved epoch=0-step=2.ckpt")
            bar.print("printed")
    run.validate()
    run.bar.on_train_epoch_end(run, None)
    run.bar.on_train_end(run, None)
    assert sys.stderr is terminal.file
    written = terminal.close()
    assert "Validation" in written
    lines = screen_lines(written)
    assert lines[:2] == ["saved epoch=0-step=2.ckpt", "printed"]
    (line,) = untimed(lines[2])
    assert len(lines) == 3
    assert re.fullmatch(r"Epoch 1/2 ━+ 4/4 RATE +loss 0.1235", line)
    assert written.endswith("\x1b[?25h")


@pytest.mark.parametrize("end", ["on_exception", "teardown"])
def test_the_terminal_is_given_back_however_the_run_ends(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    terminal = Terminal(monkeypatch)
    bar = RichProgressBar()
    run = Run(bar)
    run.bar.on_train_epoch_start(run, None)
    getattr(bar, end)(run, None, KeyboardInterrupt())
    assert sys.stdout is terminal.file
    assert terminal.close().endswith("\x1b[?25h")


def test_what_goes_to_a_file_still_arrives_there(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    run = Run(RichProgressBar())
    run.bar.on_train_epoch_start(run, None)
    rank_zero_info("saved")
    run.bar.on_train_end(run, None)
    assert log.getvalue() == "saved\n"
    assert "Epoch 1/2" in terminal.close()


def test_without_a_terminal_the_default_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(default_progress_bar(), PlainProgressBar)


def test_rich_without_a_terminal_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RichProgressBar(leave=True)
    Run(bar).fit()
    assert "Epoch 2/2" in capsys.readouterr().err


def test_refresh_rate_zero_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RichProgressBar(refresh_rate=0)
    bar.enable()
    assert bar.is_disabled
    assert bar.refresh_rate == 0
    Run(bar).fit()
    assert capsys.readouterr().err == ""


def test_a_live_bar_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(RichProgressBar())
    run.bar.on_train_epoch_start(run, None)
    run.bar._trainer = None
    twin = copy.deepcopy(run.bar)
    Run(twin).fit()
    run.bar.shut()
    assert "Epoch 2/2" in capsys.readouterr().err
