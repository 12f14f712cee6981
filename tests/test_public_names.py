"""The public surface, frozen: adding a name is a decision, losing one breaks somebody's program."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "holdfast": {},
    "holdfast.callbacks": {},
    "holdfast.loggers": {},
    "holdfast.utilities": {},
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_are_these(module: str) -> None:
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module])
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
        assert name in dir(loaded)


@pytest.mark.parametrize("module", PUBLIC)
def test_a_name_that_is_not_there_is_said(module: str) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        importlib.import_module(module).Trainr  # noqa: B018
