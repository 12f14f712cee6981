"""The fuzzer of the reader: the same few hundred files each time, and that it would see what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import fuzz
from .fuzz import Report, examine
from .guard import Guard, guarded
from .mutations import Case, case, originals

SEEDS = range(150)

# Seeds that failed once: a manifest whose omissions are no list.
FAILED_ONCE = [349, 480, 1175]


def test_a_few_hundred_files_do_no_harm(tmp_path: Path) -> None:
    report = Report(None)
    with guarded() as guard:
        for seed in [*SEEDS, *FAILED_ONCE]:
            report.add(seed, *examine(seed, tmp_path, guard))
    assert report.failed == []
    kinds = set(report.counts) - {"files", "opened"}
    assert len(kinds) == 13, kinds
    assert 0.1 < report.counts["opened"] / report.counts["files"] < 0.6


def test_a_seed_is_always_the_same_file(tmp_path: Path) -> None:
    for seed in range(40):
        for name in ("a", "b"):
            case(seed).write(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), seed


def test_a_file_that_does_harm_is_told_with_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a guard that sees a reader die, and with a file that opens though it must not."""

    def good(seed: int) -> Case:
        return Case("bytes of ours", lambda path: path.write_bytes(originals()["ours"]), must_fail=True)

    monkeypatch.setattr(fuzz, "case", good)
    monkeypatch.setattr(Guard, "open", _dying)
    out = tmp_path / "out" / "failed.txt"
    assert fuzz.main(["--minutes", "0", "--seed", "7", "--out", str(out)]) == 1
    assert out.read_text() == "seed 7 (bytes of ours):\n    it ended the process: SIGSEGV\n"
    assert "FAILED seed 7 (bytes of ours):" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(fuzz, "case", good)
    with guarded() as guard:
        assert examine(7, tmp_path, guard)[2] == ["load opened it", "verify opened it"]


def _dying(self: Guard, path: Path, names: list[str] | None = None) -> dict[str, object]:
    return {"died": "SIGSEGV"}
