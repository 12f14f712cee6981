"""TQDMProgressBar: what its bars count, what is overridden, and what the terminal shows in the end."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tqdm

from holdfast.callbacks import ModelCheckpoint
from holdfast.callbacks.lines_above import LinesAbove
from holdfast.callbacks.progress.tqdm_progress import Tqdm
from holdfast.callbacks.tqdm_progress_bar import TQDMProgressBar
from holdfast.errors import ConfigError
from tests.callbacks.test_progress_bar import Terminal, screen_lines, untimed
from tests.training.toys import Toy, rows, trainer


class Logging(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("id", float(batch[1][0]), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def fit(
    bar: Any, module: Any = None, *, more: Any = (), ckpt_path: Path | None = None, **arguments: Any
) -> None:
    run = trainer(callbacks=[bar, *more], enable_progress_bar=None, **arguments)
    run.fit(module or Logging(), rows(12, 1), rows(4, 1), ckpt_path=ckpt_path)


def test_what_stands_in_a_log_file_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    fit(TQDMProgressBar(), enable_checkpointing=False)
    (line,) = untimed(capsys.readouterr().out.split("\r")[-1])
    assert re.fullmatch(r"Epoch 0: 100%\|[#█]+\| 12/12 \[TIME<TIME, [\d.]+it/s, id=11.00\]", line)


def test_get_metrics_and_init_methods_are_for_overriding(capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    class Mine(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            return {"mine": f"{self.trainer.batch_idx}"}

        def init_train_tqdm(self) -> Any:
            made.append(tqdm.tqdm(total=self.trainer.num_training_batches, file=sys.stdout, ascii=" >"))
            return made[-1]

        def init_validation_tqdm(self) -> Any:
            return tqdm.tqdm(disable=True)

    fit(Mine(), enable_checkpointing=False)
    assert (made[0].n, made[0].total) == (12, 12)
    out = capsys.readouterr().out
    assert "Validation" not in out
    assert out.rstrip().endswith("mine=11]")
    assert ">>>| 12/12" in out


def test_metrics_are_looked_at_when_the_bar_is_drawn_and_not_at_each_batch() -> None:
    looked = []

    class Counting(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            bar.mininterval = 1000.0
            return bar

        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            looked.append((trainer.batch_idx, self.train_progress_bar.n))
            return {}

    fit(Counting(), enable_checkpointing=False, limit_val_batches=0)
    assert looked == [(0, 1), (11, 12), (11, 12)]


def test_a_resumed_epoch_goes_on_counting(tmp_path: Path) -> None:
    def saves() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=5, save_top_k=-1)

    fit(TQDMProgressBar(), more=[saves()])
    seen = []

    class Watched(TQDMProgressBar):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            bar = self.train_progress_bar
            seen.append((bar.n, bar.total, bar.initial, bar.desc))

    fit(Watched(), more=[saves()], ckpt_path=tmp_path / "epoch=0-step=5.ckpt")
    assert seen[0] == (6, 12, 5, "Epoch 0: ")
    assert seen[-1] == (12, 12, 5, "Epoch 0: ")
    assert len(seen) == 7


def test_the_end_of_data_without_a_length_is_counted() -> None:
    bar = TQDMProgressBar(refresh_rate=5)
    run = trainer(callbacks=[bar], enable_progress_bar=None, enable_checkpointing=False)
    run.fit(Logging(), (row for row in rows(12, 1)))  # type: ignore[arg-type]
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (12, None)


def test_max_steps_ends_the_bar_where_it_ends_the_run() -> None:
    bar = TQDMProgressBar()
    fit(bar, enable_checkpointing=False, max_epochs=-1, max_steps=4, accumulate_grad_batches=2)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (8, 8)


def test_before_anything_has_begun() -> None:
    bar = TQDMProgressBar(refresh_rate=2, process_position=1)
    assert (bar.refresh_rate, bar.process_position, bar.is_enabled) == (2, 1, True)
    with pytest.raises(TypeError) as caught:
        _ = bar.val_progress_bar
    assert str(caught.value) == (
        "TQDMProgressBar.val_progress_bar is not there yet: nothing that it would show has begun."
    )


def test_refresh_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar(refresh_rate=0)
    bar.enable()
    assert bar.is_disabled
    fit(bar, enable_checkpointing=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Epoch" not in captured.err
    monkeypatch.setenv("TQDM_MINITERS", "7")
    assert [TQDMProgressBar(refresh_rate=rate).refresh_rate for rate in (0, 1, 9)] == [0, 7, 7]


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ConfigError) as caught:
        TQDMProgressBar()
    assert str(caught.value) == (
        "TQDMProgressBar draws with tqdm, which is not installed: pip install tqdm, or use RichProgressBar."
    )


def test_numbers_keep_their_width() -> None:
    numbers = [0.3, 1.0, 12.0, -0.5, 123456, 0.00014, 1e-9, 12345.678, float("nan")]
    assert [Tqdm.format_num(number) for number in numbers] == [
        "0.300", "1.000", "12.00", "-0.50", "123456", "0.00014", "1e-9", "1.23e+4", "nan",
    ]  # fmt: skip


def test_a_copy_of_a_live_bar_begins_without_bars() -> None:
    copies = []

    class Copied(Logging):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            live = self.trainer.progress_bar_callback
            assert isinstance(live, TQDMProgressBar)
            held, live._trainer = live._trainer, None
            copies.append(copy.deepcopy(live))
            live._trainer = held

    fit(TQDMProgressBar(refresh_rate=4), Copied(), enable_checkpointing=False)
    assert copies[0].refresh_rate == 4
    with pytest.raises(TypeError):
        _ = copies[0].train_progress_bar
    fit(copies[0], enable_checkpointing=False)
    assert copies[0].train_progress_bar.n == 12


class Talking(Logging):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            print("from print")
            self.print("from", "self.print", sep=" ")
            sys.stderr.write("in two ")
            sys.stderr.write("parts\n")
            print()
            for _ in tqdm.tqdm(range(3), desc="inner", leave=True, ascii=True):
                pass
            print("no end of line", end="")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and not self.trainer.sanity_checking:
            print("in validation")


def test_lines_go_above_the_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    fit(TQDMProgressBar(), Talking(), enable_checkpointing=False)
    assert sys.stdout is sys.stderr is terminal.file
    lines = [line.split("|")[0] for line in screen_lines(terminal.close())]
    assert lines == [
        "from print",
        "from self.print",
        "in two parts",
        "inner: 100%",
        "no end of linein validation",
        "Epoch 0: 100%",
    ]


def test_the_streams_are_back_even_if_the_terminal_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    lines = LinesAbove(contextlib.nullcontext, lambda: False)
    lines.start()
    print("no end of line", end="")
    with monkeypatch.context() as gone:
        gone.setattr(terminal.file, "write", None)
        with pytest.raises(TypeError):
            lines.stop()
    assert sys.stdout is sys.stderr is terminal.file
    terminal.close()


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_the_terminal_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    class Failing(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3 and stage == "train":
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if stage == "validate" and not self.trainer.sanity_checking:
                raise RuntimeError("out of memory")

    terminal = Terminal(monkeypatch)
    bar = TQDMProgressBar()
    with pytest.raises(RuntimeError, match="^out of memory$"):
        fit(bar, Failing(), enable_checkpointing=False)
    assert sys.stdout is sys.stderr is terminal.file
    assert bar.train_progress_bar.disable
    written = terminal.close()
    (line,) = screen_lines(written)
    assert line.startswith("Epoch 0:")
    assert written.endswith("\n")
