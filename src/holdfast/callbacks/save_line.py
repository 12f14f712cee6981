"""The one line that a save says."""

from __future__ import annotations

import os
from collections.abc import Sequence

from holdfast.callbacks.checkpoint_view import View
from holdfast.checkpoint.report import SaveReport

_SMALL_BYTES = 1_000_000


def save_line(
    names: Sequence[str],
    *,
    step: int,
    report: SaveReport,
    monitor: str | None,
    score: float | None,
    before: View,
    after: View,
    save_top_k: int,
    deleted: Sequence[str],
    because: str = "",
) -> str:
    """Say what was saved, what it cost, how it ranks, what was deleted for it and which exception made it.

    ``saved epoch=2-step=18.ckpt  step 18  28.4 kB in 0.01 s  val_loss 0.31 -> 0.29 (best; 2 of 3 kept)``
    """
    first, *others = (os.path.basename(name) for name in names)
    parts = [f"saved {first}" + (f" (also {', '.join(others)})" if others else "")]
    parts += [f"step {step}", *_cost(report)]
    if monitor is not None and score is not None:
        parts.append(f"{monitor} {_rank_text(names[0], score, before, after, save_top_k)}")
    if because:
        parts.append(f"on {because}")
    if deleted:
        parts.append(f"deleted {', '.join(os.path.basename(path) for path in deleted)}")
    return "  ".join(parts)


def _cost(report: SaveReport) -> list[str]:
    """The size and the times; of a small file only how long it took to be durable.

    ``1.2 GB  blocked 0.006 s, before the step 0.02 s, durable after 0.62 s (2.1 GB/s)``
    """
    size = format_size(report.size_bytes)
    if report.size_bytes < _SMALL_BYTES:
        return [f"{size} in {report.durable_s:.2f} s"]
    speed = f" ({report.gb_per_s:.2g} GB/s)" if report.gb_per_s else ""
    if report.attempts > 1:
        speed += f", {report.attempts} attempts"
    if not report.background:
        return [f"{size} in {format_seconds(report.durable_s)}{speed}"]
    waited = f", before the step {format_seconds(report.waited_s)}" if report.waited_s >= 0.001 else ""
    blocked, durable = format_seconds(report.blocked_s), format_seconds(report.durable_s)
    return [size, f"blocked {blocked}{waited}, durable after {durable}{speed}"]


def _rank_text(name: str, score: float, before: View, after: View, save_top_k: int) -> str:
    kept = len(after.best_k_models)
    places = f"{kept} of {save_top_k} kept" if save_top_k > 0 else f"{kept} kept"
    if after.best_model_path == name:
        old = before.best_model_score
        rise = "" if old is None else f"{format_number(old.item())} -> "
        return f"{rise}{format_number(score)} (best; {places})"
    best = after.best_model_score
    best_text = "" if best is None else f"best {format_number(best.item())}; "
    if name in after.best_k_models:
        return f"{format_number(score)} ({best_text}{places})"
    return f"{format_number(score)} ({best_text}not among the {save_top_k} kept)"


def format_number(value: float) -> str:
    """Write a number with 4 significant digits."""
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Write a time with milliseconds where it is short: ``0.006 s``, ``0.62 s``, ``12.5 s``."""
    return f"{seconds:.3f} s" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def format_size(size_bytes: int) -> str:
    """Write a size with its unit, in powers of 1000: ``1.2 MB``."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
