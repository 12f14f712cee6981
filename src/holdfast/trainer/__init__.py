"""The trainer, where Lightning's users import it from."""

from __future__ import annotations

from holdfast.training.trainer import Trainer
from holdfast.utilities.seed import seed_everything

__all__ = ["Trainer", "seed_everything"]
