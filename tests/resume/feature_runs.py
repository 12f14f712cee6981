"""Trains a plan whole, and stopped and resumed, and says where the two differ."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import holdfast as pl
from holdfast.errors import ConfigError

from .feature_data import Plan
from .feature_outcome import exact_file, outcome, without_files, without_loggers
from .feature_stops import IN_A_CHILD, KINDS, Stopped, Stopper
from .features import make
from .harness import first_difference

LIMIT_S = 120


class Refused(Exception):
    """``exact="require"`` does not go on from a file that is not exact."""


class Hung(Exception):
    """An example did not come to its end."""


@dataclass
class Found:
    """What came of a plan."""

    differences: list[str] = field(default_factory=list)
    """Where the resumed run is not the whole one; none is right."""
    stops: list[str] = field(default_factory=list)
    """How it was stopped, and in which hook where that is known."""
    resumed: list[str] = field(default_factory=list)
    """What each further run went on from, and whether that was exact."""

    @property
    def compared(self) -> bool:
        """Whether the runs could be compared, rather than finished only."""
        return not any(line.endswith("False") for line in self.resumed)


def search(plan: Plan, base: Path) -> Found:
    """Train whole; train stopped as often as the plan says, and on to the end; compare."""
    found = Found()
    try:
        with time_limit(LIMIT_S):
            _search(plan, base, found)
    except Refused:
        pass  # it would go on from what an exception left, which is not exact
    except BaseException as error:  # to be made smaller, like a difference
        if isinstance(error, (GeneratorExit, KeyboardInterrupt)) and not isinstance(error, SystemExit):
            raise
        lines = "".join(traceback.format_exception(error)).strip()
        found.differences.append(f"raised {type(error).__name__}: {error}\n{lines[-1500:]}")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return found


def _search(plan: Plan, base: Path, found: Found) -> None:
    whole, cut = base / "whole", base / "cut"
    whole.mkdir(parents=True), cut.mkdir()
    trainer, uninterrupted = fit(plan, whole)
    expected = outcome(plan, trainer, whole)
    number = _stop(plan, cut, uninterrupted.names, found)
    path = exact_file(plan, cut) if plan["path"] else None
    try:
        trainer, _ = fit(with_workers_of(plan, number), cut, ckpt_path=path or "auto")
    finally:
        if (cut / "resumed.log").exists():
            found.resumed = (cut / "resumed.log").read_text().splitlines()
    if not found.compared:
        # Nothing but what an exception left was there to go on from: that is not exact.
        if not trainer.state.finished:
            found.differences.append("the run did not finish")
        return
    seen = outcome(plan, trainer, cut)
    # What is there only a plugin of one's own knows; a run that starts anew leaves what another one left; and
    # the file that the user named stays.
    weights = any(kind.startswith("weights") for kind in plan["saves"])
    anew = not found.resumed or (weights and len(found.resumed) < number)
    if path is not None or plan["io"] in ("own", "async own") or anew:
        expected, seen = without_files(expected), without_files(seen)
    if path is not None:
        expected, seen = without_loggers(expected), without_loggers(seen)
    wrong = {name: first_difference(value, seen.get(name)) for name, value in expected.items()}
    found.differences += [f"{name}{where}"[:600] for name, where in wrong.items() if where is not None]


def _stop(plan: Plan, root: Path, names: list[str], found: Found) -> int:
    """End the run in a hook, and the one that goes on from it, and so on; returns how many were started."""
    for number in range(plan["stops"]):
        kind, where = plan["kinds"][number], plan["hooks"][number]
        hooks = names.count(where) if where else len(names)
        hooks = max(1, hooks if number == 0 else hooks // 2)
        stop = Stopper(1 + int(plan["places"][number] * hooks), kind, where)
        now = with_workers_of(plan, number)
        ended = (_in_a_child if kind in IN_A_CHILD else _here)(now, root, stop)
        found.stops.append(f"{kind} {stop.ended_in or where or 'anywhere'}" if ended else "none")
        if not ended:
            return number + 1
    return int(plan["stops"])


def with_workers_of(plan: Plan, number: int) -> Plan:
    """The plan of the run that is started at place ``number``: with other workers than the one before it."""
    others = plan["other_workers"]
    if not number or others is None:
        return plan
    return {**plan, "workers": others[(number - 1) % len(others)]}


def fit(
    plan: Plan, root: Path, stop: Stopper | None = None, ckpt_path: Any = "auto"
) -> tuple[pl.Trainer, Stopper]:
    """Start the run's command."""
    stop = stop or Stopper(None, "error")
    pl.seed_everything(7, verbose=False)
    trainer, module, arguments = make(plan, root, stop)
    try:
        trainer.fit(module, ckpt_path=ckpt_path, **arguments)
    except ConfigError as error:
        inexact = ("was not taken at a safe point", "was saved after a limit had ended its epoch early")
        if plan["exact"] == "require" and any(reason in str(error) for reason in inexact):
            raise Refused from error
        raise
    return trainer, stop


def _here(plan: Plan, root: Path, stop: Stopper) -> bool:
    """Train in this process; returns whether it was stopped."""
    late: list[int] = []
    # A signal that comes too late to stop the fit is sent again when that is over.
    before = signal.signal(signal.SIGTERM, lambda number, frame: late.append(number))
    try:
        fit(plan, root, stop)
    except (Stopped, KeyboardInterrupt):
        return True
    except SystemExit as left:
        expected = {"sigint": 130, "sigterm": 143, "sigterm twice": 143}.get(stop.kind)
        if left.code == expected:
            return True
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return stop.kind == "time" and stop.ended_in is not None


def _in_a_child(plan: Plan, root: Path, stop: Stopper) -> bool:
    """Train in a process of its own, which a signal ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads, which the child never meets
        child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            fit(plan, root, stop)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except Refused:
            code = 4
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # the workers that a killed process leaves, which end later
    code = os.waitstatus_to_exitcode(status)
    if code == 4:
        raise Refused
    if stop.kind == "kill":
        assert code in (0, -signal.SIGKILL), f"the run that was to be killed ended with {code}"
    else:
        assert code in (0, 143, -signal.SIGTERM), f"the run that was sent SIGTERM ended with {code}"
    return code != 0


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `Hung` in the main thread when the time is up."""

    def up(number: int, frame: Any) -> None:
        where = "".join(traceback.format_stack(frame)[-4:])
        raise Hung(f"it took more than {seconds} s; it was at\n{where}")

    before = signal.signal(signal.SIGALRM, up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


assert set(IN_A_CHILD) & set(KINDS)
