"""The connections of gloo's groups, ended from outside: they stay open while anything holds the group."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

Sockets = frozenset[tuple[int, str]]
"""File descriptors, each with what it stands for: a number that is used again stands for something else."""


def open_sockets() -> Sockets:
    """The sockets of this process; none where the system does not tell."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                meant = os.readlink(f"/proc/self/fd/{name}")
                if meant.startswith("socket:"):
                    found.add((int(name), meant))
    return frozenset(found)


def shut(sockets: Sockets) -> None:
    """End connections, for whoever waits on one, here and at its other end. Any thread may call it."""
    for number, meant in sockets & open_sockets():
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            same = os.readlink(f"/proc/self/fd/{number}") == meant
            # One that listens is gloo's too, and it takes the process down when that fails.
            if same and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                connection.shutdown(socket.SHUT_RDWR)
