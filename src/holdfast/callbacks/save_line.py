"""The one line that a save says."""

from __future__ import annotations

import os
from collections.abc import Sequence

from holdfast.callbacks.checkpoint_view import View


def save_line(
    names: Sequence[str],
    *,
    step: int,
    size_bytes: int,
    seconds: float,
    monitor: str | None,
    score: float | None,
    before: View,
    after: View,
    save_top_k: int,
    deleted: Sequence[str],
    because: str = "",
) -> str:
    """Say what was saved, what it cost, how it ranks, what was deleted for it and which exception made it.

    ``saved epoch=2-step=18.ckpt  step 18  1.2 MB in 0.01 s  val_loss 0.31 -> 0.29 (best; 2 of 3 kept)``
    """
    first, *others = (os.path.basename(name) for name in names)
    parts = [f"saved {first}" + (f" (also {', '.join(others)})" if others else "")]
    parts += [f"step {step}", f"{format_size(size_bytes)} in {seconds:.2f} s"]
    if monitor is not None and score is not None:
        parts.append(f"{monitor} {_rank_text(names[0], score, before, after, save_top_k)}")
    if because:
        parts.append(f"on {because}")
    if deleted:
        parts.append(f"deleted {', '.join(os.path.basename(path) for path in deleted)}")
    return "  ".join(parts)


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


def format_size(size_bytes: int) -> str:
    """Write a size with its unit, in powers of 1000: ``1.2 MB``."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
