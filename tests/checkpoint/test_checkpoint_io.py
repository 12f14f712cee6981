"""Checkpoint plugins by themselves: durable, verified, and in the background a point in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from holdfast.checkpoint.catalog import read_summary
from holdfast.checkpoint.checkpoint_io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from holdfast.checkpoint.point_in_time import PointInTime
from holdfast.errors import CheckpointCorrupt, ConfigError, StorageError


class Gated(TorchCheckpointIO):
    """Writes when it is let, and notes what it does."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.done: list[tuple[str, str]] = []
        self.fails = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.gate.wait()
        if self.fails:
            raise StorageError(f"{Path(path).name}: the disk is full")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.done.append(("saved", Path(path).name))

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        self.done.append(("removed", Path(path).name))

    def teardown(self) -> None:
        self.done.append(("torn down", ""))


@pytest.fixture
def gated() -> Iterator[tuple[AsyncCheckpointIO, Gated]]:
    inner = Gated()
    yield AsyncCheckpointIO(inner), inner
    inner.gate.set()


class TestTorch:
    def test_is_the_engine(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "a.ckpt"
        io = TorchCheckpointIO()
        io.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "global_step": 3, "epoch": 1}, path)
        assert read_summary(path).step == 3
        assert torch.equal(io.load_checkpoint(path)["state_dict"]["w"], torch.ones(2))
        assert torch.equal(torch.load(path)["state_dict"]["w"], torch.ones(2))
        damaged = bytearray(path.read_bytes())
        damaged[damaged.find(torch.ones(2).numpy().tobytes())] ^= 1
        path.chmod(0o644)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt):
            io.load_checkpoint(path)
        io.remove_checkpoint(path)
        io.remove_checkpoint(path)
        assert list(path.parent.iterdir()) == []

    def test_what_cannot_be_deleted_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "a.ckpt").mkdir()
        with pytest.raises(StorageError) as refused:
            TorchCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
        assert str(refused.value) == (
            f"Could not delete {tmp_path / 'a.ckpt'}: Is a directory. Choose another name: a directory has "
            "this one."
        )

    def test_what_is_left_out_is_said(self, tmp_path: Path) -> None:
        io = TorchCheckpointIO()
        with pytest.warns(UserWarning, match=r"^step is not in the checkpoint: "):
            io.save_checkpoint({"step": lambda: 0, "lr": 1}, tmp_path / "a.ckpt")
        assert io.load_checkpoint(tmp_path / "a.ckpt")["lr"] == 1

    def test_takes_no_storage_options(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as refused:
            TorchCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"region": "eu"})
        assert str(refused.value) == (
            "storage_options={'region': 'eu'}: TorchCheckpointIO writes local files and takes none. Use a "
            "CheckpointIO of your own that does: Trainer(plugins=[...])."
        )

    def test_the_interface_cannot_be_instantiated(self) -> None:
        with pytest.raises(TypeError, match="abstract"):
            CheckpointIO()  # type: ignore[abstract]


class TestAsync:
    def test_what_changes_after_the_call_is_not_in_the_file(self, gated: Any, tmp_path: Path) -> None:
        io, inner = gated
        weight = torch.zeros(3)
        state = {"w": weight, "list": [1], "nested": {"t": (weight, weight[1:])}}
        io.save_checkpoint(state, tmp_path / "a.ckpt")
        weight.fill_(7)
        state["list"].append(2)  # type: ignore[attr-defined]
        state["more"] = 1
        inner.gate.set()
        loaded = io.load_checkpoint(tmp_path / "a.ckpt")
        assert loaded["list"] == [1]
        assert "more" not in loaded
        assert torch.equal(loaded["w"], torch.zeros(3))
        assert loaded["nested"]["t"][1].data_ptr() == loaded["w"].data_ptr() + 4, "shared memory stays shared"

    def test_deletions_take_their_place_behind_saves(self, gated: Any, tmp_path: Path) -> None:
        io, inner = gated
        (tmp_path / "old.ckpt").write_bytes(b"")
        io.save_checkpoint({}, tmp_path / "new.ckpt")
        io.remove_checkpoint(tmp_path / "old.ckpt")
        assert (tmp_path / "old.ckpt").exists(), "nothing is durable yet"
        inner.gate.set()
        io.teardown()
        assert inner.done == [("saved", "new.ckpt"), ("removed", "old.ckpt"), ("torn down", "")]

    def test_what_would_be_replaced_stays_if_the_save_fails(self, gated: Any, tmp_path: Path) -> None:
        io, inner = gated
        (tmp_path / "old.ckpt").write_bytes(b"")
        inner.fails = True
        io.save_checkpoint({}, tmp_path / "new.ckpt")
        io.remove_checkpoint(tmp_path / "old.ckpt")
        inner.gate.set()
        with pytest.raises(StorageError, match="new.ckpt: the disk is full"):
            io.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]

    def test_an_error_is_raised_by_the_next_call_once(self, gated: Any, tmp_path: Path) -> None:
        io, inner = gated
        inner.gate.set()
        inner.fails = True
        io.save_checkpoint({}, tmp_path / "a.ckpt")
        with pytest.raises(StorageError, match="a.ckpt: the disk is full"):
            io.save_checkpoint({}, tmp_path / "b.ckpt")
        inner.fails = False
        io.save_checkpoint({}, tmp_path / "b.ckpt")
        io.teardown()
        assert inner.done == [("saved", "b.ckpt"), ("torn down", "")]

    def test_an_error_is_raised_by_teardown(self, gated: Any, tmp_path: Path) -> None:
        io, inner = gated
        inner.gate.set()
        inner.fails = True
        io.save_checkpoint({}, tmp_path / "a.ckpt")
        with pytest.raises(StorageError, match="a.ckpt: the disk is full"):
            io.teardown()
        assert inner.done == [("torn down", "")]

    def test_an_interrupt_while_waiting_does_not_swallow_the_error(
        self, gated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(future: Any, timeout: Any = None) -> None:
            raise KeyboardInterrupt

        io, inner = gated
        inner.fails = True
        io.save_checkpoint({}, tmp_path / "a.ckpt")
        with monkeypatch.context() as patch:
            patch.setattr(Future, "exception", interrupted)
            with pytest.raises(KeyboardInterrupt):
                io.wait()
        inner.gate.set()
        with pytest.raises(StorageError, match="a.ckpt: the disk is full"):
            io.teardown()

    def test_one_save_is_in_flight(self, gated: Any, tmp_path: Path) -> None:
        io, inner = gated
        io.save_checkpoint({}, tmp_path / "0.ckpt")
        waits = threading.Thread(target=lambda: io.save_checkpoint({}, tmp_path / "1.ckpt"))
        waits.start()
        assert waits.is_alive()
        assert inner.done == []
        inner.gate.set()
        waits.join()
        io.teardown()
        assert [name for _, name in inner.done] == ["0.ckpt", "1.ckpt", ""]

    def test_wraps_the_engine_by_default_and_is_used_again(self, tmp_path: Path) -> None:
        io = AsyncCheckpointIO()
        assert type(io.checkpoint_io) is TorchCheckpointIO
        for name in ("a.ckpt", "b.ckpt"):
            io.save_checkpoint({"name": name}, tmp_path / name)
            io.teardown()
            assert io.load_checkpoint(tmp_path / name) == {"name": name}
        io.teardown()


class TestPointInTime:
    def test_what_cannot_be_copied_stays_itself(self) -> None:
        lock = threading.Lock()
        copied = PointInTime().of({"lock": lock, "set": {1, 2}, "pair": (1, [2])})
        assert copied["lock"] is lock
        assert copied == {"lock": lock, "set": {1, 2}, "pair": (1, [2])}

    def test_two_references_stay_one(self) -> None:
        inner = [1]
        copied = PointInTime().of({"a": inner, "b": inner})
        assert copied["a"] is copied["b"] is not inner

    def test_views_of_one_array_in_either_order(self) -> None:
        array = numpy.arange(1000.0)
        views = {"begins": torch.from_numpy(array[:4]), "whole": torch.from_numpy(array)}
        for names in (["begins", "whole"], ["whole", "begins"]):
            copied = PointInTime().of({name: views[name] for name in names})
            for name in names:
                assert torch.equal(copied[name], views[name]), name

    def test_tensors_that_are_more_than_their_memory(self) -> None:
        conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
        negative = conjugate.imag
        assert conjugate.is_conj() and negative.is_neg()
        copied = PointInTime().of([conjugate, negative])
        assert torch.equal(copied[0], torch.tensor([1 - 2j, 3 + 1j]))
        assert torch.equal(copied[1], torch.tensor([-2.0, 1.0]))

    def test_tensors_of_every_kind(self) -> None:
        kinds = {
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "empty": torch.empty(0),
            "sparse": torch.eye(2).to_sparse(),
            "strided": torch.arange(6.0).view(2, 3).t(),
            "scalar": torch.tensor(3, dtype=torch.int8),
        }
        copied = PointInTime().of(kinds)
        for name, tensor in kinds.items():
            assert torch.equal(copied[name].to_dense(), tensor.detach().to_dense()), name
            assert copied[name].shape == tensor.shape
            assert not copied[name].requires_grad
        assert copied["strided"].stride() == (1, 3)
