"""Kinds of warnings that people filter by."""

from __future__ import annotations

import warnings


class PossibleUserWarning(UserWarning):
    """Something that may be a mistake, or may be meant."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Show no `PossibleUserWarning` from now on; ``module`` is a regular expression for where they point."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


__all__ = ["PossibleUserWarning", "disable_possible_user_warnings"]
