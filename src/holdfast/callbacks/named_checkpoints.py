"""The names that a checkpoint callback gives to its files: what people override to change them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.callbacks import naming
from holdfast.callbacks.kept_checkpoints import KeptCheckpoints
from holdfast.checkpoint.reserved import reserving


class NamedCheckpoints(KeptCheckpoints):
    """Name the files from a template and the values of the moment, and count where a name is taken.

    Args:
        dirpath: Where they are.
        monitor: The logged name that ranks them.
        mode: Which end of it is better.
        save_top_k: How many are kept.
        filename: The template; None for the epoch and the step.
        auto_insert_metric_name: Put ``name=`` before each value.
        enable_version_counter: Put ``-v1``, ``-v2`` ... behind a name that another file has.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | None,
        monitor: str | None,
        mode: str,
        save_top_k: int,
        *,
        filename: str | None,
        auto_insert_metric_name: bool,
        enable_version_counter: bool,
    ) -> None:
        super().__init__(dirpath, monitor, mode, save_top_k)
        self.filename = filename
        self.auto_insert_metric_name = auto_insert_metric_name
        self._enable_version_counter = enable_version_counter

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """Fill the template: the path in ``dirpath``, with the extension.

        Args:
            metrics: A number or 0-dim tensor per name.
            filename: The template; default: this callback's.
            ver: A version to put behind, as ``-v1``.
            prefix: A text to put in front.

        Raises:
            ConfigError: The template asks for a name that is not in ``metrics``.
        """
        name = naming.format_checkpoint_name(
            filename or self._template,
            metrics,
            auto_insert_metric_name=self.auto_insert_metric_name,
            prefix=prefix,
            ver=ver,
            join_char=self.CHECKPOINT_JOIN_CHAR,
            equals_char=self.CHECKPOINT_EQUALS_CHAR,
        )
        return os.path.join(self.dirpath or "", name + self.FILE_EXTENSION)

    @property
    def _template(self) -> str:
        return self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"

    def _has_subdirectories(self) -> bool:
        return "/" in (self.filename or "")

    def _first_usable(
        self,
        metrics: dict[str, Tensor],
        filename: str | None,
        usable: Callable[[str], bool],
        *,
        counted: bool = False,
    ) -> str:
        # Before everything that logs has run, a name without a value yet is not a mistake.
        keys = naming.template_keys(filename or self._template)
        blanks = {key: torch.tensor(math.nan) for key in keys if key not in metrics}

        def name_of(version: int | None) -> str:
            return os.path.abspath(self.format_checkpoint_name({**blanks, **metrics}, filename, ver=version))

        if not (self._enable_version_counter or counted):
            return name_of(None)
        return naming.first_usable(name_of, reserving(usable), self.STARTING_VERSION)
