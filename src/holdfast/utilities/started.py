"""How this process was started: noted when holdfast is imported, before a script can change it."""

from __future__ import annotations

import os


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it is deleted
        return None


directory = _directory()
"""The working directory, or None where it was gone already."""
