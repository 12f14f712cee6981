"""Tensors that stay in the file until they are released: verified, cheap, and never a danger afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import load as loading
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load_mapped
from holdfast.errors import CheckpointCorrupt
from tests.training.toys import Toy, rows, trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped under Linux alone")

LARGE = 100_000  # elements: well above what is read rather than mapped


def payload() -> dict[str, Any]:
    return {
        "state_dict": {f"w{i}": torch.full((LARGE,), float(i + 1)) for i in range(4)} | {"b": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.full((LARGE,), 9.0)}}}],
        "epoch": 3,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    CheckpointEngine().save(payload(), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def open_fds(path: Path) -> int:
    fds = Path("/proc/self/fd")
    return sum(1 for fd in fds.iterdir() if os.path.realpath(fd) == str(path))


def test_nothing_is_left_of_it(path: Path) -> None:
    loaded = load_mapped(path, own=["optimizer_states"])
    assert is_mapped(path)
    live = {key: value.clone() for key, value in loaded.payload["state_dict"].items()}
    state = loaded.payload["optimizer_states"][0]["state"][0]["exp_avg"]
    loaded.release()
    assert loaded.payload is None
    assert not is_mapped(path) and not open_fds(path)
    path.write_bytes(b"")
    assert all(torch.equal(value, payload()["state_dict"][key]) for key, value in live.items())
    assert torch.equal(state, torch.full((LARGE,), 9.0))


def test_what_is_kept_owns_its_memory(path: Path) -> None:
    """As a hook that keeps a tensor does, or a module that takes it instead of copying it."""
    loaded = load_mapped(path)
    kept, view = loaded.payload["state_dict"]["w1"], loaded.payload["state_dict"]["w3"][7:9]
    array = loaded.payload["state_dict"]["w2"].numpy()
    loaded.release()
    assert not is_mapped(path) and not open_fds(path)
    os.truncate(path, 100)
    assert torch.equal(kept, torch.full((LARGE,), 2.0))
    assert view.tolist() == [4.0, 4.0] and (array == 3.0).all()
    kept.add_(1)
    assert torch.equal(kept, torch.full((LARGE,), 3.0))


def test_what_is_kept_is_freed_with_the_last_of_it(path: Path) -> None:
    def mapped_at(address: int) -> bool:
        spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)

    loaded = load_mapped(path)
    first, last = loaded.payload["state_dict"]["w0"], loaded.payload["state_dict"]["w3"]
    loaded.release()
    address = first.data_ptr()
    del first
    assert mapped_at(address)
    del last
    assert not mapped_at(address)


def test_forgotten_it_is_released_with_its_last_reference(path: Path) -> None:
    loaded = load_mapped(path)
    kept = loaded.payload["state_dict"]["w1"]
    del loaded
    gc.collect()
    assert not is_mapped(path) and not open_fds(path)
    os.truncate(path, 0)
    assert torch.equal(kept, torch.full((LARGE,), 2.0))


def test_writing_to_a_tensor_leaves_the_file_alone(path: Path) -> None:
    before = path.read_bytes()
    loaded = load_mapped(path)
    kept = loaded.payload["state_dict"]["w1"]
    kept.zero_()
    loaded.release()
    assert path.read_bytes() == before
    assert not kept.any()


def test_every_byte_is_checked_mapped_or_not(path: Path) -> None:
    good = path.read_bytes()
    for value in (2.0, 9.0):
        at = good.index(torch.full((LARGE,), value).numpy().tobytes())
        path.write_bytes(good[: at + 5] + b"\xff" + good[at + 6 :])
        with pytest.raises(CheckpointCorrupt, match=r"^a.ckpt is corrupt: data/\d+ \(.*\) has checksum "):
            load_mapped(path, own=["optimizer_states"])
        assert not is_mapped(path)


class TestChangedWhileItIsLoaded:
    def test_cut_short(self, path: Path) -> None:
        size = path.stat().st_size
        loaded = load_mapped(path)
        os.truncate(path, 1000)
        with pytest.raises(CheckpointCorrupt) as refused:
            loaded.check()
        message = f"a.ckpt is corrupt: it was cut from {size} to 1000 bytes while it was being loaded."
        assert str(refused.value) == message
        with pytest.raises(CheckpointCorrupt) as refused:
            loaded.release()
        assert str(refused.value) == message
        assert not is_mapped(path)

    def test_overwritten(self, path: Path) -> None:
        loaded = load_mapped(path)
        at = path.read_bytes().index(torch.full((LARGE,), 2.0).numpy().tobytes())
        with path.open("r+b") as file:
            file.seek(at + 5)
            file.write(b"\xff")
        os.utime(path, (1, 1))
        with pytest.raises(CheckpointCorrupt) as refused:
            loaded.check()
        assert str(refused.value).startswith(
            "a.ckpt is corrupt: it was overwritten while it was being loaded: data/1 (state_dict/w1) has checksum "
        )
        with pytest.raises(CheckpointCorrupt):
            loaded.release()

    def test_with_the_same_bytes_or_only_touched_or_deleted_it_is_fine(self, path: Path) -> None:
        loaded = load_mapped(path)
        os.utime(path, (1, 1))
        loaded.check()
        path.unlink()
        loaded.check()
        assert torch.equal(loaded.payload["state_dict"]["w1"], torch.full((LARGE,), 2.0))
        loaded.release()


def test_elsewhere_everything_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the disk of another machine, from a URL and from an open file."""
    with path.open("rb") as file:
        loaded = load_mapped(file)
    assert not is_mapped(path)
    monkeypatch.setattr(loading, "can_map", lambda fd: False)
    loaded = load_mapped(path)
    assert not is_mapped(path)
    assert torch.equal(loaded.payload["state_dict"]["w1"], torch.full((LARGE,), 2.0))
    loaded.release()


def test_files_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(payload(), tmp_path / "a.pt")
    loaded = load_mapped(tmp_path / "a.pt")
    assert not is_mapped(tmp_path / "a.pt")
    assert torch.equal(loaded.payload["state_dict"]["w1"], torch.full((LARGE,), 2.0))
    loaded.release()


def test_many_small_tensors_are_mapped_too_when_they_are_large_together(tmp_path: Path) -> None:
    many = {str(i): torch.full((15_000,), float(i)) for i in range(700)}  # 60 kB each, 42 MB in all
    CheckpointEngine().save({"state_dict": many}, tmp_path / "a.ckpt")
    loaded = load_mapped(tmp_path / "a.ckpt")
    assert is_mapped(tmp_path / "a.ckpt")
    found = loaded.payload["state_dict"]
    assert all(torch.equal(found[key], value) for key, value in many.items())
    loaded.release()
    assert not is_mapped(tmp_path / "a.ckpt")
    assert all(torch.equal(found[key], value) for key, value in many.items())


# -- in a process of its own: a mistake here is a SIGBUS ------------------------------------------------------

COMMON = """
import os, sys, warnings
import torch
import holdfast as pl
from pathlib import Path
from tests.training.toys import rows

class Wide(pl.LightningModule):
    def __init__(self, tensor=None):
        super().__init__()
        self.save_hyperparameters()
        self.first = torch.nn.Linear(3, 64)
        self.wide = torch.nn.Linear(64, 100_000)
        self.register_buffer("table", torch.zeros(0))
    def training_step(self, batch, batch_idx):
        hidden = self.wide(self.first(batch[0]))
        return hidden.square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

def trainer(path, **arguments):
    return pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=path.parent, **arguments)
"""


def run(program: str, *arguments: object) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", COMMON + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_run_trains_on_after_its_file_was_truncated(tmp_path: Path) -> None:
    """Whatever took a tensor out of the file and kept it: a hook, a module that does not copy, a callback."""
    program = """
path = Path(sys.argv[1])
kept = {}

class Keeps(Wide):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.table = state_dict[prefix + "table"]
        super()._load_from_state_dict(state_dict, prefix, *rest)
    def on_load_checkpoint(self, checkpoint):
        kept["weight"] = checkpoint["state_dict"]["wide.weight"]

class Callback(pl.Callback):
    def state_dict(self):
        return {"ema": torch.ones(500_000)}
    def load_state_dict(self, state):
        kept.update(state)

class Truncates(pl.Callback):
    def on_train_start(self, trainer, module):
        assert str(path) not in open("/proc/self/maps").read()
        os.truncate(path, 0)

def model():
    pl.seed_everything(0, verbose=False)
    made = Keeps()
    made.table = torch.arange(400_000.0)
    return made

first = model()
one = trainer(path, max_epochs=1, callbacks=[Callback()])
one.fit(first, rows())
one.save_checkpoint(path)
copy = path.with_name("copy.ckpt")
copy.write_bytes(path.read_bytes())
resumed, straight = model(), model()
trainer(path, max_epochs=2, callbacks=[Callback(), Truncates()]).fit(resumed, rows(), ckpt_path=path)
assert torch.equal(kept["ema"], torch.ones(500_000))
assert torch.equal(kept["weight"], torch.load(copy, weights_only=True)["state_dict"]["wide.weight"])
assert torch.equal(resumed.table, torch.arange(400_000.0))
trainer(path, max_epochs=2, callbacks=[Callback()]).fit(straight, rows())
assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), straight.state_dict().values()))
loaded = Keeps.load_from_checkpoint(copy, tensor=None)
path.write_bytes(copy.read_bytes())
os.truncate(copy, 0)
assert torch.equal(loaded.table, torch.arange(400_000.0)) and loaded.wide.weight.sum().isfinite()

class TruncatesEarly(pl.Callback):
    def setup(self, trainer, module, stage):
        os.truncate(path, 4096)

try:
    trainer(path, max_epochs=2, callbacks=[Callback(), TruncatesEarly()]).fit(model(), rows(), ckpt_path=path)
except pl.CheckpointCorrupt as refused:
    size = str(refused).split()[7]
    assert str(refused) == f"a.ckpt is corrupt: it was cut from {size} to 4096 bytes while it was being loaded."
    print("refused")
print("done")
"""
    assert run(program, tmp_path / "a.ckpt").splitlines()[-2:] == ["refused", "done"]


class Big(Toy):
    """A model of 99 MiB that says how much memory its process has once its weights are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 64)
        self.wide = torch.nn.Linear(64, 400_000)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.wide(self.layer(batch[0])).square().mean()

    def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
        found = super().load_state_dict(*arguments, **named)
        say_memory("loaded")
        return found

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, foreach=False)


def say_memory(what: str) -> None:
    with open("/proc/self/status") as status:
        print(what, next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon")))


def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    """Measured as the process's anonymous memory: pages of the file itself the system can take back at will."""
    program = """
from tests.checkpoint.test_mapped import Big, say_memory

class Says(pl.Callback):
    def setup(self, trainer, module, stage):
        say_memory("before")
    def on_train_start(self, trainer, module):
        say_memory("after")

path = Path(sys.argv[1])
torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # imports a good deal of torch
say_memory("before")
model = Big.load_from_checkpoint(path)
say_memory("after")
trainer(path, max_epochs=2, callbacks=[Says()]).fit(model, rows(4), ckpt_path=path)
"""
    path = tmp_path / "a.ckpt"
    one = trainer(default_root_dir=tmp_path)
    one.fit(Big(), rows(4))
    one.save_checkpoint(path)
    said = [line.split() for line in run(program, path).splitlines()]
    steps = [(word[0], int(word[1])) for word in said if len(word) == 2 and word[1].isdigit()]
    assert [name for name, _ in steps] == ["before", "loaded", "after", "before", "loaded", "after"]
    (_, before), (_, loaded), (_, after), (_, again), (_, restored), (_, training) = steps
    model = 99
    assert loaded - before < model + 64, "a second copy of the weights would be 99 MiB more"
    assert after - before < model + 64, "the optimizer's state would be 198 MiB more"
    # By "setup" the optimizer's state is in memory, where the optimizer is going to keep it.
    assert again - after < 198 + 64
    assert restored - again < 64
    assert training - again < 64


class Wide(Toy):
    """A model that is large enough for its weights to be mapped."""

    def __init__(self) -> None:
        super().__init__(width=30_000)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_load_from_checkpoint_never_reads_optimizer_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    model, one = Wide(), trainer(default_root_dir=tmp_path)
    one.fit(model, rows())
    one.save_checkpoint(path)
    state = one.optimizers[0].state[model.layer.weight]["exp_avg"]
    data = bytearray(path.read_bytes())
    data[data.index(state.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    counts: list[int] = []
    read = os.preadv

    def counting(fd: int, buffers: Any, at: int) -> int:
        counts.append(read(fd, buffers, at))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    again = Wide.load_from_checkpoint(path, width=30_000)
    assert torch.equal(again.layer.weight, model.layer.weight)
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert weights <= sum(counts) < weights + 30_000
    with pytest.raises(CheckpointCorrupt, match=r"^a.ckpt is corrupt: data/\d+ \(.*exp_avg\) has checksum "):
        trainer(max_epochs=2).fit(Wide(), rows(), ckpt_path=path)
