"""Lightning's tuner is not there: whoever imports it is told what to use instead."""

from __future__ import annotations

from holdfast.utilities.lazy import lazily

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = {
    "Tuner": "There is no tuner: try learning rates by runs with Trainer(max_steps=...), and batch sizes by "
    "runs with Trainer(fast_dev_run=True).",
}

__getattr__, __dir__ = lazily(__name__, {}, _LEFT_OUT)
