"""Pickles put together opcode by opcode."""

from __future__ import annotations

import struct

CANARY = "touch canary"
"""A command that leaves a file behind in the directory of its process."""


def program(*parts: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def name(path: str) -> bytes:
    """A global, such as ``os.system``."""
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def put(slot: int) -> bytes:
    return b"r" + struct.pack("<I", slot)


def get(slot: int) -> bytes:
    return b"j" + struct.pack("<I", slot)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: str, *args: bytes) -> bytes:
    return name(function) + tuple_of(*args) + b"R"


def under(value: bytes, key: str = "a") -> bytes:
    """The pickle of a dict with one key."""
    return program(b"}", text(key), value, b"s")


def storage(key: str = "0", numel: int = 1, kind: str = "torch.FloatStorage", location: str = "cpu") -> bytes:
    return tuple_of(text("storage"), name(kind), text(key), text(location), number(numel)) + b"Q"


def sizes(*values: int) -> bytes:
    return tuple_of(*(b"\x8a\x08" + struct.pack("<q", value) for value in values))


def tensor(
    size: bytes = sizes(1),
    stride: bytes = sizes(1),
    offset: bytes = b"K\0",
    rest: bytes = b"",
    **where: object,
) -> bytes:
    """A tensor on a storage, each part as wished."""
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage(**where),  # type: ignore[arg-type]
        offset,
        size,
        stride,
        b"\x89",
        call("collections.OrderedDict"),
        rest,
    )
