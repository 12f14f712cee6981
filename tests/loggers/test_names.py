"""The names of Lightning's loggers: where they are, and what is said of those that are not there."""

from __future__ import annotations

import importlib

import pytest

import holdfast.loggers


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("logger", ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]),
        ("csv_logs", ["CSVLogger", "ExperimentWriter"]),
        ("tensorboard", ["TensorBoardLogger"]),
    ],
)
def test_lightnings_addresses(address: str, names: list[str]) -> None:
    module = importlib.import_module(f"holdfast.loggers.{address}")
    assert [name for name in names if not hasattr(module, name)] == []
    public = importlib.import_module("holdfast.loggers")
    for name in set(names) & set(public.__all__):
        assert getattr(module, name) is getattr(public, name)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("CometLogger", "comet_ml"),
        ("LitLogger", "litlogger"),
        ("MLFlowLogger", "mlflow"),
        ("NeptuneLogger", "neptune"),
        ("WandbLogger", "wandb"),
    ],
)
def test_a_logger_that_is_left_out_names_what_to_use(name: str, package: str) -> None:
    with pytest.raises(ImportError) as raised:
        exec(f"from holdfast.loggers import {name}")
    assert str(raised.value) == (
        f"holdfast.loggers has no {name}. Use CSVLogger or TensorBoardLogger; or derive a class from "
        f"holdfast.loggers.Logger whose log_metrics and log_hyperparams call {package}."
    )
    with pytest.raises(ImportError, match=f"has no {name}"):
        getattr(holdfast.loggers, name)


def test_any_other_name_is_one_that_is_not_there() -> None:
    assert not hasattr(holdfast.loggers, "CSVLoger")
    with pytest.raises(ImportError, match="cannot import name 'CSVLoger'"):
        exec("from holdfast.loggers import CSVLoger")
