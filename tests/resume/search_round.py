"""One round of `search`: examples of some seeds, told on a pipe as they are done."""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import seed as seeded

from .feature_data import Plan
from .feature_plans import SETTINGS, plan_of, plans, told
from .feature_runs import Found, search

ENDS = ("kinds", "hooks", "places", "file", "stops")


def covers(plan: Plan, found: Found) -> list[tuple[str, str]]:
    """The features of an example, how it ended, and what it went on from."""
    pairs = [
        (name, str(value)) for name, value in plan.items() if name not in ("kinds", "hooks", "places", "file")
    ]
    for stop in found.stops:
        kind, _, where = stop.partition(" ")
        pairs += [("ended by", kind), ("ended in", where)] if where else [("ended by", "itself")]
    if found.differences:
        went_on = "differs"
    elif not found.resumed:
        went_on = "from the start"
    else:
        went_on = "exactly" if found.compared else "inexactly"
    return [*pairs, ("went on", went_on)]


def is_known(plan: Plan, known: list[dict[str, Any]]) -> bool:
    """Whether the plan has all the features of one that failed before, wherever it was stopped."""
    mine = told(plan)
    for one in known:
        features = {name: value for name, value in one.items() if name not in ENDS}
        # Which files were kept is seldom the point, unless there is no other one.
        features = {name: value for name, value in features.items() if name != "saves"} or features
        if features and all(mine.get(name) == value for name, value in features.items()):
            return True
    return False


class Round:
    """Examples of some seeds, one after the other.

    Args:
        job: What `search` asks for: the first ``seed``, how many ``seeds``, plans that are ``known`` to fail, how
            many failures are still to be made smaller (``shrinks``), and the ``pipe`` to tell of it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.known: list[dict[str, Any]] = [ast.literal_eval(plan) for plan in job["known"]]
        self.results: dict[str, list[str]] = {}
        self.failing: Plan | None = None
        """The last plan that failed in this seed: when hypothesis is done, the smallest."""

    def tell(self, what: str, **more: Any) -> None:
        os.write(self.job["pipe"], (json.dumps({"what": what, **more}) + "\n").encode())

    def run(self) -> None:
        """Try the examples, and tell of each seed the smallest plan that fails."""
        for number in range(self.job["seed"], self.job["seed"] + self.job["seeds"]):
            self.failing = None
            try:
                seeded(number)(self.settings()(given(plan=plans(long=True))(self.example)))()
            except Exception as error:
                if self.failing is None:
                    raise
                self.fail(number, self.failing, error)
        self.tell("done")

    def settings(self) -> settings:
        phases = [Phase.generate, Phase.shrink] if self.job["shrinks"] > 0 else [Phase.generate]
        return settings(SETTINGS, phases=phases)

    def tried(self, plan: Plan) -> Found:
        self.tell("begins", plan=repr(plan))
        with tempfile.TemporaryDirectory() as root:
            return search(plan, Path(root) / "runs")

    def example(self, plan: Plan) -> None:
        key = repr(plan)
        if key not in self.results:
            found = self.tried(plan)
            again = bool(found.differences) and is_known(plan, self.known)
            if self.failing is None:  # what makes a failure smaller covers nothing
                self.tell("example", again=again, covers=covers(plan, found))
            self.results[key] = [] if again else found.differences
        if self.results[key]:
            self.failing = plan
            raise AssertionError(self.results[key][0])

    def fail(self, number: int, plan: Plan, error: Exception) -> None:
        small = told(plan)
        again = self.tried(plan_of(small)).differences
        note = [] if again else [f"it did not fail a second time; {type(error).__name__}"]
        differences = [*note, *self.results[repr(plan)]]
        self.tell("failure", seed=number, plan=repr(plan), differences=differences)
        self.known.append(small)
        self.results.clear()
        self.job["shrinks"] -= 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Round(json.loads(sys.argv[1])).run()
