"""Exactness over combinations that nobody thought of: any model, data, schedule and place to stop."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import Case
from .harness import Outcome, assert_resumes_exactly

AUGMENTATIONS = st.sets(st.sampled_from(["torch", "numpy", "random"])).map(lambda names: tuple(sorted(names)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    manual = draw(st.booleans())
    validation = draw(st.sampled_from([None, "plain", "shuffled", "augmented", "drawing"]))
    trainer: dict[str, object] = {"max_epochs": draw(st.integers(1, 3))}
    if validation is not None:
        trainer["val_check_interval"] = draw(st.sampled_from([1.0, 0.5, 2]))
    if not manual:
        trainer["accumulate_grad_batches"] = draw(st.sampled_from([1, 1, 2, 3]))
        trainer["gradient_clip_val"] = draw(st.sampled_from([None, 0.1]))
        trainer["precision"] = draw(st.sampled_from(["32-true", "32-true", "bf16-mixed", "16-mixed"]))
    return Case(
        rows=draw(st.integers(9, 21)),
        batch_size=draw(st.integers(2, 4)),
        shuffle=draw(st.booleans()),
        drop_last=True,  # a last batch of one row is no batch that BatchNorm can train on
        own_generator=draw(st.booleans()),
        sampler=draw(st.sampled_from([None, None, "weighted"])),
        augment=draw(AUGMENTATIONS),
        dropout=draw(st.booleans()),
        batch_norm=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["sgd", "adam"])),
        scheduler=draw(st.sampled_from([None, "onecycle", "step", "multistep", "plateau"])),
        manual=manual,
        target=draw(st.sampled_from([None, "module", "callback"])),
        validation=validation,
        early_stopping=draw(st.booleans()),
        trainer=trainer,
    )


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), place=st.floats(0, 1, exclude_max=True))
def test_any_combination_resumes_exactly(case: Case, place: float) -> None:
    def one(whole: Outcome) -> list[int]:
        return [list(whole.files)[int(place * len(whole.files))]]

    with tempfile.TemporaryDirectory() as root:
        assert_resumes_exactly(case, Path(root), one)
