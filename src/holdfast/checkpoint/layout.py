"""Where everything in the file lies: the storages first, so that the image of them needs nothing else."""

from __future__ import annotations

from holdfast.checkpoint import container
from holdfast.checkpoint.container import Entry
from holdfast.checkpoint.direct import BLOCK_BYTES
from holdfast.checkpoint.tensors import Record


class Layout:
    """Where the records of a plan lie in a file, and what stands before each.

    It depends on the records' names and lengths and on the names of the tensors in them, and on no value: one
    for each plan, for all its saves.

    Attributes:
        records: as in the plan.
        entries: for each record where its header begins and where its data does; their checksums are 0.
        headers: for each record the zip header that goes before it, with the checksum 0.
        tensors: for each record's name the tensors in it, as the manifest lists them.
        end: the byte after the last record, where ``data.pkl`` follows.
        image_bytes: how much memory an image of the records needs: ``end``, up to the next whole block.
        tail_bytes: about how much follows ``end`` besides ``data.pkl``.
    """

    __slots__ = ("end", "entries", "headers", "image_bytes", "records", "tail_bytes", "tensors")

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.headers: list[bytes] = []
        self.entries: list[Entry] = []
        self.tensors: dict[str, list[str]] = {}
        at = listed = 0
        for record in records:
            name, length = record.name, record.length
            header = container.local_header(name, at, length, 0)
            self.headers.append(header)
            self.entries.append(Entry(name, at, at + len(header), length, 0))
            at += len(header) + length
            rows = self.tensors[name] = [
                container.tensor_json(span.name, str(span.tensor.dtype)[6:], span.tensor.shape)
                for span in record.spans
            ]
            listed += 110 + 2 * len(name) + sum(map(len, rows))
        self.end = at
        self.image_bytes = at + -at % BLOCK_BYTES
        self.tail_bytes = 1024 + listed
