"""`LightningDataModule`, where Lightning's users import it from."""

from __future__ import annotations

from holdfast.training.datamodule import LightningDataModule

__all__ = ["LightningDataModule"]
