"""Modules and datamodules, where Lightning's users import them from."""

from __future__ import annotations

from holdfast.training.datamodule import LightningDataModule
from holdfast.training.module import LightningModule

__all__ = ["LightningDataModule", "LightningModule"]
