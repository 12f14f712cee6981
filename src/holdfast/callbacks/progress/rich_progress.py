"""The rich bar and its theme, under Lightning's path."""

from __future__ import annotations

from holdfast.callbacks.rich_progress_bar import RichProgressBar, RichProgressBarTheme

__all__ = ["RichProgressBar", "RichProgressBarTheme"]
