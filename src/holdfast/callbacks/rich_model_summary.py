"""The table of the model's parts, always drawn with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.callbacks.model_summary import ModelSummary, print_rich

if TYPE_CHECKING:
    from holdfast.utilities import model_summary


class RichModelSummary(ModelSummary):
    """The same as `ModelSummary`, drawn with rich where there is no terminal too.

    Args:
        max_depth: How deep to go into submodules; 0 prints the total alone, -1 goes all the way.
        **summarize_kwargs: ``header_style``, rich's style of the headings; anything else is accepted for
            compatibility.
    """

    def show(self, summary: model_summary.ModelSummary) -> None:
        """Print the table on stderr."""
        print_rich(summary, self._summarize_kwargs.get("header_style", "bold"))
