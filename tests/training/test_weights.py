"""Weights into a model: strict or not, under the names that wrappers give, all or none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast as pl
from tests.training.lit_model import LitModel, same, saved
from tests.training.toys import Toy, rows, trainer


@pytest.fixture
def lit(tmp_path: Path) -> Path:
    return saved(LitModel(3, 2), tmp_path / "lit.ckpt")


class Grown(LitModel):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.head = nn.Linear(out_dim, 1)


class Lenient(Grown):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.strict_loading = False


def test_strict_is_an_argument_or_the_modules_own_word(lit: Path) -> None:
    with pytest.raises(pl.CheckpointIncompatible) as refused:
        Grown.load_from_checkpoint(lit)
    assert str(refused.value) == (
        "lit.ckpt does not fit Grown. Keys 2 missing from the file:\n  head.weight\n  head.bias\n"
        "strict=False loads what matches."
    )
    with pytest.raises(pl.CheckpointIncompatible):
        Lenient.load_from_checkpoint(lit, strict=True)
    for loaded in (Grown.load_from_checkpoint(lit, strict=False), Lenient.load_from_checkpoint(lit)):
        assert torch.equal(loaded.l1.weight, torch.load(lit, weights_only=True)["state_dict"]["l1.weight"])


def test_what_does_not_fit_leaves_a_live_model_as_it_was(lit: Path) -> None:
    model = Grown(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(max_epochs=2)
    with pytest.raises(pl.CheckpointIncompatible):
        run.fit(model, rows(), ckpt_path=lit)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_hook_of_the_module_may_rename_keys(lit: Path) -> None:
    class Renamed(LitModel):
        def __init__(self, in_dim: int, out_dim: int) -> None:
            super().__init__(in_dim, out_dim)
            self.first = self.l1
            del self.l1
            self._register_load_state_dict_pre_hook(self.rename)

        def rename(self, state: dict[str, Any], *args: Any) -> None:
            for key in [key for key in state if key.startswith("l1.")]:
                state[key.replace("l1.", "first.")] = state.pop(key)

    weights = torch.load(lit, weights_only=True)["state_dict"]
    assert torch.equal(Renamed.load_from_checkpoint(lit).first.weight, weights["l1.weight"])


@pytest.mark.filterwarnings("ignore:Late.configure_sharded_model is the old name")
@pytest.mark.parametrize("hook", ["configure_model", "configure_sharded_model"])
def test_what_is_built_late_is_built_before_the_weights_come(hook: str, lit: Path) -> None:
    class Late(LitModel):
        def __init__(self, in_dim: int, out_dim: int) -> None:
            super().__init__(in_dim, out_dim)
            del self.l1
            self.calls: list[str] = []

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.calls.append(f"on_load_checkpoint {sorted(checkpoint['state_dict'])}")
            checkpoint["state_dict"].pop("l1.bias")

    def build(self: Late) -> None:
        self.calls.append(hook)
        self.l1 = nn.Linear(3, 2, bias=False)

    setattr(Late, hook, build)
    loaded = Late.load_from_checkpoint(lit)
    assert loaded.calls == [hook, "on_load_checkpoint ['l1.bias', 'l1.weight']"]
    assert same(loaded, lit)


class Nested(Toy):
    """A part that may be wrapped, with a buffer whose loading goes by a version."""

    def __init__(self, wrap: Any = None) -> None:
        pl.LightningModule.__init__(self)
        self.net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        if wrap is not None:
            self.net = wrap(self.net)
        self.seen = []

    def loss(self, batch: Any) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Wrapped(nn.Module):
    """Names its part as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module(batch)


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def both(net: nn.Module) -> nn.Module:
    return Wrapped(compiled(net))


@pytest.mark.parametrize("wrap", [compiled, Wrapped, both])
def test_the_names_that_wrappers_give_go_both_ways(wrap: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": Nested(wrap).state_dict()}, tmp_path / "wrapped.ckpt")
    torch.save({"state_dict": Nested().state_dict()}, tmp_path / "plain.ckpt")
    plain = Nested.load_from_checkpoint(tmp_path / "wrapped.ckpt")
    wrapped = Nested.load_from_checkpoint(tmp_path / "plain.ckpt", wrap=wrap)
    for loaded, path in ((plain, "wrapped.ckpt"), (wrapped, "plain.ckpt")):
        weights = torch.load(tmp_path / path, weights_only=True)["state_dict"].values()
        assert all(torch.equal(*pair) for pair in zip(loaded.state_dict().values(), weights, strict=True))


def test_the_whole_model_behind_a_prefix(tmp_path: Path) -> None:
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        weights = {f"{prefix}{key}": value for key, value in Nested().state_dict().items()}
        torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
        loaded = Nested.load_from_checkpoint(tmp_path / "a.ckpt")
        assert torch.equal(loaded.net[0].weight, weights[f"{prefix}net.0.weight"])


def test_a_part_that_is_itself_called_module(tmp_path: Path) -> None:
    class Named(Nested):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 2)

    torch.save({"state_dict": Named().state_dict()}, tmp_path / "a.ckpt")
    assert same(Named.load_from_checkpoint(tmp_path / "a.ckpt"), tmp_path / "a.ckpt")


def test_a_batch_norm_from_before_its_counter(tmp_path: Path) -> None:
    weights = dict(Nested().state_dict())
    del weights["net.1.num_batches_tracked"]
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    assert Nested.load_from_checkpoint(tmp_path / "a.ckpt").net[1].num_batches_tracked == 0
