"""What `ModelCheckpoint` shows of its files, as one value: the present one, and the one after a save."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoint.retention import Found, Ranked, best_first, best_k, rebuild

_NEW = ""


@dataclass(frozen=True)
class View:
    """The published attributes of `ModelCheckpoint`; ``best_k_models`` is in the order of saving."""

    best_k_models: dict[str, Tensor] = field(default_factory=dict)
    kth_best_model_path: str = ""
    kth_value: Tensor = field(default_factory=lambda: torch.tensor(math.inf))
    best_model_path: str = ""
    best_model_score: Tensor | None = None
    current_score: Tensor | None = None
    last_model_path: str = ""

    @staticmethod
    def from_state(state: Mapping[str, Any], default: View) -> View:
        """Read the view that a checkpoint holds; what it lacks is as in ``default``."""
        models = {str(path): as_scalar(score) for path, score in (state.get("best_k_models") or {}).items()}
        kth_value, best, current = (
            state.get(key) for key in ("kth_value", "best_model_score", "current_score")
        )
        return View(
            best_k_models=models,
            kth_best_model_path=state.get("kth_best_model_path") or "",
            kth_value=default.kth_value if kth_value is None else as_scalar(kth_value),
            best_model_path=state.get("best_model_path") or "",
            best_model_score=None if best is None else as_scalar(best),
            current_score=None if current is None else as_scalar(current),
            last_model_path=state.get("last_model_path") or "",
        )

    def paths(self) -> set[str]:
        """Name every file that the view refers to."""
        return {*self.best_k_models, self.best_model_path, self.last_model_path} - {""}

    def ranked(self) -> list[Ranked]:
        """List the best as paths with plain scores, oldest first."""
        return [Ranked(path, score.item()) for path, score in self.best_k_models.items()]

    def with_models(self, models: dict[str, Tensor], k: int, mode: str) -> View:
        """Return the view with these models as the best, and all that follows from it."""
        order = best_first([Ranked(path, score.item()) for path, score in models.items()], mode)
        full = bool(order) and (k == -1 or len(order) >= k)
        return replace(
            self,
            best_k_models=models,
            kth_best_model_path=order[-1].path if full else "",
            kth_value=models[order[-1].path] if full else torch.tensor(worst_score(mode)),
            best_model_path=order[0].path if order else "",
            best_model_score=models[order[0].path] if order else None,
        )

    def relocated(
        self,
        found: Mapping[str, Found],
        *,
        directory: str,
        moved_from: str,
        run: str,
        step: int,
        k: int,
        mode: str,
        complete: bool,
        written_since: Collection[str] = (),
    ) -> View:
        """Return the view with every path where its file is now, for a run that goes on at ``step``.

        Args:
            found: The whole checkpoints that there are, by path.
            directory: The checkpoint directory of the run as it goes on.
            moved_from: The one that it had when the view was written.
            run: The id of the run.
            step: The step that it goes on from; a file of a later one is not the one that is remembered.
            k: How many of the best there can be; 0 when nothing is ranked.
            mode: "min" or "max": which end is better.
            complete: Whether this view came from a checkpoint, so that with every file in its place it
                needs no rebuilding.
            written_since: Files of no later step, which were written after the view was all the same.
        """

        def where(path: str, score: float | None = None) -> str:
            inside = os.path.relpath(path, moved_from) if path else os.pardir
            places = [path] if inside.startswith(os.pardir) else [os.path.join(directory, inside), path]
            for place in places:
                one = found.get(place)
                if one is None or one.step > step:
                    continue
                if score is None or one.score is None or _equal(one.score, score):
                    return place
            return ""

        def copied(path: str) -> bool:
            # Where a directory was copied and the original is still there, a file counts once.
            inside = os.path.relpath(path, moved_from)
            here = path if inside.startswith(os.pardir) else os.path.join(directory, inside)
            return here != path and here in found

        # ``last`` may be newer than the resumed step; it still is the name that the next save takes over.
        last = os.path.join(directory, os.path.basename(self.last_model_path)) if self.last_model_path else ""
        moved = replace(self, last_model_path=last if last in found else where(self.last_model_path))
        if k == 0:
            return replace(moved, best_model_path=where(self.best_model_path))
        places = {path: where(path, score.item()) for path, score in self.best_k_models.items()}
        alive = {place: self.best_k_models[path] for path, place in places.items() if place}
        if not complete or len(alive) < len(places):
            remembered = [Ranked(path, score.item()) for path, score in alive.items()]
            others = [one for path, one in found.items() if path not in written_since and not copied(path)]
            stay = rebuild(remembered, others, run=run, step=step, k=k, mode=mode)
            alive = {one.path: alive.get(one.path, as_scalar(one.score)) for one in stay}
        return moved.with_models(alive, k, mode)


@dataclass(frozen=True)
class Ranking:
    """Whether a new save stays beside ``last``, and which files go for it."""

    before: View
    entered: bool
    evict: tuple[str, ...]
    kept: tuple[str, ...]
    k: int
    monitored: bool

    def after(self, path: str | None, score: Tensor | None, mode: str) -> View:
        """Return the view with the new save at ``path``; None when it did not enter."""
        if path is None:
            return self.before
        if not self.monitored:
            return replace(self.before, best_model_path=path)
        assert score is not None
        models = {one: self.before.best_k_models[one] for one in self.kept if one != path}
        models[path] = score
        return replace(self.before.with_models(models, self.k, mode), current_score=score)


def rank(before: View, score: Tensor | None, *, monitor: str | None, k: int, mode: str) -> Ranking:
    """Decide whether a save with this score stays: by rank with a monitor, as the newest without."""
    if monitor is None:
        replaced = (before.best_model_path,) if k == 1 and before.best_model_path else ()
        return Ranking(before, k != 0, replaced, (), k, False)
    if score is None or k == 0:
        return Ranking(before, False, (), tuple(before.best_k_models), k, True)
    decision = best_k(before.ranked(), Ranked(_NEW, score.item()), k, mode)
    kept = tuple(one.path for one in decision.keep if one.path != _NEW)
    evict = tuple(one.path for one in decision.evict) if decision.entered else ()
    return Ranking(before, decision.entered, evict, kept, k, True)


def worst_score(mode: str) -> float:
    """Return the score that everything is better than."""
    return math.inf if mode == "min" else -math.inf


def as_scalar(value: Any) -> Tensor:
    """Return a 0-dim tensor on the CPU that shares nothing with ``value`` and equals it exactly."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone().reshape(())
    scalar = torch.tensor(value)
    if scalar.is_floating_point() and not _equal(scalar.item(), float(value)):
        scalar = torch.tensor(value, dtype=torch.float64)
    return scalar


def _equal(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
