"""docs/migrating.md leaves nothing out: every argument and name that a Lightning user may look for is in it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import holdfast
from holdfast.callbacks import ModelCheckpoint
from holdfast.training import spellings

PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found is not None, f"docs/migrating.md has no section {title!r}"
    return found[1]


def first_column(title: str) -> set[str]:
    """What stands in backticks in the first cells of a section's table."""
    rows = [line for line in section(title).splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


class TestArguments:
    def test_of_the_trainer(self) -> None:
        own = first_column("Arguments of `Trainer` that are holdfast's own")
        assert first_column("Every argument of `Trainer`") | own == arguments(holdfast.Trainer)

    def test_of_lightnings_trainer(self) -> None:
        lightning = pytest.importorskip("lightning.pytorch")
        assert first_column("Every argument of `Trainer`") == arguments(lightning.Trainer)

    def test_of_model_checkpoint(self) -> None:
        assert first_column("`ModelCheckpoint`") == arguments(ModelCheckpoint)


@pytest.mark.parametrize("room", ["callbacks", "loggers", "profilers"])
def test_every_name_of_lightnings(room: str) -> None:
    import importlib

    theirs = importlib.import_module(f"lightning.pytorch.{room}").__all__
    named = " ".join(first_column("Callbacks, loggers and the rest"))
    # Those that are for TPUs alone, and what everybody derives from.
    missing = [name for name in theirs if name not in named and not name.startswith("XLA")]
    assert [name for name in missing if name not in ("Logger", "Profiler", "PassThroughProfiler")] == []


def test_every_old_spelling_of_the_trainer() -> None:
    listed = section("The spelling of 1.x")
    # The renamed percentages and the like stand for each other.
    assert [
        name for name in spellings._OLD if f"{name}=" not in listed and name != "early_stop_callback"
    ] == []
