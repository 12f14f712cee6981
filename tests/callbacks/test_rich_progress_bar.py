"""RichProgressBar: its tasks as callbacks see them, its theme, and other columns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rich.progress import TextColumn

import holdfast as pl
from holdfast.callbacks import RichProgressBar
from holdfast.callbacks.progress.rich_progress import RichProgressBarTheme
from tests.callbacks.test_progress_bar import Terminal, screen_lines
from tests.training.toys import Toy, rows, trainer


class Logging(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("id", float(batch[1][0]) / 3, prog_bar=True)
        self.log("count", torch.tensor(batch_idx), prog_bar=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    test_step = predict_step = validation_step


def run_all(bar: RichProgressBar, *others: Any, **arguments: Any) -> None:
    run = trainer(
        callbacks=[bar, *others], **{"enable_progress_bar": None, "enable_checkpointing": False, **arguments}
    )
    run.fit(Logging(), rows(5, 1), [rows(3, 1), rows(2, 1)])
    if others:
        run.validate(run.model, rows(3, 1))
        run.test(run.model, rows(2, 1))
        run.predict(run.model, rows(4, 1))


class Watch(pl.Callback):
    """Reads the bar's tasks at hooks, as real code does."""

    def __init__(self, bar: RichProgressBar) -> None:
        self.bar = bar
        self.seen: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.note("epoch", self.bar.train_progress_bar)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.note("train", self.bar.train_progress_bar)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        task = self.bar.val_sanity_check_bar if trainer.sanity_checking else self.bar.val_progress_bar
        self.note("sanity" if trainer.sanity_checking else "validate", task)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.note("test", self.bar.test_progress_bar)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.note("predict", self.bar.predict_progress_bar)

    def note(self, what: str, task: Any) -> None:
        progress = self.bar.progress
        assert progress is not None
        assert task in progress.tasks
        self.seen.append((what, task.completed, task.total))


def test_tasks_are_where_the_run_is_at_every_hook() -> None:
    bar = RichProgressBar()
    watch = Watch(bar)
    run_all(bar, watch)
    of = {what: [seen[1:] for seen in watch.seen if seen[0] == what] for what, *_ in watch.seen}
    assert of == {
        "sanity": [(done, 4) for done in range(1, 5)],
        "epoch": [(0, 5)],
        "train": [(done, 5) for done in range(1, 6)],
        "validate": [*((done, 5) for done in range(1, 6)), *((done, 3) for done in range(1, 4))],
        "test": [(1, 2), (2, 2)],
        "predict": [(done, 4) for done in range(1, 5)],
    }
    assert bar.progress is None
    assert bar.train_progress_bar_id is None


def test_before_anything_has_begun() -> None:
    bar = RichProgressBar()
    ids = "train", "val", "val_sanity", "test", "predict"
    assert [getattr(bar, f"{name}_progress_bar_id") for name in ids] == [None] * 5
    bar.refresh()
    with pytest.raises(TypeError) as caught:
        _ = bar.val_progress_bar
    assert str(caught.value) == (
        "RichProgressBar has no bar for 'validate' yet: nothing that it would show has begun."
    )


def test_training_stands_where_it_is_while_validation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    bar = RichProgressBar()
    shown = []

    class Middle(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if not trainer.sanity_checking:
                shown.append(bar.train_progress_bar.fields["count"])

    run = trainer(callbacks=[Middle(), bar], enable_progress_bar=None, enable_checkpointing=False)
    run.fit(Logging(), rows(5, 1), rows(1, 1))
    terminal.close()
    assert shown == ["5/5"]


def test_the_theme_is_what_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    theme = RichProgressBarTheme(
        description="#010203",
        progress_bar_finished="#040506",
        batch_progress="#070809",
        metrics="#0a0b0c",
        metrics_text_delimiter=" | ",
        metrics_format=".1f",
    )
    terminal = Terminal(monkeypatch)
    run_all(RichProgressBar(theme=theme))
    written = terminal.close()
    for text, colour in (
        ("Epoch 1/1", "1;2;3"),
        ("━", "4;5;6"),
        ("5/5", "7;8;9"),
        ("id 1.3 | count 4", "10;11;12"),
    ):
        assert re.search(rf"\x1b\[38;2;{colour}m{re.escape(text)}", written), text


@pytest.mark.parametrize("width", [40, 60, 120])
def test_in_a_narrow_terminal_what_counts_is_still_there(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = Terminal(monkeypatch, width)
    run_all(RichProgressBar())
    (line,) = screen_lines(terminal.close())
    assert re.match(r"Epoch 1/1 ━+ 5/5", line)
    assert len(line) <= width
    if width != 60:  # there it depends on how many digits the speed has
        assert ("id 1.333  count 4" in line) == (width == 120)


def test_other_columns(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            first, *_ = super().configure_columns(trainer)
            return [first, TextColumn(f"{{task.completed:.0f}} of {{task.total}} for {trainer.max_epochs}")]

    run_all(Mine())
    assert "Epoch 1/1 5 of 5 for 1" in capsys.readouterr().err


def test_console_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RichProgressBar(refresh_rate=10, leave=True, console_kwargs={"stderr": False})
    assert (bar.refresh_rate, bar.is_enabled, bar.theme) == (10, True, RichProgressBarTheme())
    run_all(bar, max_epochs=2)
    captured = capsys.readouterr()
    assert [line.split(" ")[1] for line in captured.out.splitlines() if line] == ["1/2", "2/2"]
    assert "Epoch" not in captured.err
    assert RichProgressBar(refresh_rate=0).is_disabled
