"""hparams.yaml by both loggers: any value goes in, plain YAML comes out and builds the module again."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from holdfast.errors import ConfigError
from holdfast.loggers import CSVLogger, TensorBoardLogger
from tests.training.toys import Toy, rows, trainer


class Color(Enum):
    RED = 1


@dataclass
class Settings:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    more: dict[str, Any] = field(default_factory=lambda: {"key": (3, "x")})


class Odd:
    pass


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("not now")


class Name(str):
    pass


def step(x: int) -> int:
    return x


VALUES: dict[str, tuple[Any, Any]] = {
    "nested": ({"a": {"b": [1, {"c": None}]}}, {"a": {"b": [1, {"c": None}]}}),
    "namespace": (Namespace(q=1, inner=Namespace(r="x")), {"q": 1, "inner": {"r": "x"}}),
    "path": (Path("x/y"), "x/y"),
    "dataclass": (Settings(), {"rate": 0.1, "sizes": [1, 2], "more": {"key": [3, "x"]}}),
    "enum": (Color.RED, "RED"),
    "tuple": ((1, "a"), [1, "a"]),
    "set": ({"b", "a"}, ["a", "b"]),
    "text of its own kind": (Name("n"), "n"),
    "small number": (1e-05, 1e-05),
    "huge": (10**400, 10**400),
    "infinite": (-math.inf, -math.inf),
    "tensor": (torch.tensor([[1.0, 2.0]]), [[1.0, 2.0]]),
    "scalar tensor": (torch.tensor(2), 2),
    "large tensor": (torch.ones(2000, 3), "Tensor of shape (2000, 3)"),
    "array": (numpy.arange(3), [0, 1, 2]),
    "numpy number": (numpy.float32(0.5), 0.5),
    "class": (torch.optim.Adam, "torch.optim.adam.Adam"),
    "class of numbers": ([numpy.float32, torch.Tensor], ["numpy.float32", "torch.Tensor"]),
    "tensor without values": (torch.ones(2, device="meta"), "<Tensor>"),
    "sparse tensor": (torch.eye(2).to_sparse(), "<Tensor>"),
    "function": (step, f"{__name__}.step"),
    "partial": (functools.partial(step, x=1), "functools.partial(<function step>, x=1)"),
    "object": (Odd(), f"<{__name__}.Odd object>"),
    "object without text": (Broken(), "<Broken>"),
    "keys": ({1: "a", None: "b", (1, 2): "c"}, {1: "a", "None": "b", "(1, 2)": "c"}),
    "not unicode": ("a\udcff", "a\udcff"),
    "config": (OmegaConf.create({"w": 3, "k": {"z": [1, "${w}"]}}), {"w": 3, "k": {"z": [1, 3]}}),
    "config without a value": (OmegaConf.create({"w": "${nowhere}"}), {"w": "${nowhere}"}),
    "config of a class": (
        OmegaConf.structured(Settings(more={})),
        {"rate": 0.1, "sizes": [1, 2], "more": {}},
    ),
}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_every_value_is_plain_and_the_same_in_every_process(tmp_path: Path, kind: Any) -> None:
    logger = kind(tmp_path)
    logger.log_hyperparams({name: value for name, (value, _) in VALUES.items()})
    found = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert found == {name: expected for name, (_, expected) in VALUES.items()}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize(
    "params",
    [
        {"rate": 0.1, "sizes": (1, 2)},
        Namespace(rate=0.1, sizes=[1, 2]),
        Settings(),
        OmegaConf.structured(Settings),
    ],
)
def test_they_may_come_in_any_form(tmp_path: Path, kind: Any, params: Any) -> None:
    logger = kind(tmp_path)
    logger.log_hyperparams(params)
    found = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert (found["rate"], found["sizes"]) == (0.1, [1, 2])


def test_a_value_without_a_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        CSVLogger(tmp_path).log_hyperparams(0.1)  # type: ignore[arg-type]
    assert str(raised.value) == (
        "log_hyperparams: expected a dict, Namespace, dataclass or OmegaConf config, found float."
    )


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_module_is_built_again_from_it(tmp_path: Path, kind: Any) -> None:
    logger = kind(tmp_path)
    fit = trainer(logger=logger)
    fit.fit(Toy(lr=0.25, width=2), rows())
    fit.save_checkpoint(tmp_path / "toy.ckpt")
    hparams_file = Path(logger.log_dir, "hparams.yaml")
    assert hparams_file.read_text() == "lr: 0.25\nwidth: 2\n"
    hparams_file.write_text("lr: 0.5\nwidth: 2\n")
    loaded = Toy.load_from_checkpoint(tmp_path / "toy.ckpt", hparams_file=hparams_file)
    assert loaded.hparams == {"lr": 0.5, "width": 2}
