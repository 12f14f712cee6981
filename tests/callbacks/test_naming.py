"""Names come out as Lightning's do, except where Lightning's lose or misplace a file."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.callbacks.naming import (
    check_template,
    first_usable,
    format_checkpoint_name,
    nearest,
    template_keys,
)
from holdfast.errors import ConfigError

METRICS = {"epoch": 2, "step": 18, "val_loss": torch.tensor(0.3217), "val/x": 0.1}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{epoch}-{step}", "epoch=2-step=18"),
        ("sample-mnist-{epoch:02d}-{val_loss:.2f}", "sample-mnist-epoch=02-val_loss=0.32"),
        ("{step:06d}", "step=000018"),
        ("best", "best"),
        ("a/{epoch}", "a/epoch=2"),
        ("{{x}}-{epoch}", "{x}-epoch=2"),
        ("my={epoch}", "my=epoch=2"),
    ],
)
def test_templates(template: str, name: str) -> None:
    assert format_checkpoint_name(template, METRICS) == name


def test_a_slash_in_a_metrics_name_makes_no_subdirectory() -> None:
    assert format_checkpoint_name("{val/x:.1f}", METRICS) == "val_x=0.1"


def test_without_names_with_prefix_and_version() -> None:
    name = format_checkpoint_name("{epoch}", METRICS, auto_insert_metric_name=False, prefix="p", ver=3)
    assert name == "p-2-v3"
    assert format_checkpoint_name("{epoch}", METRICS, ver=1, join_char="_", equals_char=":") == "epoch:2_v1"


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        format_checkpoint_name("{epoch}-{val_los:.2f}", METRICS)
    assert str(caught.value) == (
        "The file name '{epoch}-{val_los:.2f}' asks for 'val_los', which is not there. Did you mean "
        "'val_loss'? Logged so far: epoch, step, val/x, val_loss."
    )


def test_nothing_near_and_nothing_logged() -> None:
    assert nearest("zzz", ["loss"]) == " Logged so far: loss."
    assert nearest("zzz", []) == " Logged so far: nothing."


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{epoch", "The file name '{epoch' can't be read as a template: expected '}' before end of string."),
        (
            "{}",
            (
                "The file name '{}' has braces without a metric's name, or with a '!' in it. "
                "Write {name} or {name:format}; for a brace itself write it twice."
            ),
        ),
        ("{val_loss:d}", "The file name '{val_loss:d}' wants 'val_loss' as 'd', which doesn't fit its value"),
    ],
)
def test_templates_that_cannot_work(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        format_checkpoint_name(template, METRICS)
    assert str(caught.value).startswith(message)


def test_a_value_that_is_not_a_number_never_stops_a_save() -> None:
    assert format_checkpoint_name("{x:02d}-{y:.2f}", {"x": math.nan, "y": math.inf}) == "x=nan-y=inf"


def test_a_format_that_fits_no_number_is_refused_before_there_is_one() -> None:
    with pytest.raises(ConfigError) as caught:
        check_template("{epoch:02d}-{val_loss:.2s}")
    assert str(caught.value) == (
        "The file name '{epoch:02d}-{val_loss:.2s}' wants 'val_loss' as '.2s', which fits no number."
    )
    check_template("{epoch:02d}-{val_loss:.2f}-{x:d}-{y:.1e}-{z}")


def test_template_keys() -> None:
    assert template_keys("a-{epoch:02d}-{val/x}-{{no}}") == ["epoch", "val/x"]


def test_first_usable_counts_up_from_the_starting_version() -> None:
    taken = {"n", "n-v1"}
    name = first_usable(lambda v: "n" if v is None else f"n-v{v}", lambda n: n not in taken, 1)
    assert name == "n-v2"


def test_a_name_that_never_changes_is_an_error_and_not_a_loop() -> None:
    with pytest.raises(ConfigError) as caught:
        first_usable(lambda v: "n", lambda n: False, 1)
    assert str(caught.value) == (
        "n is another file's name, and format_checkpoint_name gives no other: let the name depend on its "
        "argument `ver`."
    )


@functools.cache
def lightning_callbacks() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning.pytorch.callbacks")


@settings(deadline=None)  # the first example imports Lightning
@given(
    st.lists(
        st.one_of(
            st.text("ab-_=. ", max_size=4),
            st.sampled_from(
                ["{epoch}", "{epoch:03d}", "{step}", "{val_loss:.3f}", "{val_loss}", "{loss:.1e}"]
            ),
        ),
        min_size=1,
        max_size=6,
    ).map("".join),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 3)),
)
def test_same_names_as_lightning(template: str, insert: bool, ver: int | None) -> None:
    callbacks = lightning_callbacks()
    metrics = {
        "epoch": torch.tensor(2),
        "step": torch.tensor(18),
        "val_loss": torch.tensor(0.3217),
        "loss": torch.tensor(12.5),
    }
    theirs = callbacks.ModelCheckpoint(dirpath="/d", filename=template, auto_insert_metric_name=insert)
    ours = format_checkpoint_name(template, metrics, auto_insert_metric_name=insert, ver=ver)
    if template:
        assert f"/d/{ours}.ckpt" == theirs.format_checkpoint_name(metrics, ver=ver)
