"""Exactness over all features of a trainer that can live together: stopped anywhere, started again, compared.

``HOLDFAST_SEARCH_EXAMPLES`` and ``HOLDFAST_SEARCH_SEED`` look elsewhere and for longer; ``make soak`` for as long
as one likes. A failure shows the smallest plan that still fails: paste it into `feature_failures`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings

from .feature_data import Plan
from .feature_failures import FAILED
from .feature_plans import SETTINGS, plan_of, plans, told
from .feature_runs import search

EXAMPLES = int(os.environ.get("HOLDFAST_SEARCH_EXAMPLES", "40"))
FIRST = int(os.environ.get("HOLDFAST_SEARCH_SEED", "1"))
SEEDS = max(1, EXAMPLES // 8)  # of a seed's ten examples, two or so were there before

pytestmark = pytest.mark.filterwarnings("ignore")
_known: dict[str, list[str]] = {}


def differences(plan: Plan) -> list[str]:
    """Where the resumed run differs; told from memory if the plan was tried before."""
    key = repr(plan)
    if key not in _known:
        with tempfile.TemporaryDirectory() as root:
            _known[key] = search(plan, Path(root) / "runs").differences
    return _known[key]


@pytest.mark.parametrize("number", range(FIRST, FIRST + SEEDS))
def test_a_run_stopped_anywhere_ends_as_if_it_never_was(number: int) -> None:
    @seed(number)
    @settings(SETTINGS)
    @given(plan=plans())
    def example(plan: Plan) -> None:
        found = differences(plan)
        assert not found, "\n  ".join([repr(plan), *found[:4]])

    example()


@pytest.mark.parametrize("told", FAILED, ids=str)
def test_what_once_failed_no_longer_does(told: dict[str, Any]) -> None:
    found = differences(plan_of(told))
    assert not found, "\n  ".join(found[:4])


@settings(SETTINGS, derandomize=True, max_examples=50)
@given(plan=plans(long=True))
def test_a_plan_is_what_it_is_told_to_be(plan: Plan) -> None:
    assert dict(plan_of(told(plan))) == dict(plan)
