"""The bar that `TQDMProgressBar` draws with; importing this imports tqdm."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from holdfast.callbacks.tqdm_progress_bar import TQDMProgressBar

if importlib.util.find_spec("ipywidgets") is not None:
    # A widget in a notebook, the same text as without it anywhere else.
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
else:
    from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["TQDMProgressBar", "Tqdm"]


class Tqdm(tqdm):  # type: ignore[misc]
    """tqdm's bar with numbers of a steady width, so that what stands behind them doesn't jump."""

    monitor_interval = 0  # its thread mends the pace of bars that count for themselves

    @staticmethod
    def format_num(n: Any) -> str:
        """Write a float with 5 characters or more: ``0.300``."""
        text = str(tqdm.format_num(n))
        if not isinstance(n, float) or not math.isfinite(n) or "e" in text:
            return text
        return (text if "." in text else f"{text}.").ljust(5, "0")
