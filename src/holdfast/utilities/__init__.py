"""The small names that Lightning's users import from ``utilities``; loaded one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.utilities.combined_loader import CombinedLoader as CombinedLoader
    from holdfast.utilities.enums import GradClipAlgorithmType as GradClipAlgorithmType
    from holdfast.utilities.exceptions import MisconfigurationException as MisconfigurationException
    from holdfast.utilities.grads import grad_norm as grad_norm
    from holdfast.utilities.parsing import AttributeDict as AttributeDict
    from holdfast.utilities.parsing import is_picklable as is_picklable
    from holdfast.utilities.rank_zero import rank_zero_deprecation as rank_zero_deprecation
    from holdfast.utilities.rank_zero import rank_zero_info as rank_zero_info
    from holdfast.utilities.rank_zero import rank_zero_only as rank_zero_only
    from holdfast.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from holdfast.utilities.warnings import PossibleUserWarning as PossibleUserWarning
    from holdfast.utilities.warnings import disable_possible_user_warnings as disable_possible_user_warnings

_HOMES = {
    "AttributeDict": ".parsing",
    "CombinedLoader": ".combined_loader",
    "GradClipAlgorithmType": ".enums",
    "MisconfigurationException": ".exceptions",
    "PossibleUserWarning": ".warnings",
    "disable_possible_user_warnings": ".warnings",
    "grad_norm": ".grads",
    "is_picklable": ".parsing",
    "rank_zero_deprecation": ".rank_zero",
    "rank_zero_info": ".rank_zero",
    "rank_zero_only": ".rank_zero",
    "rank_zero_warn": ".rank_zero",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES)
