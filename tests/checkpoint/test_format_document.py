"""docs/format.md says all that a reader needs: the one that stands in it reads what is written today and was before."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from realistic import SUMMARY, realistic_payload

from holdfast.checkpoint import container, exact, integrity
from holdfast.checkpoint.engine import CheckpointEngine

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
OLD_ORDER = ("data.pkl", "version", "byteorder")


def reader() -> dict[str, Any]:
    """The names that the document's reader defines."""
    (source,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert sum(1 for line in source.splitlines() if line.strip()) <= 60
    assert "holdfast import" not in source and "import holdfast" not in source
    names: dict[str, Any] = {}
    exec(source, names)
    return names


def in_the_old_order(path: Path) -> None:
    """Write a file again as the first holdfast laid it out: what torch needs, then the storages."""
    whole = path.read_bytes()
    with open(path, "rb") as file:
        tail = container.read_tail(file.fileno())
        manifest = integrity.read_manifest(file.fileno(), tail)
    records = [record for record in manifest.records if not record.entry.name.startswith("holdfast/")]
    records.sort(key=lambda record: record.entry.name not in OLD_ORDER)
    data, entries = bytearray(), []

    def add(name: str, content: bytes, crc: int) -> container.Entry:
        header = container.local_header(name, len(data), len(content), crc)
        entries.append(container.Entry(name, len(data), len(data) + len(header), len(content), crc))
        data.extend(header + content)
        return entries[-1]

    for record in records:
        entry = record.entry
        add(entry.name, whole[entry.offset : entry.offset + entry.length], entry.crc32)
    rows = container.records_bytes(entries, {}, manifest.types, [])
    placed = add(container.RECORDS, rows, container.crc32(rows))
    about = container.summary_bytes(tail.summary, placed)
    add(container.SUMMARY, about, container.crc32(about))
    path.write_bytes(data + container.directory(entries, len(data)))
    assert data[30:46] == b"archive/data.pkl"


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    else:
        assert one == other


def plain() -> dict[str, Any]:
    weight = torch.arange(12.0).view(3, 4)
    return {
        "tensors": [weight, weight[1], weight.t(), torch.ones(3, dtype=torch.bfloat16), torch.empty(0, 2),
                    torch.tensor(1), torch.ones(2, dtype=torch.uint16), torch.ones(1).expand(4),
                    torch.tensor([1 + 2j]), torch.tensor([True]), torch.ones(2, dtype=torch.float8_e5m2).view(torch.uint8)],
        "values": [None, True, -5, 1 << 1000, 2.5, 1j, "text \u00e9", b"bytes", bytearray(b"x"), (1, (2,)), {3, 4},
                   torch.float16, torch.Size([2, 3]), torch.device("cuda", 1), float("inf")],
        "od": collections.OrderedDict(a=1), 5: {1.5: "x", None: "y", (1, "a"): "z"},
    }  # fmt: skip


PAYLOADS: dict[str, Callable[[], Any]] = {
    "a model": realistic_payload,
    "all that is plain": plain,
    "nothing": dict,
    "a list": lambda: [1, torch.ones(3)],
    "many tensors": lambda: {str(n): torch.full((n % 7,), n) for n in range(300)},
    "a large tensor": lambda: {"w": torch.arange(3 << 20, dtype=torch.uint8)},
}


@pytest.mark.parametrize("old", [False, True], ids=["today's order", "the first order"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_the_documents_reader_reads_real_files(name: str, old: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save(PAYLOADS[name](), path, summary=SUMMARY)
    if old:
        in_the_old_order(path)
    found = reader()["read"](path)
    if name != "a model":
        same(found, PAYLOADS[name]())
    same(found, torch.load(path, weights_only=True))


@pytest.mark.parametrize("wide", [64, 500, 2000])
def test_and_those_that_are_too_large_for_plain_zip(
    wide: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "ZIP64_BYTES", wide)
    monkeypatch.setattr(container, "ZIP64_ENTRIES", 20)
    path = tmp_path / "a.ckpt"
    payload = {str(n): torch.full((n,), n) for n in range(30)}
    CheckpointEngine().save(payload, path)
    names = reader()
    names.update(WIDE=wide, MANY=20)
    same(names["read"](path), payload)


def test_the_documents_reader_notices_every_changed_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    CheckpointEngine().save({"w": torch.ones(3)}, path, summary={"step": 1})
    good, read = path.read_bytes(), reader()["read"]
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x20]) + good[position + 1 :])
        with pytest.raises(Exception):  # noqa: B017 - any: it is a reader of sixty lines
            read(path)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(Exception):  # noqa: B017
            read(path)


def test_the_document_names_what_there_is() -> None:
    text = DOCUMENT.read_text()
    for word in (*exact._RESTORERS, "ref"):
        assert f"`{word}`" in text, word
    for name in ("format", "records", "step", "epoch", "metrics", "saved_at", "exact", "kind", "contents"):
        assert f"| `{name}`" in text or f", `{name}`" in text, name
    assert f"format {container.FORMAT}\n" in text
    assert f"{container.SUMMARY_BYTES >> 20} MiB" in text
    assert all(f"`{column}`" in text for column in ("name", "offset", "length", "crc32", "tensors"))
