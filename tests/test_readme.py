"""The README and the docs say what is so: the map, the example, the links, the commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found is not None, f"README has no section {title!r}"
    return found[1]


def mapped_files() -> list[str]:
    """Every path that the map of the house names: a line of it is an indented name and what it is for."""
    paths: list[str] = []
    folder = ""
    for line in section("The house").splitlines():
        if found := re.match(r"(\S+/)(?:\s|$)", line):
            folder = found[1]
            if not (ROOT / folder).is_dir():
                folder = ""
        elif folder and (found := re.match(r"  (\S+\.py)\s{2,}\S", line)):
            paths.append(folder + found[1])
    return paths


def test_the_map_has_every_file_and_no_other() -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("src/holdfast", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if not (path.name == "__init__.py" and path.parent != ROOT / "src/holdfast")
    }
    listed = mapped_files()
    assert sorted(there - set(listed)) == [], "files that the map does not name"
    assert sorted(set(listed) - there) == [], "files in the map that do not exist"
    assert len(listed) == len(set(listed)), "a file is in the map twice"


def test_the_map_has_every_suite_of_tests() -> None:
    suites = {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))
    }
    named = set(re.findall(r"^  (\w+)/\s{2,}\S", section("The house"), re.M))
    assert named == suites


def test_the_example_runs(tmp_path: Path) -> None:
    """Exactly as printed, in an empty folder, twice: the second time it goes on where it ended."""
    example = re.search(r"```python\n(.*?)```", section("Twenty lines"), re.S)
    assert example is not None
    (tmp_path / "train.py").write_text(example[1], encoding="utf-8")
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "train.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=dict(os.environ),
        )
        assert ran.returncode == 0, ran.stdout
        assert list(tmp_path.rglob("*.ckpt")) != []
    assert "resum" in ran.stdout.lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """Each ``make`` target and each script that a page names is there."""
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    scripts = set(re.findall(r"python ((?:examples|benchmarks)/\w+\.py)", text))
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
