"""Checkpoint file names: pure functions from a template and values to a name."""

from __future__ import annotations

import difflib
import math
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from holdfast.errors import ConfigError

DEFAULT_TEMPLATE = "{epoch}-{step}"


def template_keys(template: str) -> list[str]:
    """List the names that a template has in braces, in order.

    Raises:
        ConfigError: The braces don't match, or a pair of them is empty.
    """
    return [name for _, name, _, _ in _parse(template) if name is not None]


def check_template(template: str) -> None:
    """Refuse a template that no values could fill.

    Raises:
        ConfigError: The braces don't match, a pair of them is empty, or a format fits no number.
    """
    for _, name, spec, _ in _parse(template):
        if name is not None and spec and not any(_fits(spec, number) for number in (1, 1.0)):
            raise ConfigError(f"The file name {template!r} wants {name!r} as {spec!r}, which fits no number.")


def nearest(name: str, names: Iterable[str]) -> str:
    """Say in a sentence which of ``names`` come near ``name``, and which there are at all."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
    return f"{hint} Logged so far: {', '.join(known) if known else 'nothing'}."


def format_checkpoint_name(
    template: str,
    metrics: Mapping[str, Any],
    *,
    auto_insert_metric_name: bool = True,
    prefix: str | None = None,
    ver: int | None = None,
    join_char: str = "-",
    equals_char: str = "=",
) -> str:
    """Fill a template: ``{epoch:02d}-{val/loss:.2f}`` becomes ``epoch=02-val_loss=0.32``.

    Args:
        template: Text with ``{name}`` or ``{name:format}``. A slash in a metric's name becomes "_": only
            a slash outside the braces makes a subdirectory.
        metrics: A number or 0-dim tensor per name.
        auto_insert_metric_name: Put ``name=`` before each value.
        prefix: Put this and ``join_char`` in front.
        ver: Put ``join_char`` and "v" with this number behind.
        join_char: What joins the parts.
        equals_char: What stands between a name and its value.

    Raises:
        ConfigError: A name is not in ``metrics`` (the nearest ones are named), a format doesn't fit its
            value, or the braces don't match.
    """
    parts: list[str] = []
    for literal, name, spec, _ in _parse(template):
        parts.append(literal)
        if name is None:
            continue
        if name not in metrics:
            raise ConfigError(
                f"The file name {template!r} asks for {name!r}, which is not there.{nearest(name, metrics)}"
            )
        if auto_insert_metric_name:
            parts.append(name.replace("/", "_") + equals_char)
        parts.append(_format_value(template, name, metrics[name], spec or ""))
    text = "".join(parts)
    if prefix:
        text = f"{prefix}{join_char}{text}"
    if ver is not None:
        text = f"{text}{join_char}v{ver}"
    return text


def first_usable(
    name_of: Callable[[int | None], str], usable: Callable[[str], bool], starting_version: int
) -> str:
    """Try the plain name, then versions from ``starting_version`` up, and return the first usable one.

    Args:
        name_of: The name for a version; None stands for no version.
        usable: Whether a file may be put there.
        starting_version: The first version to try.

    Raises:
        ConfigError: The name does not change with the version.
    """
    name = name_of(None)
    version = starting_version
    while not usable(name):
        taken, name = name, name_of(version)
        if name == taken:
            raise ConfigError(
                f"{name} is another file's name, and format_checkpoint_name gives no other: "
                "let the name depend on its argument `ver`."
            )
        version += 1
    return name


def _parse(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"The file name {template!r} can't be read as a template: {error}.") from None
    for _, name, _, conversion in parts:
        if name == "" or conversion is not None:
            raise ConfigError(
                f"The file name {template!r} has braces without a metric's name, or with a '!' in it. "
                "Write {name} or {name:format}; for a brace itself write it twice."
            )
    return parts


def _fits(spec: str, number: float) -> bool:
    try:
        format(number, spec)
    except ValueError:
        return False
    return True


def _format_value(template: str, name: str, value: Any, spec: str) -> str:
    number = value.item() if hasattr(value, "item") else value
    try:
        return format(number, spec)
    except ValueError:
        if isinstance(number, float) and not math.isfinite(number):
            # No integer format has a form for these, and a metric without a value must not stop a save.
            return str(number)
        raise ConfigError(
            f"The file name {template!r} wants {name!r} as {spec!r}, which doesn't fit its value {number!r}."
        ) from None
