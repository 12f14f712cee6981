"""`LightningModule`, where Lightning's users import it from."""

from __future__ import annotations

from holdfast.training.module import LightningModule

__all__ = ["LightningModule"]
