"""The progress bars under the path that Lightning's users import them from."""

from __future__ import annotations

from holdfast.callbacks.progress_bar import ProgressBar
from holdfast.callbacks.rich_progress_bar import RichProgressBar
from holdfast.callbacks.tqdm_progress_bar import TQDMProgressBar

__all__ = ["ProgressBar", "RichProgressBar", "TQDMProgressBar"]
