"""What is seen of a value: every bit of it, wherever it stands, and nothing of the run's directory."""

from __future__ import annotations

import pickle
import random
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from holdfast.testing.fingerprints import Fingerprints, Leaf, difference

Pair = namedtuple("Pair", "first second")


@dataclass
class Graph:
    nodes: torch.Tensor
    label: str


class Opaque:
    __slots__ = ("value",)


def look(value: Any, **arguments: Any) -> dict[str, Leaf]:
    return Fingerprints("/runs/whole", **arguments).of(value, "batch")


ONE, OTHER = torch.arange(4.0), torch.tensor([0.0, 1, 2, 5])

VALUES: dict[str, tuple[Any, Any, str]] = {
    "tensor": (ONE, OTHER, "batch: 1 of 4 values differ, by 2 at most"),
    "shape": (ONE, ONE.view(2, 2), ""),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.float64), ""),
    "half": (ONE.bfloat16(), OTHER.bfloat16(), "batch: 1 of 4 values differ, by 2 at most"),
    "complex": (ONE + 1j, OTHER + 1j, "batch: 1 of 4 values differ, by 2 at most"),
    "large integers": (
        torch.tensor([2**60, 1]),
        torch.tensor([2**60 + 1, 1]),
        "batch: 1 of 2 values differ, by 1 at most",
    ),
    "words": (
        torch.tensor([1, 2], dtype=torch.uint32),
        torch.tensor([1, 4], dtype=torch.uint32),
        "batch: 1 of 2 values differ, by 2 at most",
    ),
    "flags": (
        torch.tensor([True, False]),
        torch.tensor([True, True]),
        "batch: 1 of 2 values differ, by 1 at most",
    ),
    "signs of zero": (
        torch.tensor([0.0, 1.0]),
        torch.tensor([-0.0, 1.0]),
        "batch: all 2 values are equal, but not their bits (0.0 and -0.0, or kinds of NaN)",
    ),
    "sparse": (ONE.to_sparse(), OTHER.to_sparse(), "batch: 1 of 4 values differ, by 2 at most"),
    "columns": (ONE.view(2, 2).T, OTHER.view(2, 2).T, "batch: 1 of 4 values differ, by 2 at most"),
    "number": (
        torch.tensor(0.5),
        torch.tensor(0.25),
        "batch: 0.5 in the run that never stopped, 0.25 in the stopped one",
    ),
    "one number": (
        torch.tensor([0.5]),
        torch.tensor([0.25]),
        "batch: [0.5] in the run that never stopped, [0.25] in the stopped one",
    ),
    "array": (ONE.numpy(), OTHER.numpy(), "batch: 1 of 4 values differ, by 2 at most"),
    "reversed array": (ONE.numpy()[::-1], OTHER.numpy()[::-1], "batch: 1 of 4 values differ, by 2 at most"),
    "texts": (numpy.array(["a", "b"]), numpy.array(["a", "c"]), ""),
    "NumPy's number": (
        numpy.float32(0.5),
        numpy.float32(0.25),
        "batch: 0.5 in the run that never stopped, 0.25 in the stopped one",
    ),
    "plain values": (
        [1, "a", None],
        [1, "b", None],
        "batch: [1, 'a', None] in the run that never stopped, [1, 'b', None] in the stopped one",
    ),
    "long list": (list(range(1000)), [*range(999), 0], ""),
    "bytes": (b"abc", b"abd", ""),
    "set": (
        {"a", "b"},
        {"a", "c"},
        """batch: ["'a'", "'b'"] in the run that never stopped, ["'a'", "'c'"] in the stopped one""",
    ),
    "dict": (
        {"x": ONE, "y": [ONE, ONE]},
        {"x": ONE, "y": [ONE, OTHER]},
        "batch.y[1]: 1 of 4 values differ, by 2 at most",
    ),
    "named tuple": (Pair(ONE, ONE), Pair(ONE, OTHER), "batch[1]: 1 of 4 values differ, by 2 at most"),
    "object": (Graph(ONE, "a"), Graph(OTHER, "a"), "batch.nodes: 1 of 4 values differ, by 2 at most"),
    "missing": ({"x": ONE}, {"x": ONE, "y": ONE}, "batch.y: only the stopped one has it"),
    "generator": (random.Random(1), random.Random(2), ""),
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_difference_is_seen(kind: str) -> None:
    one, other, said = VALUES[kind]
    mine, theirs = look(one), look(other)
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    assert len(names) == 1
    text = difference(names[0], mine.get(names[0]), theirs.get(names[0]))
    assert text == said or (not said and " in the run that never stopped, " in text)


@pytest.mark.parametrize("kind", VALUES)
def test_what_is_equal_stays_equal_on_its_way_to_another_process(kind: str) -> None:
    one, other, _ = VALUES[kind]
    sent = pickle.loads(pickle.dumps(look(one)))
    assert sent == look(one)
    for name in set(sent) & set(look(other)):
        kept = look(one)[name].value
        assert (kept is None) is (sent[name].value is None)
        assert kept is None or torch.equal(sent[name].value, kept)


def test_nan_is_equal_to_itself_and_the_directory_does_not_matter() -> None:
    assert look(float("nan")) == look(float("nan"))
    assert look(torch.full((2,), float("nan"))) == look(torch.full((2,), float("nan")))
    theirs = Fingerprints("/runs/stopped").of({"/runs/stopped/a": Path("/runs/stopped/b")}, "batch")
    assert look({"/runs/whole/a": Path("/runs/whole/b")}) == theirs == {"batch.<root>/a": Leaf("<root>/b")}


def test_what_cannot_be_looked_into_and_what_goes_round() -> None:
    circle: list[Any] = [ONE]
    circle.append(circle)
    assert look(Opaque()) == {"batch": Leaf("an object of Opaque")}
    assert look(circle)["batch[1][1][0]"] == look(ONE)["batch"]


def test_tensors_are_kept_while_there_is_room() -> None:
    leaves = look([ONE, OTHER], keep_bytes=20)
    assert leaves["batch[0]"].value is not None
    assert leaves["batch[1]"].value is None
    assert leaves == look([ONE, OTHER])
    assert " in the run that never stopped, " in difference("x", leaves["batch[0]"], leaves["batch[1]"])
