"""Arguments of `ModelCheckpoint` as 1.x spelled them, turned into today's: one table.

An old spelling works and warns once, naming today's form.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec

from holdfast.callbacks.naming import DEFAULT_TEMPLATE
from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_deprecation
from holdfast.utilities.unknown_names import unexpected_argument

P = ParamSpec("P")


def _period(value: Any, today: dict[str, Any]) -> dict[str, Any]:
    return {"every_n_epochs": value}


def _filepath(value: Any, today: dict[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    path = os.fspath(value)
    directory, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    return {"dirpath": directory or os.curdir, **({"filename": name} if name else {})}


def _prefix(value: Any, today: dict[str, Any]) -> dict[str, Any]:
    if not value:
        return {}
    return {"filename": f"{value}-{today.get('filename') or DEFAULT_TEMPLATE}"}


# Old name -> what it means, given what is already said in today's words. In this order.
_OLD: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "period": _period,
    "filepath": _filepath,
    "prefix": _prefix,
}
# What an old spelling may complete rather than contradict.
_COMPLETES = {"prefix": "filename"}


def today(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Return today's arguments for the given ones; each old spelling is said once.

    Args:
        given: The arguments of a call, by name.
        known: The arguments that there are today.

    Raises:
        ArgumentError: There is no such argument; the message names the nearest.
        ConfigError: An old spelling and today's were given both.
    """
    arguments = {name: value for name, value in given.items() if name not in _OLD}
    for name in arguments:
        if name not in known:
            raise unexpected_argument("ModelCheckpoint", name, known)
    for name in (old for old in _OLD if old in given):
        meant = _OLD[name](given[name], arguments)
        for key in meant:
            if arguments.get(key) is not None and _COMPLETES.get(name) != key:
                raise ConfigError(
                    f"ModelCheckpoint({name}={given[name]!r}) is the old spelling of {key}=, which is given "
                    f"as well: {arguments[key]!r}. Leave {name}= out."
                )
        arguments.update(meant)
        spelled = ", ".join(f"{key}={value!r}" for key, value in meant.items())
        rank_zero_deprecation(
            f"ModelCheckpoint({name}={given[name]!r}) is the spelling of 1.x: "
            + (f"use {spelled}." if spelled else "leave it out.")
        )
    return arguments


def takes_old_spellings(init: Callable[P, None]) -> Callable[P, None]:
    """Let ``ModelCheckpoint.__init__`` be called with the spellings in the table above."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if any(name not in known for name in kwargs):
            callback, *positional = args
            by_name = dict(zip(known, positional, strict=False))
            init(callback, **today({**by_name, **kwargs}, known))  # type: ignore[arg-type]
        else:
            init(*args, **kwargs)

    return wrapped
