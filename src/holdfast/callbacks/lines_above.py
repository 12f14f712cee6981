"""Lines that others print while a bar is drawn in place: they go above it instead of through it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class LinesAbove:
    """Stands in for ``sys.stdout`` and ``sys.stderr`` as far as they are terminals.

    What goes to a file or a pipe is left alone, and so is what moves the cursor, such as another progress
    bar.

    Args:
        make_room: A context in which the bar is out of the way.
        others_draw: Tells whether there are bars of others now. Then a lone line feed is one of them moving
            to its place, not somebody's empty line.
    """

    def __init__(
        self, make_room: Callable[[], AbstractContextManager[None]], others_draw: Callable[[], bool]
    ) -> None:
        self._make_room = make_room
        self._others_draw = others_draw
        self._streams: dict[str, _Lines] = {}

    @property
    def stdout(self) -> Any:
        """The stream to draw on."""
        return self._streams["stdout"].stream if "stdout" in self._streams else sys.stdout

    def start(self) -> None:
        """Begin; does nothing if it has begun."""
        if not self._streams:
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if stream is not None and stream.isatty():
                    self._streams[name] = _Lines(stream, self._make_room, self._others_draw)
                    setattr(sys, name, self._streams[name])

    def stop(self) -> None:
        """Put the streams back, with what was written to them and had no end of line yet."""
        streams, self._streams = self._streams, {}
        for name, lines in streams.items():
            if getattr(sys, name) is lines:
                setattr(sys, name, lines.stream)
        for lines in streams.values():  # a terminal that is gone raises here
            lines.finish()


class _Lines:
    def __init__(self, stream: Any, make_room: Any, others_draw: Callable[[], bool]) -> None:
        self.stream = stream
        self._make_room = make_room
        self._others_draw = others_draw
        self._begun = ""  # of a line that has not ended yet
        self._drew = False

    def write(self, text: str) -> int:
        if self._draws(text):
            self.stream.write(text)
        else:
            whole, feed, self._begun = (self._begun + text).rpartition("\n")
            if feed:
                with self._make_room():
                    self.stream.write(whole + feed)
                    self.stream.flush()
        return len(text)

    def _draws(self, text: str) -> bool:
        if "\r" in text or "\x1b[A" in text:
            self._drew = True
        elif self._begun or text.strip("\n"):
            self._drew = False
        else:
            # A bar that is done ends its line when it is no longer counted among those there are.
            return self._drew or self._others_draw()
        return self._drew

    def finish(self) -> None:
        text, self._begun = self._begun, ""
        self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
