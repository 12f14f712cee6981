"""What is installed is what the project file promises."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import holdfast

ROOT = Path(__file__).parents[1]


def test_types_are_shipped() -> None:
    assert (Path(holdfast.__file__).with_name("py.typed")).is_file()


def test_a_run_needs_few_packages() -> None:
    """Each thing that everyone has to install is a decision."""
    required = [line for line in metadata.requires("holdfast") or [] if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0] for line in required}  # type: ignore[index]
    assert names == {"torch", "rich", "PyYAML", "isal"}


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M)
    assert phony is not None
    said = set(re.findall(r"@echo 'make ([\w-]+)", makefile))
    assert said == set(phony[1].split()) - {"help"}
