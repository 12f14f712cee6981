"""A length of time in any of the forms that Lightning's users write it in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta

from holdfast.errors import ConfigError


def parse_duration(value: str | timedelta | Mapping[str, float], given: str) -> timedelta:
    """Return the duration that is meant.

    Args:
        value: "DD:HH:MM:SS", a timedelta, or a dict of its arguments.
        given: How it was given, as code, for the message.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+:\d+:\d+", value.strip()):
        days, hours, minutes, seconds = map(int, value.split(":"))
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if isinstance(value, Mapping):
        try:
            return timedelta(**value)
        except TypeError:
            pass
    raise ConfigError(
        f"{given}: expected a time as 'DD:HH:MM:SS', such as '00:12:00:00' for twelve hours, a "
        "datetime.timedelta, or a dict of its arguments such as {'hours': 12}."
    )
