"""The house has floors and imports point down; ``import holdfast`` is light. Both are kept here."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).parents[1] / "src"

# From the ground up. A module imports from its own room and from the floors below, not from a room beside it.
FLOORS: list[set[str]] = [
    {"errors"},
    {"utilities"},
    {"accelerators", "checkpoint"},
    {"callbacks", "loggers", "profilers", "strategies"},
    {"training"},
    {"", "checkpointer", "core", "plugins", "testing", "trainer", "tuner"},
    {"cli"},
    {"__main__"},
]

# Files over 450 lines, each with the reason why it is one idea.
LONG_FILES: dict[str, str] = {}

# What a tool that only looks at files must be able to use without waiting for torch.
WITHOUT_TORCH = [
    "holdfast",
    "holdfast.errors",
    "holdfast.checkpoint.catalog",
    "holdfast.checkpoint.commit",
    "holdfast.checkpoint.integrity",
    "holdfast.checkpoint.choice",
    "holdfast.checkpoint.retention",
    "holdfast.checkpoint.verify",
    "holdfast.cli",
]


class Import(NamedTuple):
    target: str
    line: int
    deferred: bool  # inside a function: no cycle at import time, but still a dependency


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((SRC / "holdfast").rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor_of(module: str) -> int:
    for height, rooms in enumerate(FLOORS):
        if room_of(module) in rooms:
            return height
    raise AssertionError(f"{module} is in no room of the house: give it a floor in {Path(__file__).name}")


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(body: list[ast.stmt], deferred: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement that can run, however deep, and whether it only runs when a function is called."""
    for node in body:
        if isinstance(node, ast.If) and is_type_checking(node.test):
            yield from statements(node.orelse, deferred)
            continue
        yield node, deferred
        inside = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), inside)
        for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from statements(part.body, inside)


def imports_of(module: str, path: Path, known: set[str]) -> list[Import]:
    """What ``module`` imports from the package at run time, each resolved to a module."""
    found = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, deferred in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, deferred) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append(Import(inner if inner in known else base, node.lineno, deferred))
    return found


def own_imports(module: str) -> list[Import]:
    found = imports_of(module, MODULES[module], set(MODULES))
    return [item for item in found if item.target.split(".")[0] == "holdfast"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    wrong = []
    for item in own_imports(module):
        same_room = room_of(item.target) == room_of(module)
        if not same_room and floor_of(item.target) >= floor_of(module):
            wrong.append(f"{MODULES[module]}:{item.line} imports {item.target}")
    assert wrong == [], "imports point down only:\n" + "\n".join(wrong)


def test_no_cycles_at_import_time() -> None:
    graph = {
        module: sorted({i.target for i in own_imports(module) if not i.deferred and i.target in MODULES})
        for module in MODULES
    }
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph[module]:
                visit(target, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert done == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_idea(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    relative = str(MODULES[module].relative_to(SRC))
    if relative in LONG_FILES:
        assert lines > 450, f"{relative} has {lines} lines: take it out of LONG_FILES"
    else:
        assert lines <= 450, f"{relative} has {lines} lines: two ideas, or a reason for LONG_FILES?"


def loaded_by(module: str) -> set[str]:
    """The modules in ``sys.modules`` after importing ``module`` in a fresh interpreter."""
    code = f"import json, sys; import {module}; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout))


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_is_there_without_torch(module: str) -> None:
    loaded = loaded_by(module)
    assert module in loaded
    assert loaded.isdisjoint({"torch", "numpy", "rich"})


@pytest.mark.parametrize("room", ["checkpoint", "callbacks", "loggers", "strategies", "utilities"])
def test_a_room_loads_nothing_from_above(room: str) -> None:
    """What the parser cannot see (names put together at run time) shows in a fresh interpreter."""
    modules = [module for module in MODULES if room_of(module) == room]
    if not modules:
        pytest.skip(f"holdfast.{room} does not exist yet")
    ours = {name for name in loaded_by(", ".join(modules)) if name.startswith("holdfast.")}
    above = {name for name in ours if floor_of(name) > floor_of(modules[0])}
    assert set(modules) <= ours
    assert above == set()


def test_the_parser_sees_every_kind_of_import(tmp_path: Path) -> None:
    """Relative, deferred and nested imports count; ``if TYPE_CHECKING:`` does not, its else does."""
    source = """
import holdfast.errors
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import holdfast.training
else:
    from .sibling import a
try:
    from .. import errors
except ImportError:
    from ..utilities import b
def f():
    with open("x"):
        from holdfast.checkpoint import catalog
class C:
    import holdfast.cli
"""
    path = tmp_path / "module.py"
    path.write_text(source)
    known = {"holdfast.errors", "holdfast.checkpoint.catalog", "holdfast.callbacks.sibling"}
    found = imports_of("holdfast.callbacks.module", path, known)
    assert [(i.target, i.deferred) for i in found if i.target.startswith("holdfast")] == [
        ("holdfast.errors", False),
        ("holdfast.callbacks.sibling", False),
        ("holdfast.errors", False),
        ("holdfast.utilities", False),
        ("holdfast.checkpoint.catalog", True),
        ("holdfast.cli", False),
    ]
