"""Hyperparameters in a file of their own: what loggers write, and what people edit by hand."""

from __future__ import annotations

import ast
import csv
import os
import pathlib
from typing import Any, TextIO

from holdfast.errors import ConfigError


def read_hparams_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Hyperparameters from a file of a logger: .yaml, with any nesting, or .csv with columns key and value.

    Raises:
        ConfigError: there is no such file, it has another ending, or it does not hold names and values.
    """
    name = os.fspath(path)
    ending = os.path.splitext(name)[1].lower()
    if ending not in (".yaml", ".yml", ".csv"):
        raise ConfigError(f"hparams_file={name!r}: expected a .yaml, .yml or .csv file.")
    try:
        with open(name, encoding="utf-8", newline="") as file:
            values = _read_csv(file) if ending == ".csv" else _read_yaml(file)
    except OSError as error:
        raise ConfigError(f"hparams_file={name!r} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"hparams_file={name!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"hparams_file={name!r} holds a {type(values).__name__}, expected names and values."
        )
    return values


def _read_csv(file: TextIO) -> dict[str, Any]:
    rows = csv.DictReader(file)
    if not {"key", "value"} <= set(rows.fieldnames or ()):
        raise ValueError(f"its columns are {rows.fieldnames or []}, expected 'key' and 'value'.")
    return {row["key"]: _literal(row["value"]) for row in rows}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _read_yaml(file: TextIO) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values, and the two types of Python's own that Lightning's files have without harm."""

    def items(loader: Any, node: Any) -> list[Any]:
        return list(loader.construct_sequence(node, deep=True))

    def path(loader: Any, node: Any) -> pathlib.Path:
        return pathlib.Path(*map(str, items(loader, node)))

    prefix = "tag:yaml.org,2002:python/"
    Loader.add_constructor(f"{prefix}tuple", lambda loader, node: tuple(items(loader, node)))
    for module in ("pathlib", "pathlib._local"):
        for kind in ("PosixPath", "WindowsPath", "Path"):
            Loader.add_constructor(f"{prefix}object/apply:{module}.{kind}", path)
    try:
        values = yaml.load(file, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {} if values is None else values
