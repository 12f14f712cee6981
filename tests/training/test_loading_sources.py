"""`load_from_checkpoint`: from every kind of source, onto every kind of device."""

from __future__ import annotations

import copy
import errno
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import holdfast as pl
from holdfast.checkpoint import tensors
from holdfast.checkpoint.load import load
from tests.training.http_server import Server
from tests.training.lit_model import LitModel, same, saved
from tests.training.toys import Toy, rows, trainer


@pytest.fixture
def lit(tmp_path: Path) -> Path:
    return saved(LitModel(3, 2), tmp_path / "lit.ckpt")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_from_a_url(lit: Path, server: Server) -> None:
    url = server.put("/models/lit.ckpt?key=secret", lit.read_bytes())
    assert same(LitModel.load_from_checkpoint(url), lit)
    server.answers["/old"] = (302, {"Location": url}, b"")
    assert same(LitModel.load_from_checkpoint(f"{server.url}/old"), lit)


def test_a_run_goes_on_from_a_url(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    whole = Toy()
    first, resumed = copy.deepcopy(whole), Toy()
    trainer(max_epochs=2).fit(whole, rows())
    path = saved(first, tmp_path / "first.ckpt")
    url = server.put("/first.ckpt?key=secret", path.read_bytes())
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "best", save_last=True)
    trainer(max_epochs=2, callbacks=[saving]).fit(resumed, rows(), ckpt_path=url)
    assert server.asked == ["/first.ckpt?key=secret"]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert resumed.seen == list(range(12))
    said = capsys.readouterr().err
    assert f"resumed from {server.url}/first.ckpt  step 3" in said and "secret" not in said


def test_a_url_that_is_not_there(server: Server) -> None:
    with pytest.raises(pl.CheckpointNotFound) as refused:
        LitModel.load_from_checkpoint(f"{server.url}/none.ckpt?key=secret")
    assert str(refused.value) == (
        f"There is no checkpoint at {server.url}/none.ckpt: the server answers 404 Not Found."
    )


def test_a_server_that_fails(server: Server) -> None:
    server.answers["/a.ckpt"] = (503, {}, b"")
    with pytest.raises(pl.StorageError) as refused:
        LitModel.load_from_checkpoint(f"{server.url}/a.ckpt")
    assert str(refused.value) == (
        f"{server.url}/a.ckpt: the server answers 503 Service Unavailable. Nothing was loaded."
    )


def test_a_server_that_is_not_there(server: Server) -> None:
    other = Server()
    other.server.server_close()
    with pytest.raises(pl.StorageError) as refused:
        LitModel.load_from_checkpoint(f"{other.url}/a.ckpt")
    assert str(refused.value) == (
        f"{other.url}/a.ckpt cannot be fetched: [Errno 111] Connection refused. Nothing was loaded."
    )


def test_a_connection_that_ends_early(lit: Path, server: Server) -> None:
    body = lit.read_bytes()
    url = server.put("/lit.ckpt", body[:1000], length=len(body))
    with pytest.raises(pl.StorageError) as refused:
        LitModel.load_from_checkpoint(url)
    assert str(refused.value) == (
        f"{url}: the connection ended after 1000 of {len(body)} bytes. Nothing was loaded; try again."
    )


def test_a_url_that_is_another_page(server: Server) -> None:
    url = server.put("/lit.ckpt", b"<!DOCTYPE html><html>Please log in</html>")
    with pytest.raises(pl.CheckpointIncomplete) as refused:
        LitModel.load_from_checkpoint(url)
    assert str(refused.value) == "lit.ckpt is not a checkpoint: it begins with b'<!DOCTYPE html><'."


def test_a_url_whose_file_is_damaged_or_short(lit: Path, server: Server) -> None:
    body = bytearray(lit.read_bytes())
    with pytest.raises(pl.CheckpointIncomplete) as refused:
        LitModel.load_from_checkpoint(server.put("/lit.ckpt", bytes(body[:-100])))
    assert str(refused.value) == "lit.ckpt is not a whole checkpoint: it does not end with a zip directory."
    body[body.index(torch.load(lit, weights_only=True)["state_dict"]["l1.bias"].numpy().tobytes())] ^= 1
    with pytest.raises(
        pl.CheckpointCorrupt, match=r"^lit.ckpt is corrupt: data/\d+ \(state_dict/l1.bias\) has"
    ):
        LitModel.load_from_checkpoint(server.put("/lit.ckpt", bytes(body)))


def test_through_fsspec(lit: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/lit.ckpt", lit.read_bytes())
    assert same(LitModel.load_from_checkpoint("memory://models/lit.ckpt"), lit)
    with pytest.raises(pl.CheckpointNotFound) as missing:
        LitModel.load_from_checkpoint("memory://models/none.ckpt")
    assert str(missing.value) == "There is no checkpoint memory://models/none.ckpt."
    with pytest.raises(pl.ConfigError) as unknown:
        LitModel.load_from_checkpoint("nowhere://models/lit.ckpt")
    assert str(unknown.value) == "fsspec cannot read from nowhere://: Protocol not known: nowhere"


def test_a_remote_file_that_is_shorter_than_it_says(lit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/lit.ckpt", lit.read_bytes()[:1000])
    monkeypatch.setattr(type(memory), "size", lambda self, path: 2000)
    with pytest.raises(pl.StorageError) as refused:
        load("memory://models/lit.ckpt")
    assert str(refused.value) == (
        "memory://models/lit.ckpt: the connection ended after 1000 of 2000 bytes. Nothing was loaded; try "
        "again."
    )


def test_a_url_without_the_package_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(pl.ConfigError) as refused:
        load("s3://bucket/a.ckpt")
    assert str(refused.value) == (
        "Reading from s3:// needs the package fsspec, which is not installed: pip install fsspec"
    )


def test_a_file_object_that_gives_text() -> None:
    class Text:
        def read(self, size: int) -> str:
            return "x"

    text: Any = Text()
    with pytest.raises(pl.ConfigError) as refused:
        load(text)
    assert str(refused.value) == "<Text> gives text; a checkpoint is bytes: open it with mode 'rb'."


@pytest.mark.parametrize("kind", ["url", "fsspec", "file object"])
def test_a_disk_without_room_for_the_copy(
    kind: str, lit: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsspec.filesystem("memory").pipe("/models/lit.ckpt", lit.read_bytes())
    sources: dict[str, Any] = {
        "url": server.put("/lit.ckpt?key=secret", lit.read_bytes()),
        "fsspec": "memory://models/lit.ckpt",
        "file object": io.BytesIO(lit.read_bytes()),
    }
    names = {
        "url": f"{server.url}/lit.ckpt",
        "fsspec": "memory://models/lit.ckpt",
        "file object": "<BytesIO>",
    }
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(pl.StorageError) as refused:
        patch.setattr(os, "write", full)
        LitModel.load_from_checkpoint(sources[kind])
    assert str(refused.value) == (
        f"{names[kind]} cannot be copied to {tmp_path} to be read: No space left on device. Nothing was "
        "loaded. Set TMPDIR to a directory with room for it, or copy it to a file of this machine."
    )


def test_no_directory_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(pl.StorageError) as refused:
        load(io.BytesIO())
    assert str(refused.value).startswith(
        f"<BytesIO> cannot be copied to {tmp_path / 'gone'} to be read: No such file or directory."
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "http://me:secret@localhost/a.ckpt?key=secret",
            "http://localhost/a.ckpt was given with a user name or a password, which is not sent: leave it "
            "out, or download the file first.",
        ),
        (
            "http://localhost/a b.ckpt?key=secret",
            "http://localhost/a b.ckpt is not a valid address: write a space as %20.",
        ),
    ],
)
def test_an_address_that_is_none_does_not_show_its_secrets(address: str, message: str) -> None:
    with pytest.raises(pl.ConfigError) as refused:
        load(address)
    assert str(refused.value) == message


def test_a_file_url_is_a_path(lit: Path) -> None:
    assert same(LitModel.load_from_checkpoint(lit.as_uri()), lit)


def test_file_objects_are_read_from_where_they_stand(lit: Path, tmp_path: Path) -> None:
    body = lit.read_bytes()
    (tmp_path / "inside.bin").write_bytes(b"0123456789" + body)
    with open(lit, "rb") as plain, open(tmp_path / "inside.bin", "rb") as inside:
        inside.seek(10)
        for file, at in ((plain, 0), (io.BytesIO(body), 0), (inside, 10)):
            for _ in range(2):
                assert same(LitModel.load_from_checkpoint(file), lit)
                assert file.tell() == at


def test_a_stream_that_cannot_be_moved(lit: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.left = lit.read_bytes()

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            piece, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
            buffer[: len(piece)] = piece
            return len(piece)

    assert same(LitModel.load_from_checkpoint(Pipe()), lit)


def test_what_is_no_source(lit: Path) -> None:
    with open(lit, encoding="latin-1") as file, pytest.raises(pl.ConfigError) as text:
        LitModel.load_from_checkpoint(file)
    assert str(text.value) == f"{lit} is opened in text mode; a checkpoint is bytes: open it with mode 'rb'."
    with pytest.raises(pl.ConfigError) as number:
        LitModel.load_from_checkpoint(3)
    assert str(number.value) == (
        "A checkpoint is read from a path, a URL or a file opened with mode 'rb', found int."
    )
    with pytest.raises(pl.CheckpointIncomplete) as empty:
        LitModel.load_from_checkpoint(io.BytesIO())
    assert str(empty.value) == "<BytesIO> is not a checkpoint: it is empty."


# -- devices -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "torch's", "torch's old"])
def from_cuda(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose tensors were on a GPU that this machine does not have."""
    path = tmp_path / "a.ckpt"
    with monkeypatch.context() as patch:
        if request.param == "ours":
            made = tensors.Record.__init__

            def on_cuda(record: Any, *args: Any, **more: Any) -> None:
                made(record, *args, **more)
                record.location = "cuda:99"

            patch.setattr(tensors.Record, "__init__", on_cuda)
            saved(LitModel(3, 2), path)
        else:
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
            weights = LitModel(3, 2).state_dict()
            payload = {"state_dict": weights, "hparams_name": "kwargs"}
            payload["hyper_parameters"] = {"in_dim": 3, "out_dim": 2}
            torch.save(payload, path, _use_new_zipfile_serialization=request.param == "torch's")
    return path


@pytest.mark.parametrize(
    "where",
    [
        None,
        "cpu",
        torch.device("cpu"),
        {"cuda:99": "cpu"},
        {torch.device("cuda:99"): torch.device("cpu")},
        {99: "cpu"},
    ],
)
def test_what_was_on_a_gpu_opens_without_one(from_cuda: Path, where: Any) -> None:
    loaded = LitModel.load_from_checkpoint(from_cuda, map_location=where)
    assert loaded.device == torch.device("cpu")
    weights = torch.load(from_cuda, weights_only=True, map_location="cpu")["state_dict"]
    assert torch.equal(loaded.l1.weight, weights["l1.weight"])


def test_a_function_is_asked_for_each_storage(from_cuda: Path) -> None:
    asked = []

    def where(storage: Any, location: str) -> Any:
        asked.append((type(storage).__name__, location))
        return storage

    assert LitModel.load_from_checkpoint(from_cuda, map_location=where).device == torch.device("cpu")
    assert set(asked) == {("UntypedStorage", "cuda:99")}
    assert len(asked) >= 2


@pytest.mark.parametrize("where", ["cuda:99", 99, {"cuda:99": "cuda:99"}, lambda storage, location: None])
def test_a_device_that_is_not_there(from_cuda: Path, where: Any) -> None:
    with pytest.raises(pl.CheckpointIncompatible) as refused:
        LitModel.load_from_checkpoint(from_cuda, map_location=where)
    message = str(refused.value)
    assert message.startswith(
        "The tensors of a.ckpt were saved on cuda:99 and cannot be loaded with map_location="
    )
    assert message.endswith('\nTo load them anywhere: map_location="cpu".')


def test_a_function_that_returns_something_else(from_cuda: Path) -> None:
    for wrong in (3, torch.UntypedStorage(1)):
        with pytest.raises(pl.CheckpointIncompatible, match="expected an UntypedStorage of that length"):
            LitModel.load_from_checkpoint(
                from_cuda, map_location=lambda storage, location, wrong=wrong: wrong
            )


def test_weights_without_values_are_refused(lit: Path) -> None:
    with pytest.raises(pl.CheckpointIncompatible) as refused:
        LitModel.load_from_checkpoint(lit, map_location="meta")
    assert str(refused.value) == (
        "lit.ckpt does not fit LitModel. Keys 2 without values, on the device meta:\n  l1.weight\n  l1.bias\n"
        "Load it onto a device that has memory, such as the CPU."
    )


# -- what is not read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ours", "torch's", "torch's old"])
def test_the_state_of_the_optimizer_is_not_read(form: str, tmp_path: Path) -> None:
    path = saved(LitModel(3, 2), tmp_path / "a.ckpt")
    payload = torch.load(path, weights_only=True)
    moment = payload["optimizer_states"][0]["state"][0]["exp_avg"].numpy().tobytes()
    if form != "ours":
        torch.save(payload, path, _use_new_zipfile_serialization=form == "torch's")
    body = bytearray(path.read_bytes())
    body[body.index(moment)] ^= 1
    path.write_bytes(body)
    if form != "torch's old":  # which has no checksums
        with pytest.raises(pl.CheckpointCorrupt):
            load(path)
    asked: list[int] = []

    def count(storage: Any, location: str) -> Any:
        asked.append(storage.nbytes())
        return storage

    LitModel.load_from_checkpoint(path, map_location=count)
    # The rest is larger: generators, whatever the optimizer has is not.
    assert sorted(size for size in asked if size <= 6 * 4) == [2 * 4, 6 * 4]
